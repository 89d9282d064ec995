"""Flops and memory of one pass through a model, measured without weights.

The model runs on fake tensors, which have shapes, dtypes and a device but no values. The operations
are those of the real pass, including its attention kernels, and autograd keeps the same tensors. So
no formula for each model family is needed. Experts of a layer get equally many rows (``experts``).

Shapes: B sequences, T positions of each.
"""

from __future__ import annotations

import contextlib
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from kfade.curvature.capture import capture
from kfade.curvature.recompute import recomputing
from kfade.models.experts import Routing
from kfade.models.head import hidden_states
from kfade.models.layers import decoder_blocks
from kfade.models.load import frozen
from kfade.models.targets import Target

Hook = Callable[[nn.Module, tuple[Any, ...]], None]


@dataclass(frozen=True)
class PassCost:
    """Flops and bytes of one batch [B, T] through the blocks of a model, without its head.

    The keys of the dictionaries are ``Target.tensor_of``. Each value is for a pass whose backward
    pass ends at the outputs of the targets with this input.
    """

    shape: tuple[int, int]
    """(B, T)."""
    recompute: bool
    """Whether blocks run again in the backward pass."""
    forward_flops: float
    """Flops of a forward pass."""
    repeated_flops: dict[str, float]
    """Flops of the blocks that run again in the backward pass."""
    backward_flops: dict[str, float]
    """Flops of the backward pass from the final hidden states, with activation gradients only."""
    held_bytes: dict[str, int]
    """Bytes that the forward pass keeps for the backward pass."""
    rows: dict[str, int]
    """Rows of this input: B · T, or those of an expert."""
    forward_bytes: int
    """Peak bytes of a forward pass without gradients."""
    surplus_bytes: int
    """Peak bytes of a forward and backward pass, minus the largest of ``held_bytes``."""

    @property
    def positions(self) -> int:
        """B · T."""
        return self.shape[0] * self.shape[1]


def trace_pass(
    model: Any, targets: Sequence[Target], shape: tuple[int, int], *, recompute: bool = False
) -> PassCost:
    """The cost of a pass of ``passes.backward`` over a batch of shape ``shape`` (B, T).

    Args:
        model: its tensors are real or fake; only their shapes are used.
        targets: in the order of the forward pass.
        recompute: see :func:`~kfade.curvature.recompute.recomputing`.
    """
    fakes = _fakes(model.base_model)
    input_BT = _tokens(shape, targets[0].device)
    trace = _Trace(model, targets, input_BT, list(fakes.values()), recompute)
    with frozen(model), recomputing(model, targets, recompute):
        cost: PassCost = _with_weights(model.base_model, fakes, trace.cost)
    return cost


def training_pass_bytes(model: Any, names: Sequence[str], shape: tuple[int, int]) -> int:
    """Peak bytes of a forward and backward pass through the blocks, beside the weights.

    The parameters ``names`` get gradients, each of which is dropped when it is known: of them the
    largest counts, if it is there at the peak.

    Args:
        model: its tensors are real or fake; only their shapes are used.
        shape: (B, T) of a batch.
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    trained = {id(own[name]) for name in names}
    base = model.base_model
    chosen = [n for n, p in base.named_parameters() if id(p) in trained]
    fakes = _fakes(base)
    input_BT = _tokens(shape, next(base.parameters()).device)

    def peak() -> int:
        for name in chosen:
            fakes[name].requires_grad_()
            fakes[name].register_post_accumulate_grad_hook(_drop_gradient)
        with torch.enable_grad(), _Live(fakes.values()) as live:
            hidden_BTD = hidden_states(model, input_BT)
            if hidden_BTD.requires_grad:
                hidden_BTD.backward(torch.empty_like(hidden_BTD))
        return live.peak

    with frozen(model):
        found: int = _with_weights(base, fakes, peak)
    return found


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _fakes(base: nn.Module) -> dict[str, Tensor]:
    """Fake tensors for all parameters and buffers."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    tensors = [*base.named_parameters(), *base.named_buffers()]
    return {n: t if isinstance(t, FakeTensor) else mode.from_tensor(t.detach()) for n, t in tensors}


def _tokens(shape: tuple[int, int], device: torch.device) -> Tensor:
    """Numbers of tokens. They are real: whether a mask is needed depends on their positions."""
    return torch.zeros(shape, dtype=torch.long, device=device)


def _with_weights(base: nn.Module, fakes: Mapping[str, Tensor], work: Callable[[], Any]) -> Any:
    """What ``work`` returns while ``base`` computes with the tensors ``fakes``."""
    stand_ins = {f"inner.{name}": fake for name, fake in fakes.items()}
    return functional_call(_Wrapper(base), stand_ins, (work,))


class _Wrapper(nn.Module):
    """Makes :func:`functional_call` replace the weights of ``inner`` while a function runs.

    The function may then run the model, or parts of it, several times.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, work: Callable[[], Any]) -> Any:
        return work()


@dataclass(frozen=True)
class _Trace:
    """Measures a model that runs on fake tensors."""

    model: Any
    targets: Sequence[Target]
    input_BT: Tensor
    weights: Sequence[Tensor]
    recompute: bool

    def cost(self) -> PassCost:
        """Measure a forward pass without gradients, then a forward and backward pass."""
        forward_flops, above, forward_bytes = self._forward()
        flops, live = _Flops(), _Live(self.weights)
        before: dict[str, tuple[int, int]] = {}
        backward_flops: dict[str, float] = {}
        rows: dict[str, int] = {}
        repeated = {t.tensor_of: above[t.block] * self.recompute for t in self.targets}

        def about_to_run(target: Target) -> Hook:
            def note(module: nn.Module, args: tuple[Any, ...]) -> None:
                own = sum(x.untyped_storage().nbytes() for x in args[:1] if self.recompute)
                before.setdefault(target.tensor_of, (live.made, own))

            return note

        def on_gradient(target: Target, g_BTO: Tensor, routing: Routing | None) -> None:
            # The pass can end at the first gradient of the targets with this input.
            done = flops.get_total_flops() - forward_flops - repeated[target.tensor_of]
            backward_flops.setdefault(target.tensor_of, done)
            rows[target.tensor_of] = g_BTO.shape[:-1].numel()

        _, blocks = decoder_blocks(self.model)
        with contextlib.ExitStack() as entered:
            for target in self.targets:
                # A block that runs again keeps only its input, which was made before the block.
                module = blocks[target.block] if self.recompute else target.module
                entered.enter_context(module.register_forward_pre_hook(about_to_run(target)))
            entered.enter_context(capture(self.targets, on_gradient=on_gradient))
            entered.enter_context(flops)
            entered.enter_context(live)
            with torch.enable_grad():
                hidden_BTD = hidden_states(self.model, self.input_BT)
            made_since = live.made_since()
            held = {name: made_since(number) + own for name, (number, own) in before.items()}
            hidden_BTD.backward(torch.empty_like(hidden_BTD))
        surplus = live.peak - max(held.values())
        sequences, positions = self.input_BT.shape
        return PassCost(
            (sequences, positions),
            self.recompute,
            forward_flops,
            repeated,
            backward_flops,
            held,
            rows,
            forward_bytes,
            surplus,
        )

    def _forward(self) -> tuple[float, dict[int, float], int]:
        """(flops, flops from each block to the last, peak bytes) of a forward pass."""
        flops, live = _Flops(), _Live(self.weights)
        below: dict[int, float] = {}

        def about_to_run(index: int) -> Hook:
            return lambda module, args: below.update({index: flops.get_total_flops()})

        with contextlib.ExitStack() as entered:
            for index, block in enumerate(decoder_blocks(self.model)[1]):
                entered.enter_context(block.register_forward_pre_hook(about_to_run(index)))
            entered.enter_context(torch.no_grad())
            entered.enter_context(flops)
            entered.enter_context(live)
            hidden_states(self.model, self.input_BT)
        total = flops.get_total_flops()
        return total, {index: total - done for index, done in below.items()}, live.peak


class _Flops(FlopCounterMode):
    """Counts flops of matrix products and of attention, including its masked half."""

    def __init__(self) -> None:
        aten = torch.ops.aten
        # PyTorch has no formula for the CPU's kernel, and before 2.11 none for grouped queries.
        forward = (
            aten._scaled_dot_product_flash_attention_for_cpu,
            aten._scaled_dot_product_flash_attention,
            aten._scaled_dot_product_efficient_attention,
            aten._scaled_dot_product_cudnn_attention,
        )
        backward = (
            aten._scaled_dot_product_flash_attention_for_cpu_backward,
            aten._scaled_dot_product_flash_attention_backward,
            aten._scaled_dot_product_efficient_attention_backward,
            aten._scaled_dot_product_cudnn_attention_backward,
        )
        super().__init__(
            display=False,
            custom_mapping={
                **dict.fromkeys(forward, _attention_flops),
                **dict.fromkeys(backward, _attention_back_flops),
            },
        )


def _attention_flops(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], *rest: Any, **options: Any
) -> int:
    """Flops of q·kᵀ and p·v for shapes [B, heads, positions, width]; heads are the query's."""
    b, heads, asking, width = query
    return 2 * b * heads * asking * key[-2] * (width + value[-1])


def _attention_back_flops(
    gradient: Any,
    query: Sequence[int],
    key: Sequence[int],
    value: Sequence[int],
    *rest: Any,
    **options: Any,
) -> int:
    """Flops of q·kᵀ again, and of two products for each product of the forward pass."""
    b, heads, asking, width = query
    again = 2 * b * heads * asking * key[-2] * width
    return again + 2 * _attention_flops(query, key, value)


class _Live(TorchDispatchMode):
    """Bytes of the live tensors and their peak, without the tensors in ``excluded``."""

    def __init__(self, excluded: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = self.made = 0
        self._excluded = [tensor.untyped_storage() for tensor in excluded]  # keeps ids unique
        self._ignored = {id(storage) for storage in self._excluded}
        self._alive: dict[int, tuple[int, int]] = {}
        """{id of a storage: (number of storages created before it, its bytes)}."""

    def made_since(self) -> Callable[[int], int]:
        """number -> bytes of the storages alive now, without the first ``number`` ever created."""
        alive = sorted(self._alive.values(), reverse=True)
        orders = [-order for order, _ in alive]
        sums = [0, *accumulate(size for _, size in alive)]
        return lambda number: sums[bisect_right(orders, -number)]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # autograd asks often; this is the fastest answer
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, FakeTensor):
                self._note(value.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key not in self._ignored and key not in self._alive:
            self._alive[key] = (self.made, size)
            self.made += 1
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._alive.pop(key)[1]
