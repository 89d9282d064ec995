"""A sharpness-aware step against one worked out by autograd from the model's own logits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from baselines_worker import FORGET, HELD_OUT, RETAIN, dense, difference, lora, run, settings
from helpers import Snapshot, tiny_llama
from slow_terms import slow_nll

from kfade.baselines import losses, methods
from kfade.baselines.loop import train
from kfade.baselines.training import _draw
from kfade.errors import InputError
from kfade.method.update import Update

BETA, RADIUS, RATE = 0.3, 0.2, 0.1
# Two batches of three sequences make a step: all of them.
SETS = {"forget": FORGET[:6], "retain": RETAIN[:6], "held_out": HELD_OUT}
PLAIN = settings(
    **{"lr": RATE, "steps": 1, "warm_up": 0, "decay": False, "weight_decay": 0.0},
    optimizer=torch.optim.SGD,
)
TRAINABLE = {"dense": dense, "low rank": lambda model: lora(model, dropout=0.0)}


def npo_sam(radius: float = RADIUS) -> tuple[losses.Term, ...]:
    return methods.npo_sam(beta=BETA, sam_radius=radius).terms


def step(model, trainable, terms, **other) -> Update:
    return train(model, terms, trainable, SETS, replace(PLAIN, **other))


def forget_loss(model, base_nll) -> torch.Tensor:
    ratios = [base - slow_nll(model, s) for base, s in zip(base_nll, SETS["forget"], strict=True)]
    return sum((2 / BETA) * torch.log(1 + torch.exp(BETA * r)) for r in ratios) / len(ratios)


def retain_loss(model) -> torch.Tensor:
    """The mean over two batches of their cross-entropies per token."""
    batches = [[SETS["retain"][i] for i in one["retain"]] for one in _draw(SETS, PLAIN, 0)]
    means = [sum(slow_nll(model, s) for s in b) / sum(s.loss_tokens for s in b) for b in batches]
    return sum(means) / len(means)


def slow_step(model, trainable, radius: float, *, all_uphill: bool = False) -> Update:
    """θ ← θ − η (∇f(θ + ρ ∇f(θ)/‖∇f(θ)‖) + ∇r(θ)); with ``all_uphill`` also ∇r is taken there."""
    base_nll = [slow_nll(model, s).detach() for s in SETS["forget"]]
    with trainable.training():
        # In float64 the parameters are their own masters.
        tensors = list(trainable.parameters.values())
        start = [tensor.detach().clone() for tensor in tensors]

        def slopes(value: torch.Tensor) -> list[torch.Tensor]:
            return list(torch.autograd.grad(value, tensors, materialize_grads=True))

        def go(by: list[torch.Tensor], size: float) -> None:
            with torch.no_grad():
                for tensor, origin, direction in zip(tensors, start, by, strict=True):
                    tensor.copy_(origin + size * direction)

        uphill = slopes(forget_loss(model, base_nll))
        go(uphill, radius / sum(g.square().sum() for g in uphill).sqrt().item())
        forget = slopes(forget_loss(model, base_nll))
        if all_uphill:
            retain = slopes(retain_loss(model))
        go(uphill, 0.0)
        if not all_uphill:
            retain = slopes(retain_loss(model))
        go([f + r for f, r in zip(forget, retain, strict=True)], -RATE)
        return Update(dict(trainable.deltas()))


@pytest.mark.parametrize("make", TRAINABLE.values(), ids=TRAINABLE)
def test_forget_gradient_is_taken_uphill_and_the_retain_gradient_is_not(make):
    model = tiny_llama()
    before = Snapshot.of(model)
    ours = step(model, make(model), npo_sam())
    assert not before.differences(model)
    assert difference(ours, slow_step(model, make(model), RADIUS)) < 1e-9
    wrong = {
        "no perturbation": slow_step(model, make(model), 0.0),
        "downhill": slow_step(model, make(model), -RADIUS),
        "all gradients uphill": slow_step(model, make(model), RADIUS, all_uphill=True),
    }
    for name, other in wrong.items():
        assert difference(ours, other) > 1e-3, name
    plain = step(model, make(model), methods.npo(beta=BETA).terms)
    assert difference(plain, wrong["no perturbation"]) < 1e-9


def test_a_small_radius_is_npo():
    model = tiny_llama()
    npo = step(model, dense(model), methods.npo(beta=BETA).terms)
    near, far = (difference(step(model, dense(model), npo_sam(r)), npo) for r in (1e-6, 1e-1))
    assert near < 1e-4 * far
    assert far > 1e-3


def test_the_weight_of_the_term_does_not_change_where_it_goes():
    # The gradient is normalised, so its scale moves nothing.
    model = tiny_llama()
    sharp = losses.sharpness_aware(losses.likelihood("forget", -1.0), RADIUS)
    once, twice = (
        step(model, dense(model), [replace(sharp, weight=weight)]) for weight in (-1.0, -2.0)
    )
    halved = step(model, dense(model), [replace(sharp, weight=-2.0)], lr=RATE / 2)
    assert difference(halved, once) < 1e-9
    assert difference(twice, once) > 0.1


def test_a_step_without_a_forget_gradient_stays_where_it_is():
    model = tiny_llama()
    terms = methods.npo_sam(coefficient=0.0).terms
    found = step(model, dense(model), terms)
    assert difference(found, step(model, dense(model), terms[1:])) < 1e-12


@pytest.mark.parametrize("radius", [0.0, -0.1, float("nan"), float("inf")])
def test_radius_is_above_zero(radius):
    with pytest.raises(InputError, match=f"--sam-radius {radius}: give a finite number above 0"):
        methods.npo_sam(sam_radius=radius)


@pytest.mark.parametrize("make", TRAINABLE.values(), ids=TRAINABLE)
def test_models_in_16_bits_are_refused_before_training(make):
    model = tiny_llama(torch.bfloat16)
    before = Snapshot.of(model)
    seen = []
    with pytest.raises(InputError, match=r"--sam-radius 0\.01 moves weights by less than 16 bits"):
        run("npo-sam", model, make(model), on_evaluation=lambda *told: seen.append(told))
    assert not seen
    assert not before.differences(model)
    # What is refused: a bfloat16 weight of 0.02 does not notice 1e-6, a float32 one does.
    weight = torch.tensor(0.02)
    assert torch.equal(weight.bfloat16() + 1e-6, weight.bfloat16())
    assert weight + 1e-6 != weight
    assert run("npo", model, make(model)).deltas  # other methods run
