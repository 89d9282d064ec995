"""J and Jᵀ: the derivative of the final hidden states with respect to the targeted weights.

Neither touches a parameter: Jᵀ is built from captured inputs and output gradients, J from tangents
that enter where a target layer computes.

Shapes: B batch, T positions, N loss tokens, D hidden width, R live rows, I inputs, O outputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from kfade import distributed
from kfade.batches import Batch
from kfade.curvature.curvature import Matrices
from kfade.curvature.factors import sum_dtype
from kfade.curvature.passes import FromOutputs, Waiting, live_rows, run_pass
from kfade.curvature.recompute import recomputing
from kfade.head import hidden_states
from kfade.layers import Target


def transpose_product(
    model: nn.Module,
    batches: Sequence[Batch],
    targets: Sequence[Target],
    from_outputs: FromOutputs,
    name: str,
    *,
    recompute: bool = False,
) -> Matrices:
    """Σ_batches Jᵀu in float32 or better, one matrix [O, I] a target.

    ``from_outputs(head, batch, hidden_ND)`` gives u [N, D] at the loss positions, from the final
    hidden states there. ``recompute`` as for :func:`~kfade.curvature.fit.fit_ekfac`.
    """
    products = _Products(targets)
    with recomputing(model, targets, recompute):
        run_pass(model, batches, targets, products, from_outputs, name)
    return {name: distributed.sum_everywhere(sum_OI) for name, sum_OI in products.sums.items()}


class _Products:
    """Σ g aᵀ over live rows, one matrix [O, I] a target."""

    def __init__(self, targets: Sequence[Target]) -> None:
        self.sums: Matrices = {}
        for target in targets:
            weight = target.weight
            dtype = sum_dtype(weight.dtype)
            self.sums[target.name] = torch.zeros(target.shape, dtype=dtype, device=weight.device)
        self._inputs: Waiting[Tensor] = Waiting(targets)

    def begin(self, batch: Batch) -> None:
        self._batch = batch

    def on_input(self, target: Target, a_BTI: Tensor) -> None:
        self._inputs.put(target, live_rows(a_BTI, self._batch))

    def on_gradient(self, target: Target, g_BTO: Tensor) -> None:
        sum_OI = self.sums[target.name]
        g_RO = live_rows(g_BTO, self._batch).to(sum_OI.dtype)
        sum_OI.addmm_(g_RO.T, self._inputs.take(target).to(sum_OI.dtype))

    def tensors(self) -> Matrices:
        return self.sums


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
