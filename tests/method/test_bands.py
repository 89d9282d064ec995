"""Bands of layers in a direction: the best combination, and what a run makes of it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers import flat, same_bits, small_sets, tiny_llama

import kfade
from kfade import KFAC, Damping, make_batches, margin
from kfade.curvature.product import gram_matrix, quadratic_form
from kfade.method.bands import bands_of, best_weights, in_bands
from kfade.method.gradient import forget_gradient
from kfade.method.refine import inner
from kfade.method.step import Step, gauss_newton_step
from kfade.models.layers import find_targets

SETS = small_sets()


def definite(size: int, seed: int = 0) -> torch.Tensor:
    """A random positive definite matrix whose layers act on one another."""
    factor = torch.randn(size, size, generator=torch.Generator().manual_seed(seed)).double()
    return factor @ factor.T + 0.1 * torch.eye(size, dtype=torch.float64)


def merit(weights: torch.Tensor, gram: torch.Tensor, slopes: torch.Tensor) -> float:
    return float((weights @ slopes) ** 2 / (weights @ gram @ weights))


def test_no_other_weights_have_a_greater_merit(monkeypatch):
    """(cᵀs)² / cᵀCc ≤ sᵀC⁻¹s, with equality for c ∝ C⁻¹s (Cauchy-Schwarz)."""
    gram, slopes = definite(4), torch.tensor([1.0, 0.5, -0.2, 2.0], dtype=torch.float64)
    ridged = merit(best_weights(gram, slopes), gram, slopes)
    monkeypatch.setattr("kfade.method.bands.RIDGE", 0.0)
    best = merit(best_weights(gram, slopes), gram, slopes)
    # 1e-12: rounding in float64 of a solve of order 4.
    assert best == pytest.approx(float(slopes @ torch.linalg.solve(gram, slopes)), rel=1e-12)
    others = torch.randn(100, 4, generator=torch.Generator().manual_seed(1)).double()
    assert all(merit(weights, gram, slopes) < best for weights in others)
    # The matrix without what is between the bands, which is what K-FAC knows, does worse.
    alone = slopes / gram.diagonal()
    assert merit(alone, gram, slopes) < 0.9 * best
    assert 0.9 * best < ridged <= best


def test_weights_do_not_depend_on_the_lengths_of_the_parts():
    """Σ c_j r_j is the same for parts of other lengths, signs included; a dead band gets 0."""
    gram, slopes = definite(3), torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    lengths = torch.tensor([1e-6, -1.0, 1e5], dtype=torch.float64)
    other = best_weights(lengths[:, None] * gram * lengths, lengths * slopes) * lengths
    assert torch.allclose(other, best_weights(gram, slopes), rtol=1e-9)  # float64, 1e11 apart
    dead = torch.zeros(4, 4, dtype=torch.float64)
    dead[:3, :3] = gram
    weights = best_weights(dead, torch.cat([slopes, slopes.new_zeros(1)]))
    assert torch.allclose(weights[:3], best_weights(gram, slopes), rtol=1e-12)
    assert weights[3] == 0


def test_an_exact_solution_stays_as_it_is(monkeypatch):
    """r = G⁻¹g with the whole G: C 1 = s, so all weights are the same. Not so of its blocks'."""
    monkeypatch.setattr("kfade.method.bands.RIDGE", 0.0)
    matrix, gradient = definite(6), torch.arange(1.0, 7.0).double()
    targets = [SimpleNamespace(name=f"w{block}", block=block) for block in range(3)]
    parts = {target.name: slice(2 * i, 2 * i + 2) for i, target in enumerate(targets)}

    def step_of(solution: torch.Tensor) -> Step:
        direction = {name: solution[part] for name, part in parts.items()}
        slopes = {name: float(gradient[part] @ solution[part]) for name, part in parts.items()}
        return Step(direction, slopes, dict.fromkeys(parts, 1.0))

    def weights(step: Step) -> torch.Tensor:
        def forms(vectors):
            whole = torch.zeros(len(vectors), 6, dtype=torch.float64)
            for row, vector in zip(whole, vectors, strict=True):
                for name in vector:
                    row[parts[name]] = vector[name]
            return whole @ matrix @ whole.T

        found, _ = in_bands(step, targets, 3, forms)
        return torch.tensor([found.slopes[n] / step.slopes[n] for n in parts]).double()

    spread = weights(step_of(torch.linalg.solve(matrix, gradient)))
    # 1e-12: rounding in float64 of solves of orders 6 and 3.
    assert (spread / spread.mean() - 1).abs().max() < 1e-12
    blocks = torch.block_diag(*(matrix[part, part] for part in parts.values()))
    spread = weights(step_of(torch.linalg.solve(blocks, gradient)))
    assert (spread / spread.mean() - 1).abs().max() > 0.1


def test_bands_are_of_consecutive_blocks():
    targets = [SimpleNamespace(name=f"{b}.{kind}", block=b) for b in range(5) for kind in "ab"]
    names = {target.name for target in targets} - {"0.a", "3.a", "3.b"}  # 4 blocks are left
    assert bands_of(targets, names, 2) == [["0.b", "1.a", "1.b"], ["2.a", "2.b", "4.a", "4.b"]]
    assert bands_of(targets, names, 3) == [["0.b", "1.a", "1.b"], ["2.a", "2.b"], ["4.a", "4.b"]]
    assert [len(band) for band in bands_of(targets, names, 9)] == [1, 2, 2, 2]
    assert bands_of(targets, names, 1) == [sorted(names)]


def test_a_model_is_changed_less_at_equal_forgetting():
    model = tiny_llama()
    targets = find_targets(model)
    gradient = forget_gradient(model, make_batches(SETS["forget"]), targets, margin)
    curvature = KFAC().fit(model, make_batches(SETS["retain"]), targets)
    held_out = make_batches(SETS["held_out"])
    plain = gauss_newton_step(curvature, gradient, Damping(0.1))
    step, exact = in_bands(plain, targets, 2, lambda v: gram_matrix(model, held_out, targets, v))
    direction = {name: step.direction[name] for name in step.direction}
    # 1e-9: sums in float64, in another order.
    form = quadratic_form(model, held_out, targets, direction)
    assert exact == pytest.approx(form, rel=1e-9)
    assert step.slope == pytest.approx(inner(gradient, direction), rel=1e-9)
    assert step.square == pytest.approx(1.0, rel=1e-9)
    assert curvature.quadratic(direction) == pytest.approx(1.0, rel=1e-9)
    before = plain.slope**2 / quadratic_form(model, held_out, targets, plain.direction)
    assert step.slope**2 / exact > 1.001 * before
    same, form = in_bands(plain, targets, 1, lambda v: gram_matrix(model, held_out, targets, v))
    assert same is plain
    assert form == quadratic_form(model, held_out, targets, plain.direction)


def test_rises_that_are_measured_take_the_place_of_slopes():
    """Weights are C⁻¹ times what ``rise`` says. A step of which no part raises anything stays: C⁻¹s
    would reverse it."""
    gram = definite(2)
    targets = [SimpleNamespace(name=name, block=i) for i, name in enumerate("ab")]
    direction = {name: torch.ones(1) for name in "ab"}
    step = Step(direction, {"a": 2.0, "b": 3.0}, {"a": 0.5, "b": 0.5})
    seen = []

    def rise(part, form):
        seen.append((list(part), form))
        return {"a": 5.0, "b": -1.0}[next(iter(part))]

    found, exact = in_bands(step, targets, 2, lambda vectors: gram, rise)
    assert seen == [(["a"], gram[0, 0]), (["b"], gram[1, 1])]
    best = best_weights(gram, torch.tensor([5.0, -1.0], dtype=torch.float64))
    weights = torch.tensor([found.slopes["a"] / 2, found.slopes["b"] / 3], dtype=torch.float64)
    assert torch.allclose(weights / weights[0], best / best[0])
    assert exact == pytest.approx(float(weights @ gram @ weights))
    dead = torch.zeros(2, 2, dtype=torch.float64)
    assert in_bands(step, targets, 2, lambda vectors: dead) == (step, 0.0)
    for nothing in (0.0, -1.0, float("nan")):
        same, form = in_bands(step, targets, 2, lambda vectors: gram, lambda *_, n=nothing: n)
        assert same is step
        assert form == pytest.approx(float(gram.sum()))


def updated(**options) -> dict[str, torch.Tensor]:
    model = tiny_llama()
    options = {"fit": KFAC(), "damping": 0.1, **options}
    deltas = kfade.unlearn(model, **SETS, **flat(**options)).deltas
    return {name: deltas[name] for name in deltas}


@pytest.mark.parametrize(("size", "same"), [({"alpha": 0.01}, 1), ({"kl": 1e-3}, 3)])
def test_a_run_has_bands_unless_the_length_of_the_papers_direction_is_given(size, same):
    unset = updated(**size, bands=None)
    for bands in (1, 3):
        given = updated(**size, bands=bands)
        alike = all(same_bits(given[name], unset[name]) for name in unset)
        assert alike == (bands == same)


def test_no_band_is_an_error():
    with pytest.raises(kfade.InputError, match="--bands 0: give 1 or more"):
        kfade.Direction(bands=0)
