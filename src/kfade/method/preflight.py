"""Try on a few tokens whatever a run will need, before anything that takes long."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kfade.curvature.capture import capture
from kfade.curvature.passes import backward
from kfade.curvature.product import quadratic_form
from kfade.curvature.recompute import recomputing
from kfade.data.batches import Batch, make_batches
from kfade.data.sequences import TokenSequence
from kfade.errors import InputError, first_line
from kfade.models.head import Head, read_head
from kfade.models.layers import Target
from kfade.models.load import frozen


def preflight(model: nn.Module, targets: Sequence[Target], *, recompute: bool = False) -> None:
    """A forward pass, a backward pass to every target, and an exact quadratic form of two
    positions.

    Args:
        recompute: blocks run again in the backward pass, as the run will ask for.

    Raises:
        InputError: a later token moves earlier hidden states; logits are made in an unknown way; no
            gradient comes back to a target; an operation has no derivative (in the library's
            words).
    """
    device = targets[0].weight.device
    batches = make_batches([TokenSequence((0, 1, 2), (False, True, True))], device=device)
    reached: set[str] = set()

    def on_gradient(target: Target, g_BTO: Tensor) -> None:
        reached.add(target.name)

    def ones(head: Head, batch: Batch, hidden_ND: Tensor) -> Tensor:
        return torch.ones_like(hidden_ND)

    try:
        with frozen(model), recomputing(model, targets, recompute):
            head = read_head(model)
            with capture(targets, on_gradient=on_gradient):
                backward(model, head, batches[0], ones)
        along = {t.name: torch.ones(t.shape, dtype=t.weight.dtype, device=device) for t in targets}
        quadratic_form(model, batches, targets, along)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{type(model).__name__} cannot be differentiated ({type(error).__name__}: "
            f"{first_line(error)}): narrow --target or --layers, or use another model"
        ) from error
    for target in targets:
        if target.name not in reached:
            raise InputError(
                f"no gradient comes back to {target.name} from the model's outputs: leave it out "
                "with --target or --layers"
            )
