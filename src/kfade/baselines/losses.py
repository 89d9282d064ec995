"""The losses of gradient ascent and related methods, and the terms that they consist of.

A method minimises a sum of *terms*. A term is a weight times a mean over a batch of the forget or
the retain set: over its scored tokens, sequences or positions. A batch may be computed in pieces.
The mean is over the whole batch, so the pieces do not change the gradient.

    ga       −CE_f                                            mean over tokens
    gd       −CE_f + CE_r                                     soul: −CE_f + γ CE_r
    kl-min   −CE_f + KL(base ‖ current) on retain tokens
    npo      (2/β) softplus(−β (L − L_base)) + CE_r           mean over sequences
    simnpo   c (2/β) softplus(−β (L/|y| − γ)) + CE_r
    wga      p^β log p + CE_r                                 mean over tokens
    satimp   c p^β₁ (1 − p)^β₂ log p + CE_r
    undial   CE(softmax(z_base − β e_y), current)

L is a sequence's summed negative log-likelihood, |y| the number of its scored tokens. p is the
probability of a forget token y, z_base are the base model's logits before it, and e_y is the unit
vector of y. The factors before log p have no gradient. npo-sam is npo with a sharpness-aware forget
term, see :func:`sharpness_aware`.

Sources: Maini et al. 2024 (ga, gd, kl-min), Zhang et al. 2024 (npo), Fan et al. 2024 (simnpo),
Jia et al. 2024 (soul), Wang et al. 2025, arXiv 2502.19301 (wga), Yang et al. 2025, arXiv 2505.11953
(satimp), Dong et al. 2024, arXiv 2402.10052 (undial), Fan et al. 2025, arXiv 2502.05374 (npo-sam).

Shapes: B sequences, N scored tokens, D hidden width, V vocabulary, K whatever a mean is over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus
from torch.utils.checkpoint import checkpoint

from kfade.data.batches import Batch
from kfade.data.sequences import TokenSequence
from kfade.errors import InputError
from kfade.method.objectives import cross_entropy
from kfade.models.head import Head, hidden_states
from kfade.models.lengths import batches_for

Row = tuple[Tensor, ...]
"""What a term needs of the base model's outputs on one sequence."""
Rows = Sequence[Row]
"""One row for each sequence of a batch, in the batch's order; none without a reference."""


@dataclass(frozen=True)
class Net:
    """The model that is trained, and its vocabulary heads."""

    model: Any
    head: Head
    """The model's own head, which may be trained."""
    base_head: Head
    """The head as it was before training."""


@dataclass(frozen=True)
class Term:
    """``weight`` times the mean of ``values`` over a batch."""

    on: Literal["forget", "retain"]
    """The set that its batches are drawn from."""
    weight: float
    values: Callable[[Net, Batch, Rows], Tensor]
    """Values [K] of a piece of the batch, with a graph to the trained weights."""
    count: Callable[[Batch, Rows], int]
    """K, known before the values are."""
    reference: Callable[[Net, TokenSequence], Row] | None = None
    """What it needs of the base model's outputs on a sequence; computed once and kept."""
    radius: float = 0.0
    """See :func:`sharpness_aware`."""


def likelihood(on: Literal["forget", "retain"], weight: float) -> Term:
    """Mean cross-entropy CE per scored token; a negative weight ascends."""
    return Term(on, weight, lambda net, batch, rows: token_nll(net, batch), tokens)


def preference(beta: float, weight: float) -> Term:
    """NPO's forget term; its reference is the base model's L of each sequence."""

    def values(net: Net, batch: Batch, rows: Rows) -> Tensor:
        nll_B, _ = sequence_nll(net, batch)
        base_B = torch.stack([row[0] for row in rows]).to(nll_B)
        return npo_values(nll_B, base_B, beta)

    def reference(net: Net, sequence: TokenSequence) -> Row:
        return (sequence_nll(net, alone(net, sequence))[0][0],)

    return Term("forget", weight, values, sequences, reference)


def simple_preference(beta: float, gamma: float, weight: float) -> Term:
    """SimNPO's forget term, without a reference."""

    def values(net: Net, batch: Batch, rows: Rows) -> Tensor:
        return simnpo_values(*sequence_nll(net, batch), beta, gamma)

    return Term("forget", weight, values, sequences)


def weighted_ascent(beta1: float, beta2: float, weight: float) -> Term:
    """WGA's and SatImp's forget term: mean of p^β₁ (1 − p)^β₂ log p per scored token, whose weights
    have no gradient."""

    def values(net: Net, batch: Batch, rows: Rows) -> Tensor:
        nll_N = token_nll(net, batch)
        return -token_weights(nll_N.detach(), beta1, beta2) * nll_N

    return Term("forget", weight, values, tokens)


def closeness(weight: float) -> Term:
    """Mean KL(base ‖ current) per scored retain token."""

    def values(base_NV: Tensor, logits_NV: Tensor, target_N: Tensor) -> Tensor:
        return kl_values(base_NV, logits_NV)

    return _against_base("retain", weight, values)


def distillation(beta: float, weight: float) -> Term:
    """UNDIAL's forget term: mean cross-entropy per scored token to the base model's distribution
    with the token's own logit lowered by β."""

    def values(base_NV: Tensor, logits_NV: Tensor, target_N: Tensor) -> Tensor:
        return undial_values(base_NV, logits_NV, target_N, beta)

    return _against_base("forget", weight, values)


def sharpness_aware(term: Term, radius: float) -> Term:
    """The term with its gradient g taken at θ + ρ g(θ)/‖g(θ)‖, ρ being ``radius``.

    θ is all that is trained, as one vector, and g the gradient of a whole step: over its batches
    and over the processes. To first order this minimises the term's largest value within ρ of θ
    (Foret et al. 2021). All sharpness-aware terms of a method have one radius.

    Raises:
        InputError: the radius is not above 0.
    """
    if not (math.isfinite(radius) and radius > 0):
        raise InputError(f"--sam-radius {radius}: give a finite number above 0")
    return replace(term, radius=radius)


def _against_base(
    on: Literal["forget", "retain"],
    weight: float,
    values: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Term:
    """Mean per scored token of ``values(base logits, logits, targets)`` [N].

    Its reference is the base model's final hidden states; ``net`` has the base model's head.
    """

    def of_batch(net: Net, batch: Batch, rows: Rows) -> Tensor:
        def of_logits(logits_NV: Tensor, base_ND: Tensor, target_N: Tensor) -> Tensor:
            with torch.no_grad():
                base_NV = net.base_head(base_ND)
            return values(base_NV, logits_NV, target_N)

        base_ND = torch.cat([row[0] for row in rows]).to(batch.input_BT.device)
        return at_loss_tokens(net, batch, of_logits, base_ND, batch.at_loss(batch.target_BT))

    def reference(net: Net, sequence: TokenSequence) -> Row:
        batch = alone(net, sequence)
        return (batch.at_loss(hidden_states(net.model, batch.input_BT)),)

    return Term(on, weight, of_batch, tokens, reference)


def npo_values(nll_B: Tensor, base_B: Tensor, beta: float) -> Tensor:
    """−(2/β) log σ(−β (log p − log p_base)) = (2/β) softplus(−β (L − L_base)), [B].

    As β → 0 its gradient tends to −∇L, that of gradient ascent.
    """
    return (2 / beta) * softplus(-beta * (nll_B - base_B))


def simnpo_values(nll_B: Tensor, count_B: Tensor, beta: float, gamma: float) -> Tensor:
    """−(2/β) log σ(β (L/|y| − γ)), [B]."""
    return (2 / beta) * softplus(-beta * (nll_B / count_B - gamma))


def token_weights(nll_N: Tensor, beta1: float, beta2: float) -> Tensor:
    """p^β₁ (1 − p)^β₂, [N], with p = exp(−nll); 1 − p does not cancel where p is near 1."""
    return (-beta1 * nll_N).exp() * (-torch.expm1(-nll_N)) ** beta2


def undial_values(base_NV: Tensor, logits_NV: Tensor, target_N: Tensor, beta: float) -> Tensor:
    """−Σ p log q, [N], with p = softmax(z_base − β e_y); its gradient at the logits of q is q − p.

    At β = 0 it is KL(base ‖ current) and the base model's entropy.
    """
    target_N1 = target_N[:, None]
    lowered_NV = base_NV.scatter(1, target_N1, base_NV.gather(1, target_N1) - beta)
    return torch.nn.functional.cross_entropy(
        logits_NV, lowered_NV.softmax(dim=-1), reduction="none"
    )


def kl_values(base_NV: Tensor, logits_NV: Tensor) -> Tensor:
    """KL(p ‖ q) = Σ p (log p − log q), [N]; its gradient at the logits of q is q − p."""
    log_p_NV = base_NV.log_softmax(dim=-1)
    return (log_p_NV.exp() * (log_p_NV - logits_NV.log_softmax(dim=-1))).sum(dim=-1)


def token_nll(net: Net, batch: Batch) -> Tensor:
    """Negative log-likelihood [N] of each scored token."""
    return at_loss_tokens(net, batch, cross_entropy, batch.at_loss(batch.target_BT))


def sequence_nll(net: Net, batch: Batch) -> tuple[Tensor, Tensor]:
    """(L, |y|) [B]: each sequence's summed negative log-likelihood and its scored tokens."""
    count_B = batch.loss_BT.sum(dim=1)
    rows = token_nll(net, batch).split(count_B.tolist())
    return torch.stack([row.sum() for row in rows]), count_B


def at_loss_tokens(
    net: Net, batch: Batch, values: Callable[..., Tensor], *beside_N: Tensor
) -> Tensor:
    """``values(logits, *beside)`` [N] at the scored tokens of ``batch``.

    The head runs on a few positions at a time, and again in the backward pass, so that logits
    [N, V] and their softmax are never in memory as a whole.
    """
    hidden_ND = batch.at_loss(hidden_states(net.model, batch.input_BT))

    def part_values(h: Tensor, *beside: Tensor) -> Tensor:
        return values(net.head(h), *beside)

    return torch.cat(
        [
            checkpoint(part_values, hidden_ND[p], *(x[p] for x in beside_N), use_reentrant=False)
            for p in net.head.chunks(hidden_ND)
        ]
    )


def alone(net: Net, sequence: TokenSequence) -> Batch:
    """The batch of one sequence."""
    (batch,) = batches_for(net.model, [sequence])
    return batch


def tokens(batch: Batch, rows: Rows) -> int:
    """Scored tokens."""
    return batch.loss_tokens


def sequences(batch: Batch, rows: Rows) -> int:
    """Sequences."""
    return batch.input_BT.shape[0]


def positions(batch: Batch, rows: Rows) -> int:
    """Live positions."""
    return sum(batch.lengths)
