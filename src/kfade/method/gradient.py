"""Gradients of a forgetting objective and of the KL with respect to the targeted weights.

Shapes: N loss tokens, D hidden width, V vocabulary, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kfade.curvature.jacobian import transpose_product
from kfade.curvature.vectors import OnDevice, Storage, Vector
from kfade.data.batches import Batch
from kfade.method.measure import Reference
from kfade.method.objectives import Objective
from kfade.models.head import Head
from kfade.models.targets import Target
from kfade.runtime import distributed


def forget_gradient(
    model: nn.Module,
    batches: Sequence[Batch],
    targets: Sequence[Target],
    objective: Objective,
    *,
    recompute: bool = False,
    storage: Storage = OnDevice(),
    head: Head | None = None,
) -> Vector:
    """g = ∇_W of the objective's mean per loss token, one matrix [O, I] a target.

    In float32 or better, from captured inputs and output gradients: parameters get no ``.grad``
    and the model stays bit-identical.

    Args:
        recompute: see :func:`~kfade.curvature.recompute.recomputing`.
        storage: keeps g, see :func:`~kfade.curvature.jacobian.transpose_product`.
        head: the model's head, if it has been read before (reading it runs trial passes).
    """
    loss_tokens = sum(batch.loss_tokens for batch in batches)

    def from_outputs(head: Head, batch: Batch, hidden_ND: Tensor) -> Tensor:
        target_N = batch.at_loss(batch.target_BT)
        u_ND = torch.empty_like(hidden_ND)
        for part in head.chunks(hidden_ND):
            with torch.enable_grad():
                h = hidden_ND[part].requires_grad_()
                value = objective(head(h), target_N[part]).sum() / loss_tokens
            u_ND[part] = torch.autograd.grad(value, h)[0]
        return u_ND

    return transpose_product(
        model,
        batches,
        targets,
        from_outputs,
        "forget gradient",
        recompute=recompute,
        storage=storage,
        head=head,
    )


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
