"""A weight to change, and what is said of those that cannot be."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Target:
    """One weight to change, seen as W of shape [O, I] that maps inputs a to outputs W a (+ b)."""

    name: str
    """The weight's parameter name in the model."""
    module: nn.Module
    block: int
    """Number of its decoder block, from 0."""
    shape: tuple[int, int]
    """(O, I); I counts one more for a joint bias."""
    transposed: bool
    """GPT-2's Conv1D stores W as [I, O]."""
    bias: str | None
    """Parameter name of the bias that is treated as one more column of W, if any."""
    input_of: str
    """Name of the first target that reads the same input tensor: gate and up share one A."""

    @property
    def weight(self) -> Tensor:
        """The weight as the module holds it now."""
        return cast(Tensor, self.module.weight)

    def inputs(self, a: Tensor) -> Tensor:
        """Layer inputs [..., I], with a column of ones for a joint bias."""
        return a if self.bias is None else torch.cat([a, torch.ones_like(a[..., :1])], dim=-1)

    def to_parameters(self, matrix_OI: Tensor) -> dict[str, Tensor]:
        """A change of [W, b] as changes of parameters, each in its own layout."""
        weight = matrix_OI if self.bias is None else matrix_OI[:, :-1]
        changes = {self.name: (weight.T if self.transposed else weight).contiguous()}
        if self.bias is not None:
            changes[self.bias] = matrix_OI[:, -1].contiguous()
        return changes

    def from_parameters(self, changes: Mapping[str, Tensor]) -> Tensor:
        """Inverse of :meth:`to_parameters`: the matrix [O, I] of named parameter changes."""
        weight = changes[self.name].T if self.transposed else changes[self.name]
        return weight if self.bias is None else torch.cat([weight, changes[self.bias][:, None]], 1)


@contextlib.contextmanager
def hooked(
    targets: Sequence[Target], hook: Callable[[Target], Callable[..., Any]], **options: bool
) -> Iterator[None]:
    """Within the ``with``, ``hook(target)`` is called after each forward pass of a target.

    ``options``: as of :meth:`torch.nn.Module.register_forward_hook`.
    """
    handles = [target.module.register_forward_hook(hook(target), **options) for target in targets]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class LeftOut:
    """A weight of the blocks that the default would take and cannot."""

    name: str
    """Parameter name."""
    kind: str
    """What it is, in the plural, as a summary counts it."""
    reason: str
    """Why it cannot be changed; reads on after the name."""


@dataclass(frozen=True)
class Choice:
    """The weights to change, and those that were left out."""

    targets: list[Target]
    """In the order of the forward pass."""
    left_out: list[LeftOut]
    """Empty where a glob was given: what it matches is taken or refused."""

    @property
    def summary(self) -> str | None:
        """What was left out, in one line; None for nothing."""
        kinds: dict[str, list[str]] = {}
        for weight in self.left_out:
            kinds.setdefault(weight.kind, []).append(weight.name)
        parts = [
            f"{len(names)} {kind} ({names[0]}{', ...' if len(names) > 1 else ''})"
            for kind, names in kinds.items()
        ]
        return "left out, since kfade cannot change them: " + "; ".join(parts) if parts else None
