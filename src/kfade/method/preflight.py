"""Check on a few tokens that a model supports what a run needs, before anything takes long."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kfade.curvature.capture import capture
from kfade.curvature.jacobian import ones
from kfade.curvature.passes import backward, refuse_float16, refuse_unreached
from kfade.curvature.product import quadratic_form
from kfade.curvature.recompute import recomputing, uneven_like
from kfade.data.batches import Batch, make_batches
from kfade.data.sequences import TokenSequence
from kfade.errors import InputError, first_line
from kfade.models.experts import Routing
from kfade.models.head import Head, read_head
from kfade.models.load import frozen
from kfade.models.targets import Target, named, refuse_compiled


def preflight(model: nn.Module, targets: Sequence[Target], *, recompute: bool = False) -> Head:
    """Run a forward pass, a backward pass to every target, and an exact quadratic form on two
    positions.

    Args:
        recompute: also check that blocks can be recomputed in the backward pass.

    Returns:
        The model's head, for later passes.

    Raises:
        InputError: a target is in float16; hidden states depend on later tokens or change when a
            pass is repeated; logits are computed in an unknown way; a module is compiled; a target
            gets no gradient, or all get zeros; an operation has no derivative; ``recompute``
            changes gradients.
    """
    refuse_float16(targets)
    refuse_compiled(model)
    device = targets[0].device
    batches = make_batches([TokenSequence((0, 1, 2), (False, True, True))], device=device)
    reached: dict[str, bool] = {}
    head_passes = True

    def on_gradient(target: Target, g_BTO: Tensor, routing: Routing | None) -> None:
        reached[target.name] = bool(g_BTO.any())

    def through_head(head: Head, batch: Batch, hidden_ND: Tensor) -> Tensor:
        nonlocal head_passes
        with torch.enable_grad():
            h = hidden_ND.requires_grad_()
            logits = head(h)
        [u_ND] = torch.autograd.grad(logits, h, uneven_like(logits))
        head_passes = bool(u_ND.any())
        return u_ND

    try:
        with frozen(model):
            head = read_head(model)
            with capture(targets, on_gradient=on_gradient):
                backward(model, head, batches[0], through_head)
        quadratic_form(model, batches, targets, ones(targets), head=head)
        with recomputing(model, targets, recompute):
            pass  # checks on entering
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{type(model).__name__} cannot be differentiated ({type(error).__name__}: "
            f"{first_line(error)}): narrow --target or --layers, or use another model"
        ) from error
    refuse_unreached(targets, reached)
    if not head_passes:
        raise InputError(
            f"the vocabulary head of {type(model).__name__} passes no gradient back: its weights "
            "are zero, and so would be every change; use a model whose head is not"
        )
    if not any(reached.values()):
        names = [target.name for target in targets]
        raise InputError(
            f"the gradient is zero in all targeted weights ({named(names)}): weights of zero, or "
            "a saturated activation, lie between them and the outputs; target others with "
            "--target or --layers"
        )
    return head
