"""J and Jᵀ: the derivative of the final hidden states with respect to the targeted weights.

Neither touches a parameter: Jᵀ is built from captured inputs and output gradients, J from tangents
that enter where a target layer computes.

Shapes: B batch, T positions, N loss tokens, D hidden width, R live rows, I inputs, O outputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from kfade.batches import Batch
from kfade.curvature.capture import FiniteCheck, capture
from kfade.curvature.curvature import Matrices
from kfade.curvature.factors import sum_dtype
from kfade.head import Head, hidden_states, read_head
from kfade.layers import Target
from kfade.models import frozen
from kfade.progress import track


def transpose_product(
    model: nn.Module,
    batches: Sequence[Batch],
    targets: Sequence[Target],
    from_outputs: Callable[[Head, Batch, Tensor], Tensor],
    name: str,
) -> Matrices:
    """Σ_batches Jᵀu in float32 or better, one matrix [O, I] a target.

    ``from_outputs(head, batch, hidden_ND)`` gives u [N, D] at the loss positions, from the final
    hidden states there.
    """
    sums: Matrices = {}
    for target in targets:
        weight = target.weight
        dtype = sum_dtype(weight.dtype)
        sums[target.name] = torch.zeros(target.shape, dtype=dtype, device=weight.device)
    inputs: dict[str, Tensor] = {}
    live = torch.zeros(0)
    check = FiniteCheck()

    def on_input(target: Target, a_BTI: Tensor) -> None:
        check.note("activations", target.name, a_BTI)
        inputs[target.input_of] = a_BTI[live]

    def on_gradient(target: Target, g_BTO: Tensor) -> None:
        check.note("gradients", target.name, g_BTO)
        sum_OI = sums[target.name]
        a_RI = inputs[target.input_of].to(sum_OI.dtype)
        sum_OI.addmm_(g_BTO[live].to(sum_OI.dtype).T, a_RI)

    with frozen(model):
        head = read_head(model)
        for batch in track(batches, name, lambda b: b.positions):
            live = batch.live_BT
            with capture(targets, on_input=on_input, on_gradient=on_gradient):
                backward(model, head, batch, from_outputs)
            check.raise_if_broken()
            inputs.clear()
    return sums


def backward(
    model: nn.Module,
    head: Head,
    batch: Batch,
    from_outputs: Callable[[Head, Batch, Tensor], Tensor],
) -> None:
    """Forward, then backward with u [N, D] at the loss positions and zero elsewhere."""
    with torch.enable_grad():
        hidden_BTD = hidden_states(model, batch.input_BT)
    u_BTD = torch.zeros_like(hidden_BTD)
    u_BTD[batch.loss_BT] = from_outputs(head, batch, batch.at_loss(hidden_BTD.detach()))
    hidden_BTD.backward(u_BTD)


def tangents(
    model: nn.Module, batch: Batch, targets: Sequence[Target], delta: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """(h, J δ): final hidden states [N, D] at the loss positions and their derivative along δ.

    One forward-mode pass. A target layer's output W a gets the tangent W ȧ + δ a.
    """
    with _entering(targets, delta), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        hidden_BTD = hidden_states(model, batch.input_BT)
        primal_BTD, tangent_BTD = forward_ad.unpack_dual(hidden_BTD)
    return batch.at_loss(primal_BTD), batch.at_loss(tangent_BTD)


@contextlib.contextmanager
def _entering(targets: Sequence[Target], delta: Mapping[str, Tensor]) -> Iterator[None]:
    def hook(target: Target):
        def forward_hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            a = target.inputs(forward_ad.unpack_dual(args[0]).primal)
            primal, tangent = forward_ad.unpack_dual(output)
            entering = a @ delta[target.name].to(a).T
            return forward_ad.make_dual(primal, entering if tangent is None else tangent + entering)

        return forward_hook

    handles = [target.module.register_forward_hook(hook(target)) for target in targets]
    try:
        with forward_ad.dual_level():
            yield
    finally:
        for handle in handles:
            handle.remove()
