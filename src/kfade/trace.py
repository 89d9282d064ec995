"""What one pass of a model costs, found without running it: flops, and bytes held on the way.

The model runs on fake tensors, which have shapes, dtypes and a device but no numbers. So there is
no formula for each model family: the operations are those of the real pass, attention kernels
included, and what autograd keeps is what it would keep.

Shapes: B sequences, T positions of each.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from kfade.curvature.capture import capture
from kfade.head import hidden_states
from kfade.layers import Target
from kfade.models import frozen


@dataclass(frozen=True)
class PassCost:
    """Flops and bytes of one batch [B, T] through the blocks of a model, its head left out."""

    shape: tuple[int, int]
    """(B, T)."""
    forward_flops: float
    backward_flops: dict[str, float]
    """Input of targets (``Target.input_of``) -> flops of going back, by activations only, from the
    final hidden states to the outputs of the targets that read it."""
    held_bytes: dict[str, int]
    """Input of targets -> what the forward pass keeps for going back that far."""
    forward_bytes: int
    """Most held at a time by a forward pass that keeps nothing."""
    surplus_bytes: int
    """Most held at a time by forward and backward, beyond the largest ``held_bytes``."""

    @property
    def positions(self) -> int:
        """B · T."""
        return self.shape[0] * self.shape[1]


def trace_pass(model: Any, targets: Sequence[Target], shape: tuple[int, int]) -> PassCost:
    """The cost of a pass over a batch of that shape, as ``passes.backward`` makes it.

    Args:
        model: a real model, which nothing is asked of but shapes, or one of fake tensors.
        targets: in the order of the forward pass.
    """
    base = model.base_model
    tensors = [*base.named_parameters(), *base.named_buffers()]
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    real: dict[str, Tensor] = {
        n: mode.from_tensor(t.detach()) for n, t in tensors if not isinstance(t, FakeTensor)
    }
    stand_in = SimpleNamespace(
        base_model=lambda **inputs: functional_call(base, real, kwargs=inputs)
    )
    # The numbers of the tokens are real: whether a mask is needed depends on their positions.
    input_BT = torch.zeros(shape, dtype=torch.long, device=targets[0].weight.device)
    weights = [*real.values(), *(t for _, t in tensors if isinstance(t, FakeTensor))]
    with frozen(model):
        flops, live = _Flops(), _Live(weights)
        with torch.no_grad(), flops, live:
            hidden_states(stand_in, input_BT)
        forward_flops, forward_bytes = flops.get_total_flops(), live.peak

        flops, live = _Flops(), _Live(weights)
        before: dict[str, int] = {}
        backward_flops: dict[str, float] = {}

        def about_to_run(target: Target):
            return lambda module, args: before.setdefault(target.input_of, live.made) and None

        def on_gradient(target: Target, g_BTO: Tensor) -> None:
            # By the first of them: going on below the others comes only where it must go lower.
            backward_flops.setdefault(target.input_of, flops.get_total_flops() - forward_flops)

        with contextlib.ExitStack() as entered:
            for target in targets:
                entered.enter_context(target.module.register_forward_pre_hook(about_to_run(target)))
            entered.enter_context(capture(targets, on_gradient=on_gradient))
            entered.enter_context(flops)
            entered.enter_context(live)
            with torch.enable_grad():
                hidden_BTD = hidden_states(stand_in, input_BT)
            held_bytes = {name: live.made_since(number) for name, number in before.items()}
            hidden_BTD.backward(torch.empty_like(hidden_BTD))
    return PassCost(
        shape,
        forward_flops,
        backward_flops,
        held_bytes,
        forward_bytes,
        live.peak - max(held_bytes.values()),
    )


class _Flops(FlopCounterMode):
    """Multiplications and additions of matrix products; attention counted whole, not its half."""

    def __init__(self) -> None:
        aten = torch.ops.aten  # the CPU's attention, which torch does not count by itself
        super().__init__(
            display=False,
            custom_mapping={
                aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
                aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_back_flops,
            },
        )


def _attention_flops(query: Any, key: Any, value: Any, *rest: Any, **options: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_back_flops(
    gradient: Any, query: Any, key: Any, value: Any, *rest: Any, **options: Any
) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


class _Live(TorchDispatchMode):
    """Bytes of the tensors that are alive, and their peak; those of ``apart`` do not count."""

    def __init__(self, apart: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = self.made = 0
        self._apart = [tensor.untyped_storage() for tensor in apart]
        self._ignored = {id(storage) for storage in self._apart}
        self._alive: dict[int, tuple[int, int]] = {}
        """Address -> (how many were made before it, its bytes)."""

    def made_since(self, number: int) -> int:
        """Bytes that are alive of all but the first ``number`` tensors that were made."""
        return sum(size for order, size in self._alive.values() if order >= number)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
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
