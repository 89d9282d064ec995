"""Capture the inputs and output gradients of target layers by hooks.

Autograd never forms a weight gradient: parameters are frozen, and the graph begins at the output of
the first target. So the backward pass computes activation gradients only and stops at the lowest
target; blocks below it build no graph.

Shapes: B batch, T positions, I inputs, O outputs of a layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from kfade.models.experts import Routing
from kfade.models.targets import ForwardHook, Target, hooked

Consumer = Callable[[Target, Tensor, "Routing | None"], None]
"""(target, rows, which positions the rows are; None: all, in their order)."""


@contextlib.contextmanager
def capture(
    targets: Sequence[Target],
    *,
    on_input: Consumer | None = None,
    on_gradient: Consumer | None = None,
) -> Iterator[None]:
    """Within the ``with``, pass inputs and output gradients of a frozen model's targets on.

    If ``on_gradient`` is given, forward passes without gradients are ignored: the first run of a
    block that is recomputed (``recompute``), or another computation in between.

    Args:
        on_input: called in the forward pass with the first reader of each input tensor and the
            input [B, T, I] (a column of ones added for a joint bias); of an expert [R, I].
        on_gradient: called in the backward pass, from the last target to the first, with the
            gradient [B, T, O] of the scalar that is differentiated.
    """

    first: dict[str, Target] = {}
    for target in targets:
        first.setdefault(target.tensor_of, target)

    def hook(target: Target) -> ForwardHook:
        def forward_hook(
            module: nn.Module, args: tuple[Tensor, ...], output: Tensor
        ) -> Tensor | None:
            if on_gradient is not None and not torch.is_grad_enabled():
                return None
            routing = target.routing  # of this call: a gradient may come after others
            if on_input is not None and target is first[target.tensor_of]:
                on_input(target, target.inputs(args[0].detach()), routing)
            if on_gradient is None:
                return None
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            output.register_hook(lambda gradient: on_gradient(target, gradient.detach(), routing))
            return output

        return forward_hook

    with hooked(targets, hook):
        yield
