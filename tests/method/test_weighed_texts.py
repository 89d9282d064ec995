"""Texts weighed by their probability in the forget gradient."""

from __future__ import annotations

import pytest
import torch
from helpers import flat, random_sequences, relative_error, same_bits, tiny_llama

import kfade
from kfade import KFAC, cross_entropy, make_batches, margin
from kfade.curvature.vectors import InHostMemory
from kfade.data.sequences import TokenSequence
from kfade.method.gradient import forget_gradient
from kfade.models.layers import find_targets

# Texts of several lengths; each has tokens that are not scored.
FORGET = [
    TokenSequence(sequence.tokens[:n], sequence.scored[:n])
    for sequence, n in zip(random_sequences(5, seed=7), (4, 6, 8, 9, 9), strict=True)
]
ROUNDING = 1e-9  # a backward pass in float64, its sums in another order


@pytest.fixture(scope="module")
def model():
    """Sharp outputs, so that the probabilities of the texts differ."""
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
    return model


def log_of_mean_probability(model) -> torch.Tensor:
    """log of the mean over texts of exp(mean log p), text by text."""
    probabilities = []
    for sequence in FORGET:
        tokens = torch.tensor(sequence.tokens)
        logits = model(tokens[None, :-1]).logits[0].log_softmax(-1)
        own = logits.gather(1, tokens[1:, None])[:, 0][torch.tensor(sequence.scored[1:])]
        probabilities.append(own.mean().exp())
    stacked = torch.stack(probabilities)
    assert stacked.max() > 1.5 * stacked.min()
    return stacked.mean().log()


def whole(vector, targets) -> torch.Tensor:
    return torch.cat([vector[target.name].flatten() for target in targets])


def test_weighed_cross_entropy_is_minus_the_log_of_the_mean_probability(model):
    targets = find_targets(model)
    for target in targets:
        target.parameter.requires_grad_(True)
    weights = [target.parameter for target in targets]
    found = torch.autograd.grad(-log_of_mean_probability(model), weights)
    expected = whole({t.name: g for t, g in zip(targets, found, strict=True)}, targets)
    for budget in (9, 1000):
        batches = make_batches(FORGET, budget=budget)
        ours = forget_gradient(model, batches, targets, cross_entropy, weigh=True)
        assert relative_error(whole(ours, targets), expected) < ROUNDING
    # In groups of layers the batches are passed several times.
    storage = InHostMemory(memory=2 * max(t.shape[0] * t.shape[1] for t in targets) * 8)
    ours = forget_gradient(model, batches, targets, cross_entropy, weigh=True, storage=storage)
    assert relative_error(whole(ours, targets), expected) < ROUNDING
    plain = forget_gradient(model, batches, targets, cross_entropy)
    assert relative_error(whole(plain, targets), expected) > 0.1


def test_the_objective_of_a_text_is_weighed_by_its_probability(model):
    """g = Σ p_i f_i / Σ p_i, with f_i of the text alone and p_i from the model's losses."""
    targets = find_targets(model)
    alone = [make_batches([sequence]) for sequence in FORGET]
    losses = [kfade.method.measure.mean_objectives(model, b, [cross_entropy])[0] for b in alone]
    weights = torch.tensor(losses).neg().softmax(0).tolist()
    parts = [whole(forget_gradient(model, b, targets, margin), targets) for b in alone]
    expected = sum(weight * part for weight, part in zip(weights, parts, strict=True))
    ours = forget_gradient(model, make_batches(FORGET), targets, margin, weigh=True)
    assert relative_error(whole(ours, targets), expected) < 1e-6  # the weights are float32 here


def test_a_batch_without_scored_tokens_weighs_nothing(model):
    targets, batches = find_targets(model), make_batches(FORGET)
    ours = forget_gradient(model, batches, targets, margin, weigh=True)
    more = [*batches, batches[0].silenced()]
    again = forget_gradient(model, more, targets, margin, weigh=True)
    assert relative_error(whole(again, targets), whole(ours, targets)) < ROUNDING


def updated(**options) -> dict[str, torch.Tensor]:
    sets = {"retain": random_sequences(12, seed=8), "held_out": random_sequences(8, seed=9)}
    options = {"fit": KFAC(), "damping": 0.1, "refit": False, **options}
    deltas = kfade.unlearn(tiny_llama(), forget=FORGET, **sets, **flat(**options)).deltas
    return {name: deltas[name] for name in deltas}


@pytest.mark.parametrize(
    ("size", "weighed"), [({"alpha": 0.01}, False), ({"kl": 1e-3}, True), ({"until": 4.0}, True)]
)
def test_texts_are_weighed_after_the_first_step_unless_it_has_the_papers_length(size, weighed):
    runs = {
        (steps, weigh): updated(**size, steps=steps, weigh_texts=weigh)
        for steps in (1, 2)
        for weigh in (None, True, False)
    }

    def alike(one, other) -> bool:
        return all(same_bits(runs[one][name], runs[other][name]) for name in runs[one])

    assert alike((1, True), (1, False))
    assert not alike((2, True), (2, False))
    assert alike((2, None), (2, weighed))
