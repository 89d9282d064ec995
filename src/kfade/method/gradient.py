"""Gradients of a forgetting objective and of the KL with respect to the targeted weights.

Shapes: N loss tokens, D hidden width, V vocabulary, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kfade.curvature.jacobian import transpose_product
from kfade.curvature.vectors import OnDevice, Storage, Vector, scaled
from kfade.data.batches import Batch
from kfade.method.measure import Reference, text_probabilities
from kfade.method.objectives import Objective, cross_entropy
from kfade.models.head import Head
from kfade.models.targets import Target
from kfade.runtime import distributed


def forget_gradient(
    model: nn.Module,
    batches: Sequence[Batch],
    targets: Sequence[Target],
    objective: Objective,
    *,
    weigh: bool = False,
    recompute: bool = False,
    storage: Storage = OnDevice(),
    head: Head | None = None,
) -> Vector:
    """g = ∇_W of the objective's mean per loss token, one matrix [O, I] a target.

    In float32 or better, from captured inputs and output gradients: parameters get no ``.grad``
    and the model stays bit-identical.

    Args:
        weigh: weigh texts by their probability. With p_i that of text i per token (geometric) and
            f_i its mean of the objective's gradients, g = Σ p_i f_i / Σ p_i. With the cross-entropy
            this is the gradient of −log of the texts' mean probability.
        recompute: see :func:`~kfade.curvature.recompute.recomputing`.
        storage: keeps g, see :func:`~kfade.curvature.jacobian.transpose_product`.
        head: the model's head, if it has been read before (reading it runs trial passes).
    """
    loss_tokens = sum(batch.loss_tokens for batch in batches)
    sums: dict[int, Tensor] = {}  # of p_i, by batch: there may be several passes over it

    def from_outputs(head: Head, batch: Batch, hidden_ND: Tensor) -> Tensor:
        target_N = batch.at_loss(batch.target_BT)
        weight_N = hidden_ND.new_full((len(hidden_ND),), 1 / loss_tokens, dtype=torch.float64)
        if weigh:
            weight_N, sums[id(batch)] = _weights(head, batch, hidden_ND, target_N)
        u_ND = torch.empty_like(hidden_ND)
        for part in head.chunks(hidden_ND):
            with torch.enable_grad():
                h = hidden_ND[part].requires_grad_()
                value = (objective(head(h), target_N[part]) * weight_N[part]).sum()
            u_ND[part] = torch.autograd.grad(value, h)[0]
        return u_ND

    gradient = transpose_product(
        model,
        batches,
        targets,
        from_outputs,
        "forget gradient",
        recompute=recompute,
        storage=storage,
        head=head,
    )
    if not weigh:
        return gradient
    [total] = distributed.all_reduce_numbers([float(sum(sums.values()))])
    return scaled(gradient, 1 / total if total else 0.0)


def _weights(
    head: Head, batch: Batch, hidden_ND: Tensor, target_N: Tensor
) -> tuple[Tensor, Tensor]:
    """(p_i / n_i of each loss token's text [N], Σ p_i) with p_i the probability per token of text
    i, and n_i its number of loss tokens."""
    parts = head.chunks(hidden_ND)
    with torch.no_grad():
        losses = [cross_entropy(head(hidden_ND[part]), target_N[part]) for part in parts]
        if not losses:
            return hidden_ND.new_empty(0, dtype=torch.float64), hidden_ND.new_zeros(())
        counts = [count for count in batch.loss_counts if count]
        probabilities = text_probabilities(torch.cat(losses).double(), counts)
        shares = [(p / n).expand(n) for p, n in zip(probabilities, counts, strict=True)]
        return torch.cat(shares), torch.stack(probabilities).sum()


def kl_gradient(
    model: nn.Module,
    base: Reference,
    targets: Sequence[Target],
    *,
    recompute: bool = False,
    storage: Storage = OnDevice(),
    head: Head | None = None,
) -> Vector:
    """∇K at the model's present weights, one matrix [O, I] a target.

    K = (1/N) Σ KL(p₀ ‖ p) over the loss tokens of the reference's batches, p₀ the reference's
    probabilities and p the model's. In the logits z it is ∂K/∂z = (p − p₀) / N.

    Hidden states of the reference are kept, not recomputed: to recompute them for each batch, the
    weights would have to change between its forward and its backward pass.

    Args:
        base: hidden states of the original model, from
            :func:`~kfade.method.measure.hidden_reference`.
        recompute, storage, head: as in :func:`forget_gradient`.
    """
    own = distributed.share(base.batches, lambda batch: batch.positions)
    names = {id(batch): name for batch, name in zip(own, base.hidden, strict=True)}

    def from_outputs(head: Head, batch: Batch, hidden_ND: Tensor) -> Tensor:
        u_ND = torch.empty_like(hidden_ND)
        if not len(hidden_ND):  # a batch without loss tokens, while other processes have some
            return u_ND
        base_ND = base.hidden[names[id(batch)]]
        for part in head.chunks(hidden_ND):
            with torch.enable_grad():
                h = hidden_ND[part].requires_grad_()
                logits_NV = head(h)
            with torch.no_grad():
                p_NV, base_NV = (z.softmax(dim=-1) for z in (logits_NV, head(base_ND[part])))
                by_logits_NV = p_NV.sub_(base_NV).div_(base.loss_tokens)
            u_ND[part] = torch.autograd.grad(logits_NV, h, by_logits_NV)[0]
        return u_ND

    return transpose_product(
        model,
        base.batches,
        targets,
        from_outputs,
        "gradient of the KL",
        recompute=recompute,
        storage=storage,
        head=head,
    )
