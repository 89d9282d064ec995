"""Losses of a model on batches and its divergence from a reference, by forward passes.

A reference is kept as final hidden states [N, D], which are much smaller than logits [N, V]. The
head is never a target, so both models have the same. With several processes each runs its share of
the batches and holds the hidden states of that share only. Sums stay on the device until the end,
since reading a number waits for all work on it.

Shapes: N loss tokens, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kfade.curvature.vectors import Layerwise, OnDevice, Storage, Vector
from kfade.data.batches import Batch
from kfade.method.objectives import Objective, cross_entropy
from kfade.models.head import Head, hidden_states, read_head
from kfade.models.lengths import check_lengths
from kfade.models.load import frozen
from kfade.models.weights import Weights
from kfade.runtime import distributed
from kfade.runtime.progress import track


@dataclass(frozen=True)
class Reference:
    """Final hidden states [N, D] of a model at the loss positions of each batch."""

    batches: Sequence[Batch]
    """All batches, of all processes."""
    hidden: Vector
    """Hidden states of this process's share of the batches, by number and in their order."""

    @property
    def loss_tokens(self) -> int:
        """Number of scored tokens."""
        return sum(batch.loss_tokens for batch in self.batches)


def hidden_reference(
    model: nn.Module, batches: Sequence[Batch], name: str, storage: Storage = OnDevice()
) -> Reference:
    """Hidden states of ``model`` at its present weights, to compare an edited model with.

    Args:
        storage: keeps the hidden states of this process's share.
    """
    check_lengths(model, batches)
    hidden = storage.vector()
    with frozen(model), torch.no_grad():
        own = distributed.share(batches, lambda batch: batch.positions)
        missing = distributed.extra_passes(model, len(own))
        for number, batch in enumerate(track(own, name, lambda b: b.positions)):
            hidden[str(number)] = batch.at_loss(hidden_states(model, batch.input_BT))
        for _ in range(missing):
            hidden_states(model, batches[-1].input_BT)
    return Reference(batches, hidden)


def mean_objectives(
    model: nn.Module,
    batches: Sequence[Batch],
    objectives: Sequence[Objective],
    head: Head | None = None,
) -> list[float]:
    """Mean of each objective per loss token, from one pass; cross-entropy is in nats.

    Args:
        head: the model's head, if it has been read before (reading it runs trial passes).
    """
    check_lengths(model, batches)
    totals: list[Tensor | float] = [0.0 for _ in objectives]
    with frozen(model), torch.no_grad():
        head = head or read_head(model)
        own = distributed.share(batches, lambda batch: batch.positions)
        missing = distributed.extra_passes(model, len(own))
        for batch in own:
            hidden_ND = batch.at_loss(hidden_states(model, batch.input_BT))
            target_N = batch.at_loss(batch.target_BT)
            for part in head.chunks(hidden_ND):
                logits_NV = head(hidden_ND[part])
                for i, objective in enumerate(objectives):
                    totals[i] += objective(logits_NV, target_N[part]).double().sum()
        for _ in range(missing):
            hidden_states(model, batches[-1].input_BT)
    sums = distributed.all_reduce_numbers([float(total) for total in totals])
    loss_tokens = sum(batch.loss_tokens for batch in batches)
    return [sum_ / loss_tokens for sum_ in sums]


def text_probabilities(loss_N: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """exp(−mean loss) of each text: its probability per token (geometric).

    Args:
        loss_N: −log p_y of the loss tokens of all texts.
        counts: number of loss tokens of each text, above 0.
    """
    return [(-loss_n.mean()).exp() for loss_n in loss_N.split(counts)]


class TokenLosses:
    """Cross-entropy as an objective that records each token's value, for means over sequences."""

    def __init__(self) -> None:
        self._losses: list[Tensor] = []

    def __call__(self, logits_NV: Tensor, target_N: Tensor) -> Tensor:
        """−log p_y [N]; :func:`mean_objectives` calls this in the order of the batches."""
        loss_N = cross_entropy(logits_NV, target_N)
        self._losses.append(loss_N.double())
        return loss_N

    def mean_probability(self, batches: Sequence[Batch]) -> float:
        """Mean over the sequences of exp(−mean loss of the sequence), after one pass of
        :func:`mean_objectives` over ``batches``; clears the recorded values."""
        total = 0.0
        if own := distributed.share(batches, lambda batch: batch.positions):
            counts = [n for batch in own for n in batch.loss_counts]
            losses_N = torch.cat(self._losses).cpu()
            total = sum(p.item() for p in text_probabilities(losses_N, counts))
        self._losses.clear()
        [total] = distributed.all_reduce_numbers([total])
        return total / sum(len(batch.loss_BT) for batch in batches)


def mean_divergence(head: Head, base: Reference, edited: Reference) -> float:
    """Mean KL(base ‖ edited) in nats per loss token, over the full vocabulary."""
    total: Tensor | float = 0.0
    with torch.no_grad():
        pairs = zip(base.hidden.values(), edited.hidden.values(), strict=True)
        for base_ND, edited_ND in pairs:
            for part in head.chunks(base_ND):
                kl_N = divergence(head(base_ND[part]), head(edited_ND[part]))
                total += kl_N.double().sum()
    [sum_] = distributed.all_reduce_numbers([float(total)])
    return sum_ / base.loss_tokens


def rounding_changes(model: nn.Module, names: Sequence[str], seed: int = 0) -> Vector:
    """ΔW by parameter name, of the size of rounding changed weights to the model's dtype.

    One weight in 12 changes by one unit in the last place, up or down at random. Its mean square is
    unit² / 12, that of rounding, and W + ΔW is representable in the dtype. Each ΔW is made when it
    is read, from the weight W of that moment.
    """
    parameters = Weights(model)
    seeds = {name: seed + number for number, name in enumerate(names)}

    def change(name: str) -> Tensor:
        weight = distributed.gather_full(parameters[name].detach())
        generator = torch.Generator(weight.device).manual_seed(seeds[name])
        die = torch.randint(
            24, weight.shape, generator=generator, device=weight.device, dtype=torch.int8
        )
        moved = (die == 0).to(weight.dtype) - (die == 1).to(weight.dtype)
        _, exponent = weight.frexp()  # |w| in [2^(e−1), 2^e) has the unit eps · 2^(e−1)
        unit = torch.ldexp(torch.full_like(weight, torch.finfo(weight.dtype).eps), exponent - 1)
        return torch.where(weight == 0, 0, moved * unit)

    return Layerwise(seeds, change)


def divergence(base_NV: Tensor, edited_NV: Tensor) -> Tensor:
    """KL(p ‖ q) [N] of two rows of logits, accurate at every scale.

    With d = z_q − z_p minus its mean Σ p d,

        KL = log Σ p e^d = log1p(Σ p f(d)),   f(d) = e^d − 1 − d.

    Every term is positive and of second order, so nothing cancels as q → p. If some e^d would
    overflow, the first form is used, as a logsumexp.
    """
    log_p_NV = base_NV.log_softmax(dim=-1)
    p_NV = log_p_NV.exp()
    d_NV = edited_NV - base_NV
    d_NV = d_NV - (p_NV * d_NV).sum(dim=-1, keepdim=True)
    kl_N = (p_NV * _exp_remainder(d_NV)).sum(dim=-1).log1p()
    near_N = d_NV.amax(dim=-1) < 80.0
    return torch.where(near_N, kl_N, log_p_NV.add_(d_NV).logsumexp(dim=-1))


def _exp_remainder(d: Tensor) -> Tensor:
    """e^d − 1 − d; a series for small |d|, where expm1(d) − d would cancel."""
    series = torch.ones_like(d)
    for n in range(9, 2, -1):  # the remainder is below 4e-11 of the sum
        series.mul_(d / n).add_(1)
    return torch.where(d.abs() < 0.3, series.mul_(d).mul_(d).mul_(0.5), d.expm1() - d)
