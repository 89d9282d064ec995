"""UNDIAL, WGA and SatImp against loops over tokens, and what wrong signs and gradients give."""

from __future__ import annotations

import pytest
import torch
from helpers import relative_error, tiny_llama
from slow_terms import (
    both_agree,
    gradient,
    log_probabilities,
    moved,
    net_of,
    rows_of,
    value_of,
)

from kfade.baselines import losses, methods
from kfade.baselines.losses import Net
from kfade.models.head import read_head

pytestmark = pytest.mark.usefixtures("short_chunks")
WEIGHT = 0.7  # of a term


def scored(model, sequences):
    """(log-probabilities [V], token) at each scored token."""
    for sequence in sequences:
        log_p = log_probabilities(model, sequence)
        for t, (token, flag) in enumerate(zip(sequence.tokens, sequence.scored, strict=True)):
            if flag:
                yield log_p[t - 1], token


# UNDIAL


def slow_distillation(base, model, sequences, beta: float) -> torch.Tensor:
    """Mean over scored tokens of the cross-entropy to the base model, token lowered by beta."""
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    pairs = zip(scored(base, sequences), scored(model, sequences), strict=True)
    for (base_V, token), (log_q, _) in pairs:
        # A log-probability is a logit less a constant, which the softmax takes out.
        odds = [b.exp().item() for b in base_V]
        odds[token] *= torch.tensor(-beta, dtype=torch.float64).exp().item()
        for v, odd in enumerate(odds):
            total = total - odd / sum(odds) * log_q[v]
        tokens += 1
    return WEIGHT * total / tokens


def test_undial_is_cross_entropy_to_lowered_logits(sequences):
    base, model, beta = tiny_llama(), moved(tiny_llama()), 2.0
    term = losses.distillation(beta, WEIGHT)
    rows = rows_of(term, net_of(base), sequences)
    # The model's head has moved too, so the base model is read by a head of its own.
    net = Net(model, read_head(model), read_head(base))
    ours = value_of(term, net, sequences, rows)
    slow = slow_distillation(base, model, sequences, beta)
    assert ours.item() == pytest.approx(slow.item(), rel=1e-12)
    assert relative_error(gradient(ours, model), gradient(slow, model)) < 1e-10
    raised = slow_distillation(base, model, sequences, -beta)  # the wrong sign
    assert relative_error(gradient(raised, model), gradient(slow, model)) > 0.1
    own_head = value_of(term, net_of(model), sequences, rows)
    assert relative_error(gradient(own_head, model), gradient(slow, model)) > 0.01


def test_undial_without_lowering_is_the_divergence(sequences):
    base, model = tiny_llama(), moved(tiny_llama())
    net = Net(model, read_head(model), read_head(base))
    found = {}
    for name, term in {
        "divergence": losses.closeness(1.0),
        "not lowered": losses.distillation(0.0, 1.0),
        "lowered": losses.distillation(2.0, 1.0),
    }.items():
        rows = rows_of(term, net_of(base), sequences)
        found[name] = gradient(value_of(term, net, sequences, rows), model)
    assert relative_error(found["not lowered"], found["divergence"]) < 1e-10
    assert relative_error(found["lowered"], found["divergence"]) > 0.1


def test_undial_ends_at_the_lowered_distribution(sequences):
    base = tiny_llama()
    logits_NV = torch.stack([log_p for log_p, _ in scored(base, sequences)]).detach()
    target_N = torch.tensor([token for _, token in scored(base, sequences)])
    beta = 3.0
    lowered_NV = logits_NV.clone()
    lowered_NV[torch.arange(len(target_N)), target_N] -= beta

    def slope(at_NV: torch.Tensor) -> float:
        at_NV = at_NV.clone().requires_grad_()
        losses.undial_values(logits_NV, at_NV, target_N, beta).sum().backward()
        return at_NV.grad.norm().item()

    assert slope(lowered_NV) < 1e-12 * len(target_N)
    assert slope(logits_NV) > 0.1  # at the base model there is something to learn


def test_undial_reads_no_retain_text_by_default():
    assert [term.on for term in methods.undial().terms] == ["forget"]
    assert [term.on for term in methods.undial(retain_weight=1.0).terms] == ["forget", "retain"]


# WGA and SatImp

EXPONENTS = [(1.0, 0.0), (0.5, 0.0), (5.0, 1.0), (0.3, 2.0)]


def slow_ascent(model, sequences, beta1: float, beta2: float, *, through: bool) -> torch.Tensor:
    """Mean over scored tokens of p^β₁ (1 − p)^β₂ log p, token by token.

    through: let the gradient go through the weight too, which is wrong.
    """
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for log_p, token in scored(model, sequences):
        p = log_p[token].exp()
        weight = p**beta1 * (1 - p) ** beta2
        total = total + (weight if through else weight.item()) * log_p[token]
        tokens += 1
    return WEIGHT * total / tokens


@pytest.mark.parametrize(("beta1", "beta2"), EXPONENTS)
def test_weighted_ascent_against_a_loop(model, sequences, beta1, beta2):
    term = losses.weighted_ascent(beta1, beta2, WEIGHT)
    slow = slow_ascent(model, sequences, beta1, beta2, through=False)
    both_agree(term, model, sequences, slow)
    right, ours = gradient(slow, model), value_of(term, net_of(model), sequences)
    assert relative_error(-gradient(ours, model), right) > 1.9  # descent
    through = slow_ascent(model, sequences, beta1, beta2, through=True)
    assert through.item() == pytest.approx(slow.item(), rel=1e-12)  # the same value
    assert relative_error(gradient(through, model), right) > 0.1


def test_weights_do_not_cancel_at_probabilities_near_one():
    nll = torch.tensor([1e-12, 1e-3, 30.0], dtype=torch.float64)
    found = losses.token_weights(nll, 0.0, 1.0)
    assert found[0].item() == pytest.approx(1e-12, rel=1e-9)
    assert abs((1 - (-nll).exp())[0].item() / 1e-12 - 1) > 1e-6  # by subtraction
    assert losses.token_weights(torch.zeros(1), 2.0, 0.0).item() == 1


def direction(terms, model, sequences) -> torch.Tensor:
    """The gradient of the forget terms."""
    forget = [value_of(t, net_of(model), sequences) for t in terms if t.on == "forget"]
    return gradient(sum(forget), model)


def test_wga_lowers_the_mean_probability(model, sequences):
    # p ∇log p = ∇p
    mean = torch.stack([log_p[token].exp() for log_p, token in scored(model, sequences)]).mean()
    found = direction(methods.wga(beta=1.0).terms, model, sequences)
    assert relative_error(found, gradient(mean, model)) < 1e-10


def test_weighted_ascent_has_ascent_and_wga_as_limits(model, sequences):
    ascent = direction(methods.gradient_ascent().terms, model, sequences)
    flat = direction(methods.wga(beta=0.0).terms, model, sequences)
    assert relative_error(flat, ascent) < 1e-10
    wga = direction(methods.wga(beta=2.0).terms, model, sequences)
    assert relative_error(wga, ascent) > 0.1
    sat = methods.satimp(beta1=2.0, beta2=0.0, coefficient=1.0)
    assert relative_error(direction(sat.terms, model, sequences), wga) < 1e-10
    other = methods.satimp(beta1=2.0, beta2=1.0, coefficient=1.0)
    assert relative_error(direction(other.terms, model, sequences), wga) > 0.1


@pytest.mark.parametrize("make", [methods.wga, methods.satimp, methods.npo_sam])
def test_retain_text_is_trained_on(make):
    forget, retain = make(coefficient=0.3, retain_weight=2.0).terms
    assert (forget.on, forget.weight, retain.on, retain.weight) == ("forget", 0.3, "retain", 2.0)
