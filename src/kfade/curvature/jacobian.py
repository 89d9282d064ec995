"""Products with J and Jᵀ, the Jacobian of the final hidden states in the targeted weights.

Neither changes a parameter. Jᵀu is computed from captured inputs and output gradients, Jδ by
forward-mode differentiation with tangents added at the outputs of the target layers. If a model has
an operation without forward mode, Jδ is a central difference, perturbed at the same places.

Shapes: B batch, T positions, N loss tokens, D hidden width, R live rows, I inputs, O outputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, MutableMapping, Sequence

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from kfade.curvature.factors import sum_dtype
from kfade.curvature.groups import group_targets
from kfade.curvature.owners import Owners, Rows
from kfade.curvature.passes import FromOutputs, LiveRows, PendingInputs, run_pass
from kfade.curvature.recompute import recomputing
from kfade.curvature.vectors import Layerwise, OnDevice, Storage, Vector
from kfade.data.batches import Batch
from kfade.models.head import Head, hidden_states
from kfade.models.targets import ForwardHook, Target, hooked
from kfade.runtime import distributed


def transpose_product(
    model: nn.Module,
    batches: Sequence[Batch],
    targets: Sequence[Target],
    from_outputs: FromOutputs,
    name: str,
    *,
    recompute: bool = False,
    storage: Storage = OnDevice(),
    head: Head | None = None,
) -> MutableMapping[str, Tensor]:
    """Σ_batches Jᵀu in float32 or better, one matrix [O, I] a target.

    Args:
        from_outputs: gives u [N, D] at the loss positions, from the final hidden states there.
        recompute: see :func:`~kfade.curvature.recompute.recomputing`.
        storage: keeps the product. If its ``memory`` is less than the product, there are several
            passes over the batches, each for a group of layers.
        head: see :func:`~kfade.curvature.passes.run_pass`.
    """
    product, spread = storage.vector(), distributed.is_sharded(model)
    processes = distributed.count() if spread else 1
    for group in group_targets(targets, sum_bytes, storage.memory, processes):
        owners = Owners(group, sum_bytes, spread=spread)
        products = _Products(owners)
        with recomputing(model, group, recompute):
            run_pass(model, batches, group, products, from_outputs, name, head=head)
        for target in group:
            product[target.name] = products.take(target)
    return product


def sum_bytes(group: Sequence[Target]) -> int:
    """Bytes of the layers of a vector: one matrix [O, I] for each target."""
    return sum(
        target.shape[0] * target.shape[1] * sum_dtype(target.dtype).itemsize for target in group
    )


class _Products:
    """Σ g aᵀ over live rows, one matrix [O, I] a target."""

    def __init__(self, owners: Owners) -> None:
        self._owners = owners
        self._sums = {target.name: _zeros(target) for target in owners.own}
        self._inputs: PendingInputs[Rows] = PendingInputs(owners.own)

    def begin(self, batch: Batch, together: Sequence[Batch]) -> None:
        self._owners.begin(batch, together)

    def on_input(self, target: Target, live: LiveRows) -> None:
        rows = self._owners.rows(target, live)
        if target.name in self._sums:
            self._inputs.put(target, rows)

    def on_gradient(self, target: Target, live: LiveRows) -> None:
        rows = self._owners.rows(target, live)
        if target.name not in self._sums:
            return
        sum_OI = self._sums[target.name]
        for (g_RO, _), (a_RI, _) in zip(rows, self._inputs.take(target), strict=True):
            sum_OI.addmm_(g_RO.to(sum_OI.dtype).T, a_RI.to(sum_OI.dtype))

    def tensors(self) -> dict[str, Tensor]:
        return self._sums

    def take(self, target: Target) -> Tensor:
        """The sum over all processes of one target, in all of them; it is kept no longer."""
        if not self._owners.spread:
            return distributed.all_reduce(self._sums.pop(target.name))
        sum_OI = self._sums.pop(target.name, None)
        whole_OI = _zeros(target) if sum_OI is None else sum_OI
        return distributed.broadcast(self._owners.owner(target), whole_OI)


def _zeros(target: Target) -> Tensor:
    """A layer [O, I] of a vector."""
    return torch.zeros(target.shape, dtype=sum_dtype(target.dtype), device=target.device)


def ones(targets: Sequence[Target]) -> Vector:
    """The vector of ones, each layer made when it is read."""
    of = {target.name: target for target in targets}

    def layer(name: str) -> Tensor:
        return torch.ones(of[name].shape, dtype=of[name].dtype, device=of[name].device)

    return Layerwise(of, layer)


Tangents = Callable[[nn.Module, Batch, Sequence[Target], Vector], tuple[Tensor, Tensor]]
"""(model, batch, targets, δ) -> (h, J δ): final hidden states [N, D] at the loss positions, and
their derivative along δ."""


def tangents_of(model: nn.Module, targets: Sequence[Target]) -> Tangents:
    """:func:`tangents` if forward mode works in ``model``, tested on two tokens; else
    :func:`differences`."""
    tokens_BT = torch.arange(2, device=targets[0].device)[None]
    try:
        _, tangent_BTD = _dual_states(model, tokens_BT, targets, ones(targets))
    except NotImplementedError:
        return differences
    except RuntimeError as error:
        if "forward AD" in str(error) or "forward mode AD" in str(error):
            return differences
        raise
    return differences if tangent_BTD is None else tangents


def tangents(
    model: nn.Module, batch: Batch, targets: Sequence[Target], delta: Vector
) -> tuple[Tensor, Tensor]:
    """(h, J δ): final hidden states [N, D] at the loss positions and their derivative along δ.

    One forward-mode pass. A target layer's output W a has the tangent W ȧ + δ a. Attention uses
    PyTorch's math kernel and experts transformers' plain loop, whose operations support forward
    mode. The routing of tokens to experts is treated as constant.
    """
    primal_BTD, tangent_BTD = _dual_states(model, batch.input_BT, targets, delta)
    assert tangent_BTD is not None  # see tangents_of
    return batch.at_loss(primal_BTD), batch.at_loss(tangent_BTD)


def differences(
    model: nn.Module, batch: Batch, targets: Sequence[Target], delta: Vector
) -> tuple[Tensor, Tensor]:
    """Like :func:`tangents`, by (h(ε) − h(−ε)) / 2ε, where a target's output is W a + ε δ a.

    ε is chosen so that h changes by η = eps^⅓ of its size. The truncation error η² and the rounding
    error eps/η are then of the same order: 2e-5 of J δ in float32, apart from rounding within the
    model, and 4 % in bfloat16. Costs four forward passes.
    """
    aim = torch.finfo(targets[0].dtype).eps ** (1 / 3)
    moved: list[Tensor] = []

    def at(step: float) -> Tensor:
        with _shifted(targets, delta, step, moved), torch.no_grad():
            hidden_BTD = hidden_states(model, batch.input_BT)
        return batch.at_loss(hidden_BTD)

    hidden_ND = at(0.0)
    size = hidden_ND.float().norm().item()
    ratio = torch.stack(moved).sum().sqrt().item()  # relative change of outputs for step 1
    first = aim / ratio if ratio else 0.0
    change = (at(first).double() - hidden_ND.double()).norm().item() / (size or 1.0)
    step = first * min(max(aim / change, 0.01), 100.0) if change else first
    difference_ND = at(step).double() - at(-step).double()
    tangent_ND = difference_ND / (2 * step) if step else difference_ND
    return hidden_ND, tangent_ND.to(hidden_ND.dtype)


@contextlib.contextmanager
def _shifted(
    targets: Sequence[Target], delta: Vector, step: float, moved: list[Tensor]
) -> Iterator[None]:
    """Within the ``with``, each target's output is W a + step · δ a.

    With step 0, ‖δ a‖² / ‖W a‖² of each target is appended to ``moved``.
    """

    def hook(target: Target) -> ForwardHook:
        def forward_hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            entering = target.inputs(args[0]) @ delta[target.name].to(args[0]).T
            if step == 0:
                norms = entering.double().norm(), output.double().norm().clamp(min=1e-30)
                moved.append((norms[0] / norms[1]).square())
                return output
            return output + step * entering

        return forward_hook

    with hooked(targets, hook):
        yield


def _dual_states(
    model: nn.Module, input_BT: Tensor, targets: Sequence[Target], delta: Vector
) -> tuple[Tensor, Tensor | None]:
    with (
        _plain_experts(model),
        _entering(targets, delta),  # experts that are targets run as it says
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
    ):
        dual = forward_ad.unpack_dual(hidden_states(model, input_BT))
        return dual.primal, dual.tangent


@contextlib.contextmanager
def _plain_experts(model: nn.Module) -> Iterator[None]:
    """Within the ``with``, experts run in transformers' plain loop, not in a grouped kernel."""
    name = "_experts_implementation_internal"  # what transformers' forward pass reads
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    before = [(vars(c), vars(c)[name]) for c in configs.values() if name in vars(c)]
    try:
        for settings, _ in before:
            settings[name] = "eager"
        yield
    finally:
        for settings, value in before:
            settings[name] = value


@contextlib.contextmanager
def _entering(targets: Sequence[Target], delta: Vector) -> Iterator[None]:
    def hook(target: Target) -> ForwardHook:
        def forward_hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            a = target.inputs(forward_ad.unpack_dual(args[0]).primal)
            primal, tangent = forward_ad.unpack_dual(output)
            entering = a @ delta[target.name].to(a).T
            total = entering if tangent is None else tangent + entering
            dual: Tensor = forward_ad.make_dual(primal, total)
            return dual

        return forward_hook

    with hooked(targets, hook), forward_ad.dual_level():
        yield
