"""The losses of gradient ascent and related methods, and the terms that they consist of.

A method minimises a sum of *terms*. A term is a weight times a mean over a batch of the forget or
the retain set: over its scored tokens, sequences or positions. A batch may be computed in pieces.
The mean is over the whole batch, so the pieces do not change the gradient.

    ga       −CE_f                                            mean over tokens
    gd       −CE_f + CE_r                                     soul: −CE_f + γ CE_r
    kl-min   −CE_f + KL(base ‖ current) on retain tokens
    npo      (2/β) softplus(−β (L − L_base)) + CE_r           mean over sequences
    simnpo   c (2/β) softplus(−β (L/|y| − γ)) + CE_r

L is a sequence's summed negative log-likelihood, |y| the number of its scored tokens.
Sources: Maini et al. 2024 (ga, gd, kl-min), Zhang et al. 2024 (npo), Fan et al. 2024 (simnpo),
Jia et al. 2024 (soul).

Shapes: B sequences, N scored tokens, D hidden width, V vocabulary, K whatever a mean is over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus
from torch.utils.checkpoint import checkpoint

from kfade.data.batches import Batch
from kfade.data.sequences import TokenSequence
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


def closeness(weight: float) -> Term:
    """Mean KL(base ‖ current) per scored retain token.

    Its reference is the base model's final hidden states; ``net`` has the base model's head.
    """

    def values(net: Net, batch: Batch, rows: Rows) -> Tensor:
        base_ND = torch.cat([row[0] for row in rows])

        def of_logits(logits_NV: Tensor, base_ND: Tensor) -> Tensor:
            with torch.no_grad():
                base_NV = net.base_head(base_ND)
            return kl_values(base_NV, logits_NV)

        return at_loss_tokens(net, batch, of_logits, base_ND.to(batch.input_BT.device))

    def reference(net: Net, sequence: TokenSequence) -> Row:
        batch = alone(net, sequence)
        return (batch.at_loss(hidden_states(net.model, batch.input_BT)),)

    return Term("retain", weight, values, tokens, reference)


def npo_values(nll_B: Tensor, base_B: Tensor, beta: float) -> Tensor:
    """−(2/β) log σ(−β (log p − log p_base)) = (2/β) softplus(−β (L − L_base)), [B].

    As β → 0 its gradient tends to −∇L, that of gradient ascent.
    """
    return (2 / beta) * softplus(-beta * (nll_B - base_B))


def simnpo_values(nll_B: Tensor, count_B: Tensor, beta: float, gamma: float) -> Tensor:
    """−(2/β) log σ(β (L/|y| − γ)), [B]."""
    return (2 / beta) * softplus(-beta * (nll_B / count_B - gamma))


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
