"""The damping that a run chooses, and the merit that it chooses by."""

from __future__ import annotations

import pytest
import torch
from helpers import flat, small_sets, tiny_llama

import kfade
from kfade import EKFAC, Damping, make_batches, margin
from kfade.curvature.block import EigenBlock
from kfade.curvature.curvature import Curvature
from kfade.curvature.product import quadratic_form
from kfade.method.choose import choose_damping, damping_line
from kfade.method.gradient import forget_gradient
from kfade.method.step import gauss_newton_step
from kfade.models.layers import find_targets


def choice(merit) -> tuple[float, list[float]]:
    """The damping that is chosen by a function of λ, and those that were tried."""
    damping, merits = choose_damping(lambda damping: merit(damping.value))
    assert damping.relative
    assert merits == {value: merit(value) for value in merits}
    return damping.value, list(merits)


def test_weaker_damping_is_taken_while_a_tenth_of_it_gains_a_fifth():
    # Up to 0.001 each tenth gains 30 %, then 10 %.
    assert choice(lambda value: {0.01: 1.0, 0.001: 1.3, 0.0001: 1.43}[value]) == (
        0.001,
        [0.0001, 0.001, 0.01],
    )
    assert choice(lambda value: value**-0.2)[0] == 1e-6  # the weakest of all


def test_the_strongest_damping_within_a_fifth_of_the_best_is_taken():
    assert choice(lambda value: {0.001: 1.1, 0.01: 1.0, 0.1: 0.95, 1.0: 0.9}[value]) == (
        0.1,
        [0.001, 0.01, 0.1, 1.0],
    )
    assert choice(lambda value: {0.001: 0.1, 0.01: 1.0, 0.1: 4.0, 1.0: 3.0}[value])[0] == 0.1
    assert choice(lambda value: 1.0)[0] == 100  # the strongest of all
    assert choice(lambda value: value)[0] == 100


def test_a_damping_whose_step_lowers_the_objective_is_not_taken():
    assert choice(lambda value: {0.001: 0.0, 0.01: 1.0, 0.1: 0.0}[value])[0] == 0.01
    assert choice(lambda value: {0.0001: 0, 0.001: 5.0, 0.01: 0.0, 0.1: 0.0}[value])[0] == 0.001
    assert "inf at 0.001)" in damping_line(Damping(0.01), {0.001: 0.0, 0.01: 1.0})
    damping, merits = choose_damping(lambda damping: 0.0)
    assert "(none raises the objective, by its gradient)" in damping_line(damping, merits)


def test_the_line_tells_the_kl_of_each_beside_that_of_the_chosen_one():
    line = damping_line(Damping(0.01), {0.001: 1.1, 0.01: 1.0, 0.1: 0.5})
    assert "damping 0.01 times the mean eigenvalue" in line
    assert "0.91 at 0.001, 2 at 0.1" in line


def test_without_damping_the_exact_matrix_has_the_greatest_merit():
    """(gᵀr)² / rᵀGr ≤ gᵀG⁻¹g, with equality for r = G⁻¹g (Cauchy-Schwarz), and it falls with λ.

    Not so for an estimate with eigenvalues that are too small: there damping helps.
    """
    generator = torch.Generator().manual_seed(0)
    values = torch.logspace(0, -4, 12, dtype=torch.float64).reshape(3, 4)
    gradient = {"w": torch.randn(3, 4, dtype=torch.float64, generator=generator)}
    too_small = values.clone()
    too_small[0, 0] *= 1e-9
    truth, estimate = (Curvature({"w": EigenBlock(None, None, v)}) for v in (values, too_small))

    def merits(curvature: Curvature) -> list[float]:
        found = []
        for value in (0.0, 1e-4, 1e-2, 1.0):
            step = gauss_newton_step(curvature, gradient, Damping(value))
            found.append(step.slope**2 / truth.quadratic(step.direction))
        return found

    best, *damped = merits(truth)
    # 1e-12: rounding in float64 of a few sums.
    assert best == pytest.approx((gradient["w"].square() / values).sum().item(), rel=1e-12)
    assert [best, *damped] == sorted([best, *damped], reverse=True)
    assert damped[-1] < 0.5 * best
    wrong, *bounded = merits(estimate)
    assert max(bounded) > 10 * wrong


SETS = small_sets()


def same_update(one: kfade.Update, other: kfade.Update) -> bool:
    return all(torch.equal(one.deltas[name], other.deltas[name]) for name in one.deltas)


def test_a_run_chooses_by_the_merit_on_its_held_out_data():
    model = tiny_llama()
    targets = find_targets(model)
    options = {"fit": EKFAC(), "kl": 1e-3, "steps": 2, "refit": False}
    update = kfade.unlearn(model, **SETS, **flat(**options, damping=None))
    told = update.provenance["damping"]
    gradient = forget_gradient(model, make_batches(SETS["forget"]), targets, margin)
    curvature = EKFAC().fit(model, make_batches(SETS["retain"]), targets)
    held_out = make_batches(SETS["held_out"])
    found = {}
    for value in told["merits"]:
        step = gauss_newton_step(curvature, gradient, Damping(float(value)))
        form = quadratic_form(model, held_out, targets, step.direction)
        # 1e-9: the data are in other batches here; sums in float64 differ by rounding.
        assert told["merits"][value] == pytest.approx(step.slope**2 / form, rel=1e-9)
        found[value] = step.slope**2 / form
    chosen, _ = choose_damping(lambda damping: found[f"{damping.value:g}"])
    assert Damping(told["value"], told["relative"]) == chosen

    # The run is the one with that damping given; with another it is another.
    given = kfade.unlearn(model, **SETS, **flat(**options, damping=chosen))
    assert same_update(given, update)
    assert "damping" not in given.provenance
    other = kfade.unlearn(model, **SETS, **flat(**options, damping=Damping(10 * chosen.value)))
    assert not same_update(other, update)


def test_a_resumed_run_keeps_the_damping_that_it_has_chosen(monkeypatch):
    model, kept = tiny_llama(), []
    options = {"fit": EKFAC(), "kl": 1e-3, "steps": 3, "refit": False, "damping": None}
    whole = kfade.unlearn(model, **SETS, **flat(**options, on_step=kept.append))
    monkeypatch.setattr("kfade.method.choose.choose_damping", lambda merit: pytest.fail("again"))
    resumed = kfade.unlearn(model, **SETS, **flat(**options, start=kept[0]))
    assert same_update(resumed, whole)


@pytest.mark.parametrize("size", [{"alpha": 0.01}, {"until": 3.8}])
def test_any_size_of_steps_has_its_damping_chosen(size):
    update = kfade.unlearn(tiny_llama(), **SETS, **flat(fit=EKFAC(), damping=None, **size))
    assert update.provenance["damping"]["merits"]
