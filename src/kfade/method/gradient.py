"""Gradient of a forgetting objective with respect to the targeted weights.

Shapes: N loss tokens, D hidden width, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kfade.curvature.jacobian import transpose_product
from kfade.curvature.vectors import OnDevice, Storage, Vector
from kfade.data.batches import Batch
from kfade.method.objectives import Objective
from kfade.models.head import Head
from kfade.models.targets import Target


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
