"""Corrections after a step: the gradient of the KL, the direction beside the optimum that it must
be, and what a run makes of it.

As in test_theory.py, each test also shows the wrong version failing.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import zoo
from helpers import (
    Snapshot,
    flat,
    measured_kl,
    random_sequences,
    relative_error,
    same_bits,
    tiny_llama,
)
from oracles import loops
from safetensors.torch import load_file
from zoo.rows import FORGET as FORGET_ROWS
from zoo.rows import RETAIN as RETAIN_ROWS

import kfade
from kfade import (
    EKFAC,
    Correction,
    Curvature,
    Damping,
    InputError,
    StepSize,
    Update,
    cross_entropy,
    find_targets,
    make_batches,
)
from kfade.cli import main
from kfade.curvature.block import EigenBlock
from kfade.curvature.vectors import OnDisk
from kfade.method.correct import Ascent, Merit, ascent, descent
from kfade.method.gauge import parameter_changes
from kfade.method.gradient import forget_gradient, kl_gradient
from kfade.method.measure import hidden_reference
from kfade.method.record import ends_of
from kfade.method.refine import inner
from kfade.method.sampling import Sampler
from kfade.method.search import Probe, best_length
from kfade.method.size import NoRiseError, choose_alpha, shortfall

RETAIN, FORGET = random_sequences(12), random_sequences(3, seed=7)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Edited:
    """A tiny model, a change of its weights that matters, and its gradients there."""

    def __init__(self) -> None:
        self.model = tiny_llama()
        self.targets = find_targets(self.model)
        self.batches = make_batches(RETAIN, budget=20)
        self.curvature = EKFAC().fit(self.model, self.batches, self.targets)
        moves = {t.name: 0.1 * randn(*t.shape, seed=i) for i, t in enumerate(self.targets)}
        self.update = Update(parameter_changes(self.targets, moves))
        self.base = hidden_reference(self.model, self.batches, "base")
        with self.update.applied_to(self.model):
            self.kl = kl_gradient(self.model, self.base, self.targets)
            self.forget = forget_gradient(
                self.model, make_batches(FORGET), self.targets, cross_entropy
            )

    def moved(self, direction, length: float) -> Update:
        return self.update.plus(parameter_changes(self.targets, direction), length)

    def measure(self, direction, length: float) -> tuple[float, float]:
        """(K on the retain set, forget loss) after a change."""
        update = self.moved(direction, length)
        with update.applied_to(self.model), torch.no_grad():
            loss = loops.mean_objective(self.model, FORGET, cross_entropy).item()
        return measured_kl(self.model, self.batches, update), loss

    def slopes(self, direction, length: float) -> tuple[float, float]:
        """Change of both per unit of length, by central differences."""
        (k1, f1), (k0, f0) = (self.measure(direction, s * length) for s in (1, -1))
        return (k1 - k0) / (2 * length), (f1 - f0) / (2 * length)


@pytest.fixture(scope="module")
def edited() -> Edited:
    return Edited()


# --- The gradient of the KL ---------------------------------------------------------------------


def looped_kl_gradient(edited: Edited, sign: float = 1.0, base_too: bool = True):
    """By autograd through every sequence's own logits; without the base, p₀ is uniform."""
    kls, before = [], []
    with torch.no_grad():
        for sequence in RETAIN:
            before.append(loops.sequence_logits(edited.model, sequence).log_softmax(-1))
    with edited.update.applied_to(edited.model):
        for sequence, log_p in zip(RETAIN, before, strict=True):
            log_p = log_p if base_too else torch.zeros_like(log_p).log_softmax(-1)
            log_q = loops.sequence_logits(edited.model, sequence).log_softmax(-1)
            kl_T = (log_p.exp() * (log_p - log_q)).sum(-1)
            kls += [kl_T[t] for t in loops.loss_positions(sequence)]
        mean = sign * torch.stack(kls).mean()
        return mean.item(), loops.weight_gradients(mean, edited.model, edited.targets)


def test_gradient_of_the_kl_is_autograds(edited):
    value, looped = looped_kl_gradient(edited)
    assert value == pytest.approx(measured_kl(edited.model, edited.batches, edited.update))
    assert value > 0.01  # there is a KL
    for name in looped:
        assert relative_error(edited.kl[name], looped[name]) < 1e-10  # another order of sums
    for wrong in ({"sign": -1.0}, {"base_too": False}):
        _, other = looped_kl_gradient(edited, **wrong)
        for name in looped:
            assert relative_error(edited.kl[name], other[name]) > 0.1


def test_gradient_of_the_kl_is_zero_at_the_original_weights(edited):
    """A theorem: K has its minimum there. To the bit, since p − p₀ is."""
    at_base = kl_gradient(edited.model, edited.base, edited.targets)
    assert all(not at_base[name].any() for name in at_base)
    assert all(edited.kl[name].any() for name in at_base)


def test_gradient_of_the_kl_is_the_same_recomputed_and_elsewhere(edited, tmp_path):
    storage = OnDisk(tmp_path, memory=2000)  # a few groups of layers, each with a pass
    base = hidden_reference(edited.model, edited.batches, "base", storage)
    before = Snapshot.of(edited.model)
    with edited.update.applied_to(edited.model):
        for options in ({"recompute": True}, {"storage": storage}):
            again = kl_gradient(edited.model, base, edited.targets, **options)
            assert all(same_bits(again[name], edited.kl[name]) for name in edited.kl)
    assert before.differences(edited.model) == []


# --- The direction ------------------------------------------------------------------------------


def exact_curvature(G: torch.Tensor) -> Curvature:
    """A dense G as the curvature of one layer "all" of shape [1, P]."""
    values, basis = torch.linalg.eigh(G)
    return Curvature({"all": EigenBlock(None, basis, values[None])})


NONE = Damping(0.0, relative=False)


def test_with_the_exact_matrix_the_corrected_point_is_the_constrained_optimum():
    """On K = ½(θ − θ₀)ᵀG(θ − θ₀): least K among all θ with the forget loss g_Fᵀθ of θ_s."""
    jacobian = randn(40, 12)
    G, g_F, theta = jacobian.T @ jacobian / 40, randn(12, seed=1), randn(12, seed=2)
    nearest = torch.linalg.solve(G, g_F)
    optimum = nearest * (g_F @ theta) / (g_F @ nearest)
    curvature, g_K = exact_curvature(G), G @ theta

    def corrected(damping: Damping = NONE, sign: float = 1.0, projected: bool = True):
        up = ascent(curvature, {"all": g_F[None]}, damping)
        up = up if projected else Ascent(up.direction, 0.0)
        down = descent(curvature, {"all": sign * g_K[None]}, up, damping)
        return theta + down.direction["all"][0]

    def off(point) -> float:
        return relative_error(point, optimum)

    assert off(theta) > 0.1  # there is something to correct
    assert off(corrected()) < 1e-10  # the condition of G is below 100
    # KKT: the gradient of K is a multiple of that of the constraint, which is met.
    point = corrected()
    gradient = G @ point
    multiplier = (gradient @ g_F) / (g_F @ g_F)
    assert (gradient - multiplier * g_F).norm() < 1e-10 * g_K.norm()
    assert g_F @ point == pytest.approx(float(g_F @ theta))
    # Without the projection it is θ₀, where nothing is forgotten.
    assert corrected(projected=False).norm() < 1e-10
    assert off(corrected(sign=-1.0)) > off(theta)
    # A damping shortens the correction and turns it.
    assert 1e-3 < off(corrected(Damping(1.0))) < off(theta)
    # A step along r by the same matrix is the optimum already.
    up = ascent(curvature, {"all": g_F[None]}, NONE)
    still = descent(curvature, {"all": (G @ optimum)[None]}, up, NONE)
    assert still.direction["all"].norm() < 1e-10 * optimum.norm()


@pytest.mark.parametrize("damping", [Damping(1.0), Damping(0.01, relative=False)])
def test_direction_solves_the_damped_problem_over_all_layers(edited, damping):
    """(G̃ + λI) d⊥ + g_K − c g_F = 0 and g_Fᵀd⊥ = 0, with one c for all layers."""
    up = ascent(edited.curvature, edited.forget, damping)
    down = descent(edited.curvature, edited.kl, up, damping)
    applied = edited.curvature.matvec(down.direction)
    c = down.ascent_slope / up.slope
    for name, block in edited.curvature.blocks.items():
        ridge = damping.of(block.mean_eigenvalue)
        left = applied[name] + ridge * down.direction[name] + edited.kl[name]
        assert relative_error(left, c * edited.forget[name]) < 1e-8  # condition of G̃ + λI
        assert relative_error(left, 0.9 * c * edited.forget[name]) > 0.05
    size = math.sqrt(inner(edited.forget, edited.forget) * inner(down.direction, down.direction))
    assert abs(inner(edited.forget, down.direction)) < 1e-10 * size
    assert down.slope < 0 < up.slope
    plain = edited.curvature.solve(edited.kl, damping)
    assert abs(inner(edited.forget, plain)) > 1e-3 * size


def test_a_correction_lowers_the_kl_and_keeps_the_forgetting_to_first_order(edited):
    damping = Damping(1.0)
    up = ascent(edited.curvature, edited.forget, damping)
    down = descent(edited.curvature, edited.kl, up, damping)
    unprojected = {n: -x for n, x in edited.curvature.solve(edited.kl, damping).items()}
    of_kl, of_loss = edited.slopes(down.direction, 1e-4)
    # Central differences err by t² and by rounding, 1e-16 / t: both near 1e-8.
    assert of_kl == pytest.approx(down.slope, rel=1e-4)
    steepest = abs(inner(edited.forget, unprojected))
    assert abs(of_loss) < 1e-4 * steepest
    _, without = edited.slopes(unprojected, 1e-4)
    assert abs(without) == pytest.approx(steepest, rel=1e-4)
    assert edited.slopes(up.direction, 1e-4) == pytest.approx(
        (down.ascent_slope, up.slope), rel=1e-4
    )
    before, _ = edited.measure(down.direction, 0.0)
    assert edited.measure(down.direction, 1e-3)[0] < before
    assert edited.measure(down.direction, -1e-3)[0] > before  # the sign flipped


def test_nothing_to_correct_gives_no_direction(edited):
    zero = {name: torch.zeros_like(x) for name, x in edited.kl.items()}
    up = ascent(edited.curvature, edited.forget, Damping(1.0))
    down = descent(edited.curvature, zero, up, Damping(1.0))
    assert (down.slope, inner(down.direction, down.direction)) == (0.0, 0.0)


# --- The length ---------------------------------------------------------------------------------

ENDS = ("before", "after")
BEFORE = Probe(0.0, retain_kl=1.0, forget_loss=3.0, forget_probability=0.1, objective=0.0)
FIRST = replace(BEFORE, retain_kl=0.0, forget_loss=1.0)
BY_LOSS = Merit(StepSize(until=3.0), FIRST, BEFORE)


def lengths(kl, first: float, loss=lambda t: 3.0) -> tuple[float, int]:
    """(length taken, number of trials)."""
    tried = []

    def measure(t: float) -> Probe:
        tried.append(t)
        return replace(BEFORE, alpha=t, retain_kl=kl(t), forget_loss=loss(t))

    return best_length(measure, first, BEFORE, BY_LOSS).alpha, len(tried)


def test_the_length_is_doubled_or_halved_while_that_is_better():
    def bowl(t: float) -> float:
        return 1 - 0.8 * t + 0.4 * t**2  # least at 1

    assert lengths(bowl, 1.0) == (1.0, 3)
    assert lengths(bowl, 0.3) == (1.2, 4)
    assert lengths(bowl, 3.5) == (0.875, 4)
    assert lengths(lambda t: 1 + t, 1.0) == (0.0, 6)  # nothing is better than nothing
    assert lengths(lambda t: math.nan if t > 0.1 else bowl(t), 1.0)[0] == 1 / 16
    # A fall of the forget loss beyond the tolerance of 3 % of its rise of 2.
    assert lengths(bowl, 1.0, lambda t: 3 - 0.1 * t)[0] == 0.5


def test_merit_compares_at_equal_forgetting():
    """Shrinking a step lowers K ∝ (rise)², which must not count as a gain."""
    shorter = replace(BEFORE, retain_kl=0.98**2, forget_loss=1 + 2 * 0.98)
    assert BY_LOSS(shorter) == pytest.approx(BY_LOSS(BEFORE)) == pytest.approx(1.0)
    assert BY_LOSS(replace(BEFORE, forget_loss=1 + 2 * 0.96)) == math.inf
    assert BY_LOSS(replace(BEFORE, retain_kl=0.5)) == 0.5
    by_probability = replace(BY_LOSS, size=StepSize(until_probability=0.05))
    assert by_probability(replace(BEFORE, forget_loss=0.0)) == math.inf  # FIRST has the same
    unmoved = replace(BY_LOSS, first=BEFORE)
    assert unmoved(BEFORE) == math.inf


@pytest.mark.parametrize(
    ("size", "lacks"),
    [
        (StepSize(kl=1.05), 0.0),
        (StepSize(kl=1.2), 0.2),
        (StepSize(kl=0.8), -0.2),
        (StepSize(until=3.05), 0.0),
        (StepSize(until=3.2), 0.2),
        (StepSize(until=2.5), -0.5),
        (StepSize(until_probability=math.exp(-3)), 3 - math.log(10)),
        (StepSize(alpha=9.0), 0.0),
    ],
    ids=str,
)
def test_what_a_step_lacks_of_its_size(size, lacks):
    first = replace(FIRST, forget_probability=1.0)
    assert shortfall(size, first, BEFORE) == pytest.approx(lacks)


def test_what_one_step_lacks_is_counted_from_no_kl_at_all():
    """The step ended a little above its KL; a correction then left room below it."""
    step = {f"forget_{what}_{when}": 0.5 for what in ("loss", "probability") for when in ENDS}
    first, now = ends_of([{**step, "retain_kl": 1.05}])
    assert (first.retain_kl, now.retain_kl) == (0.0, 1.05)
    assert shortfall(StepSize(kl=1.0), first, replace(now, retain_kl=0.8)) == pytest.approx(0.2)


# --- A run --------------------------------------------------------------------------------------


def run(model, **changes) -> Update:
    data = {
        "forget": random_sequences(4, seed=7),
        "retain": random_sequences(40),
        "held_out": random_sequences(20, seed=1),
    }
    options = {"batch_tokens": 80, "refit": False, **changes}
    return kfade.unlearn(model, **data, **flat(**options))


def last(update: Update) -> dict:
    return update.provenance["steps"][-1]


def test_a_run_that_is_corrected_has_less_kl_at_equal_forgetting(model):
    before = Snapshot.of(model)
    plain, corrected = (run(model, until=3.6, correction=Correction(count=n)) for n in (0, 2))
    assert before.differences(model) == []
    first, second = last(corrected)["corrections"]
    assert last(plain)["corrections"] == []
    assert first["accepted"]
    assert second["accepted"]
    # Each begins where the one before ended, the first at the end of the run without.
    for name in ("retain_kl", "forget_loss", "forget_probability"):
        end = name if name == "retain_kl" else f"{name}_after"
        assert first[f"{name}_before"] == last(plain)[end]
        assert second[f"{name}_before"] == first[f"{name}_after"]
        assert second[f"{name}_after"] == last(corrected)[end]
    assert last(corrected)["retain_kl"] < 0.85 * last(plain)["retain_kl"]
    rise = last(plain)["forget_loss_after"] - last(plain)["forget_loss_before"]
    assert last(corrected)["forget_loss_after"] - last(plain)["forget_loss_after"] > -0.03 * rise
    # Measured by itself, on what the run held out.
    batches = make_batches(random_sequences(20, seed=1), budget=80)
    kl = measured_kl(model, batches, corrected)
    assert kl == pytest.approx(last(corrected)["retain_kl"], rel=1e-6)
    # The step itself is that of the run without.
    for name in ("alpha", "measured_kl", "exact_kl", "probes"):
        assert last(corrected)[name] == last(plain)[name]


def test_a_kl_that_was_asked_for_is_spent_on_forgetting(model):
    plain, corrected = (run(model, kl=0.05, correction=Correction(count=n)) for n in (0, 1))
    [correction] = last(corrected)["corrections"]
    assert correction["forget_length"] > 0
    assert last(corrected)["retain_kl"] == pytest.approx(0.05, rel=0.1)
    merits = [
        (last(u)["forget_loss_after"] - last(u)["forget_loss_before"]) / last(u)["retain_kl"] ** 0.5
        for u in (plain, corrected)
    ]
    assert merits[1] > 1.03 * merits[0]


def test_a_forgetting_target_is_met_after_a_correction(model, monkeypatch):
    """Here the correction alone would leave the probability a little too high."""
    monkeypatch.setattr("kfade.method.size.LOSS_TOLERANCE", 1e-3)
    update = run(model, until_probability=0.02, correction=Correction(count=1))
    [correction] = last(update)["corrections"]
    assert correction["forget_length"] > 0
    way = math.log(last(update)["forget_probability_before"] / 0.02)
    assert abs(math.log(last(update)["forget_probability_after"] / 0.02)) < 1e-3 * way
    [taken] = [p for p in correction["probes"] if p["alpha"] == correction["length"]]
    start = math.log(last(update)["forget_probability_before"])
    assert start - math.log(taken["forget_probability"]) < 0.999 * way


def test_a_correction_leaves_the_probability_that_is_the_target(model, monkeypatch):
    """d⊥ is orthogonal to the gradient of −log of the mean probability, not to that of the loss."""
    found, real = [], descent

    def noting(*given):
        found.append(real(*given))
        return found[0]

    monkeypatch.setattr("kfade.method.correct.descent", noting)
    run(model, until_probability=0.02, correction=Correction(count=1))
    down = dict(found[0].direction)
    before = run(model, until_probability=0.02)
    batches, targets = make_batches(random_sequences(4, seed=7), budget=80), find_targets(model)
    with before.applied_to(model):
        weighed, plain = (
            forget_gradient(model, batches, targets, cross_entropy, weigh=weigh)
            for weigh in (True, False)
        )
    sizes = [inner(g, g) ** 0.5 * inner(down, down) ** 0.5 for g in (weighed, plain)]
    # 1e-8: differences of sums in float64, of a direction from a solve.
    assert abs(inner(weighed, down)) < 1e-8 * sizes[0]
    assert abs(inner(plain, down)) > 1e-3 * sizes[1]


def test_a_correction_that_goes_beyond_the_size_goes_back(model, monkeypatch):
    """A direction that also forgets, as d⊥ does far from where it is computed."""
    real = descent

    def forgetting(curvature, kl, up, *rest):
        down = real(curvature, kl, up, *rest)
        more = 0.3 * abs(down.slope / down.ascent_slope)  # the KL still falls
        direction = {n: down.direction[n] + more * up.direction[n] for n in down.direction}
        return replace(down, direction=direction)

    monkeypatch.setattr("kfade.method.correct.descent", forgetting)
    monkeypatch.setattr("kfade.method.size.LOSS_TOLERANCE", 1e-3)
    update = run(model, until=3.8, correction=Correction(count=1))
    [correction] = last(update)["corrections"]
    assert correction["accepted"]
    assert correction["forget_length"] < 0
    [taken] = [p for p in correction["probes"] if p["alpha"] == correction["length"]]
    rise = 3.8 - last(update)["forget_loss_before"]
    assert last(update)["forget_loss_after"] == pytest.approx(3.8, abs=1e-3 * rise)
    assert taken["forget_loss"] > 3.8 + 1e-3 * rise


def test_a_size_by_alpha_is_not_searched_again(model):
    update = run(model, alpha=0.2, correction=Correction(count=1))
    [correction] = last(update)["corrections"]
    assert correction["accepted"]
    assert (correction["forget_length"], last(update)["alpha"]) == (0.0, 0.2)
    assert last(update)["retain_kl"] < 0.9 * correction["retain_kl_before"]


def test_a_cap_holds_after_a_correction(model):
    update = run(model, kl=0.02, max_kl=0.008, correction=Correction(count=1))
    assert last(update)["corrections"][0]["accepted"]
    assert 0.007 < last(update)["retain_kl"] <= 0.008


@pytest.mark.parametrize("error", [NoRiseError, InputError])
def test_a_kl_that_cannot_be_spent_is_saved(model, monkeypatch, error):
    """A correction lowers the KL; what is left of it is spent only where that forgets more."""
    options = {"kl": 0.01, "correction": Correction(count=1)}
    [spent] = last(run(model, **options))["corrections"]

    def fails(*_, **__):
        raise error

    monkeypatch.setattr("kfade.method.correct.choose_alpha", fails)
    saved = run(model, **options)
    [correction] = last(saved)["corrections"]
    assert correction["accepted"]
    assert spent["accepted"]
    assert correction["forget_length"] == 0.0 != spent["forget_length"]
    assert last(saved)["retain_kl"] == correction["retain_kl_after"] < spent["retain_kl_after"]
    assert correction["retain_kl_after"] < 0.9 * correction["retain_kl_before"]


def test_a_kl_that_is_far_away_is_not_spent_at_any_price():
    """This run ends where most is forgotten, far short of its KL. To spend the rest forgets more,
    but for much more KL than that is worth: the correction stays without."""
    sets = {
        "forget": random_sequences(4, seed=7),
        "retain": random_sequences(6, seed=8),
        "held_out": random_sequences(3, seed=9),
    }
    options = {"kl": 1.0, "objective": cross_entropy, "steps": 2, "refit": False}
    model = tiny_llama()
    (first, plain), (_, corrected) = (
        kfade.unlearn(model, **sets, **flat(**options, correction=Correction(count=n))).provenance[
            "steps"
        ]
        for n in (0, 1)
    )
    [correction] = corrected["corrections"]
    assert plain["retain_kl"] < 0.6
    assert correction["accepted"]
    assert corrected["retain_kl"] < 0.95 * plain["retain_kl"]
    rise, left = (s["forget_loss_after"] - first["forget_loss_before"] for s in (plain, corrected))
    assert left > 0.97 * rise  # 3 % may be lost


@pytest.mark.parametrize("size", [{"kl": 0.01}, {"alpha": 0.1}], ids=str)
def test_a_correction_that_gains_too_little_is_dropped(model, size):
    plain = run(model, **size)
    dropped = run(model, **size, correction=Correction(count=2, least_gain=0.9))
    [correction] = last(dropped)["corrections"]  # no second one
    assert not correction["accepted"]
    assert {**last(dropped), "corrections": []} == last(plain)
    assert all(same_bits(d, dropped.deltas[name]) for name, d in plain.deltas.items())


def test_the_search_along_r_counts_from_where_it_begins():
    """A measure that is linear from an offset takes few trials; as a power of α it takes more."""
    size = StepSize(kl=0.02)

    def trials(**options) -> int:
        def probe(alpha: float) -> Probe:
            return replace(BEFORE, alpha=alpha, retain_kl=0.015 + alpha)

        return len(choose_alpha(probe, size, share=1.0, guess=1e-4, **options))

    assert trials(start=replace(BEFORE, retain_kl=0.015)) == 3
    assert trials(start=FIRST) > 3


def test_the_search_along_r_goes_back_where_it_begins_beyond_the_target():
    def probe(alpha: float) -> Probe:
        return replace(BEFORE, alpha=-alpha, retain_kl=0.03 - alpha)

    origin = replace(BEFORE, retain_kl=0.03)
    options = {"share": 1.0, "guess": 1e-3, "start": origin}
    *_, found = choose_alpha(probe, StepSize(kl=0.02), **options)
    assert found.retain_kl == pytest.approx(0.02, rel=0.1)
    with pytest.raises(InputError):  # onward the KL only grows
        choose_alpha(
            lambda alpha: replace(BEFORE, retain_kl=0.03 + alpha), StepSize(kl=0.02), **options
        )


def test_each_correction_draws_other_retain_sequences(model, monkeypatch):
    drawn = []
    real = Sampler.draw

    def draw(self, sequences, count, step=0, *noise):
        if count == 10:
            drawn.append(step)
        return real(self, sequences, count, step, *noise)

    monkeypatch.setattr(Sampler, "draw", draw)
    run(model, alpha=0.1, steps=2, correction=Correction(count=2, sequences=10))
    assert drawn == [0, 1]


def test_only_the_last_step_is_corrected(model):
    update = run(model, until=3.8, steps=2, correction=Correction(count=1, sequences=10))
    first, second = update.provenance["steps"]
    assert first["corrections"] == []
    assert second["corrections"][0]["accepted"]
    assert second["probes"][-1]["retain_kl"] == second["corrections"][0]["retain_kl_before"]


def test_a_run_that_reaches_its_target_early_is_corrected_there(model, monkeypatch):
    """Half of the way within its tolerance of half is all of it."""
    monkeypatch.setattr("kfade.method.trial.choose_alpha", far := Far())
    kept = []
    options = {"until": 3.8, "steps": 3, "correction": Correction(count=1)}
    update = run(model, on_step=kept.append, **options)
    assert far.shares == [1 / 3]
    assert len(update.provenance["steps"]) == len(kept) == 1
    assert last(update)["corrections"][0]["accepted"]
    again = run(model, start=kept[0], **options)  # nothing is left to do
    assert all(same_bits(d, again.deltas[name]) for name, d in update.deltas.items())


class Far:
    """A search for a step's size that goes all the way at once."""

    def __init__(self) -> None:
        self.shares: list[float] = []

    def __call__(self, probe, size, *, share, **options):
        self.shares.append(share)
        return choose_alpha(probe, size, share=1.0, **options)


def test_an_interrupted_run_is_continued_to_the_same_update(model):
    options = {"kl": 0.01, "steps": 2, "correction": Correction(count=1, sequences=30)}
    kept: list[Update] = []
    whole = run(model, on_step=kept.append, **options)
    again = run(model, start=kept[0], **options)
    assert all(same_bits(d, again.deltas[name]) for name, d in whole.deltas.items())
    assert last(kept[0])["corrections"] == []
    assert last(whole)["corrections"][0]["accepted"]
    elsewhere = run(model, start=kept[0], **{**options, "correction": Correction(count=0)})
    assert not all(same_bits(d, elsewhere.deltas[name]) for name, d in whole.deltas.items())
    # Every number of the record survives as JSON.
    assert json.loads(json.dumps(whole.provenance)) == whole.provenance


def test_a_correction_is_the_same_with_vectors_on_disk(model, tmp_path):
    options = {"kl": 0.01, "correction": Correction(count=1)}
    plain, stored = (run(model, **options, **more) for more in ({}, {"storage": OnDisk(tmp_path)}))
    assert all(same_bits(d, stored.deltas[name]) for name, d in plain.deltas.items())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(Correction, count=-1), "--correct -1: give 0 or more"),
        (partial(Correction, sequences=0), "--correct-sequences 0: give 1 or more"),
        (partial(Correction, least_gain=1.0), "least_gain 1.0: give a number from 0 to below 1"),
    ],
)
def test_settings_of_a_correction_check_themselves(make, message):
    with pytest.raises(InputError, match=message):
        make()
    assert make.func() == Correction(1, Damping(100.0), None, cross_entropy, 0.01)


# --- The command line ---------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path) -> list[str]:
    zoo.save(tmp_path / "model")
    arguments = ["unlearn", str(tmp_path / "model"), "--sequence-length", "8"]
    for name, rows in (("forget", FORGET_ROWS), ("retain", RETAIN_ROWS)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        arguments += [f"--{name}", str(path)]
    return [*arguments, "--kl", "0.01", "--holdout", "3"]


def deltas(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "update.safetensors")


def test_a_corrected_run_is_told_and_replayed(command, tmp_path, capsys):
    out, again = tmp_path / "out", tmp_path / "again"
    more = [
        "--steps",
        "1",
        "--correct",
        "2",
        "--correct-damping",
        "0.5",
        "--correct-sequences",
        "9",
    ]
    assert main([*command, *more, "--out", str(out), "--json"]) == 0
    output = capsys.readouterr()
    metrics = json.loads(output.out)
    [step] = metrics["steps"]
    first = step["corrections"][0]
    said = " ".join(output.err.split())
    assert f"retain KL {first['retain_kl_before']:.2e} -> {first['retain_kl_after']:.2e}" in said
    # The step's own line is of before.
    assert f"retain KL {first['retain_kl_before']:.2e} nats/token (this step" in said
    assert ("dropped" in said) == any(not c["accepted"] for c in step["corrections"])
    assert metrics["retain_kl"] == step["retain_kl"]
    assert metrics["seconds"]["correct"] >= sum(c["seconds"] for c in step["corrections"]) > 0
    logged = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["corrections"] for row in logged if "corrections" in row] == [step["corrections"]]
    config = ["--config", str(out / "config.yaml")]
    assert main([*command, *config, "--out", str(again)]) == 0
    assert all(torch.equal(d, deltas(again)[name]) for name, d in deltas(out).items())


def test_a_run_that_is_killed_in_a_correction_repeats_the_step(command, tmp_path, monkeypatch):
    more = [*command, "--steps", "2", "--correct", "1"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert main([*more, "--out", str(whole)]) == 0
    calls = []

    def killed(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return kl_gradient(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr("kfade.method.correct.kl_gradient", killed)
        assert main([*more, "--out", str(out)]) == 130
    assert len(list((tmp_path / "out.part").rglob("update-*.safetensors"))) == 1
    assert main([*more, "--correct", "2", "--out", str(out), "--resume"]) == 2
    assert main([*more, "--out", str(out), "--resume"]) == 0
    assert all(torch.equal(d, deltas(out)[name]) for name, d in deltas(whole).items())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--correct", "-1"), "--correct -1: give 0 or more"),
        (("--correct-sequences", "0"), "--correct-sequences 0: give 1 or more"),
        (("--correct-damping", "-1"), "--correct-damping -1.0: give a finite number, 0 or more"),
        (("--correct-damping", "nan"), "--correct-damping nan: give a finite number, 0 or more"),
    ],
)
def test_bad_options(command, tmp_path, capsys, more, message):
    assert main([*command, *more, "--out", str(tmp_path / "out")]) == 2
    assert f"kfade: {message}" in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.glob("out*"))
