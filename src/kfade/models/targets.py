"""Targets: the weights to change, and the reasons why others cannot be changed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from kfade.errors import InputError
from kfade.models.experts import ExpertLayer, ExpertMap, Routing, routed


@dataclass(frozen=True)
class Target:
    """One weight to change, seen as W of shape [O, I] that maps inputs a to outputs W a (+ b)."""

    name: str
    """The weight's parameter name in the model; ``name[e]`` for expert e of a fused parameter."""
    module: nn.Module
    block: int
    """Number of its decoder block, from 0."""
    shape: tuple[int, int]
    """(O, I); I counts one more for a joint bias."""
    transposed: bool
    """Whether W is stored as [I, O], as in GPT-2's Conv1D and some experts."""
    bias: str | None
    """Parameter name of the bias that is treated as one more column of W, if any."""
    input_of: str
    """Name of its input factor A. Targets that read the same input tensor share one, named after
    the first of them. Experts of a layer may share one, named after their whole parameter."""

    @property
    def weight(self) -> Tensor:
        """The weight as the module holds it now."""
        return cast(Tensor, self.module.weight)

    @property
    def dtype(self) -> torch.dtype:
        """That of the weight."""
        return self.parameter.dtype

    @property
    def device(self) -> torch.device:
        """That of the weight."""
        return self.parameter.device

    @property
    def parameter(self) -> Tensor:
        """The weight, or the whole of which it is a part: a part of a tensor takes time to make."""
        return self.module.whole if isinstance(self.module, ExpertMap) else self.weight

    @property
    def is_routed(self) -> bool:
        """Whether it belongs to an expert, which reads some of the positions only."""
        return isinstance(self.module, ExpertMap)

    @property
    def tensor_of(self) -> str:
        """Name of its input tensor: that of A, or its own for an expert, whose rows no other
        target reads."""
        return self.name if self.is_routed else self.input_of

    @property
    def routing(self) -> Routing | None:
        """Which positions the latest call read; None if it is not routed: all, in their order."""
        return self.module.routing if isinstance(self.module, ExpertMap) else None

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


ForwardHook = Callable[..., Any]
"""What :meth:`torch.nn.Module.register_forward_hook` takes."""


@contextlib.contextmanager
def hooked(
    targets: Sequence[Target],
    hook: Callable[[Target], ForwardHook],
    *,
    every: bool = True,
    **options: bool,
) -> Iterator[None]:
    """Within the ``with`` each target's module has the forward hook ``hook(target)``.

    Args:
        every: whether each target has to run.
        options: those of :meth:`torch.nn.Module.register_forward_hook`.

    Raises:
        InputError: on leaving, a target has not run.
    """
    ran: set[str] = set()

    def noting(target: Target) -> ForwardHook:
        own = hook(target)

        def forward_hook(*seen: Any) -> Any:
            ran.add(target.name)
            return own(*seen)

        return forward_hook

    handles = [target.module.register_forward_hook(noting(target), **options) for target in targets]
    try:
        with routed(expert_layers_of(targets)):
            yield
    finally:
        for handle in handles:
            handle.remove()
    for target in targets if every else ():
        if target.name not in ran:
            raise InputError(
                f"{target.name} did not run as a layer of its own in a forward pass: find the "
                "targets in this very model, as it is now, or leave it out with --target or "
                "--layers"
            )


def expert_layers_of(targets: Iterable[Target]) -> list[ExpertLayer]:
    """The layers of experts that targets belong to, each once."""
    maps = [target.module for target in targets if isinstance(target.module, ExpertMap)]
    return list({id(map_.layer): map_.layer for map_ in maps}.values())


def named(names: Iterable[str]) -> str:
    """The first of some names, and how many more there are."""
    first, *others = names
    return f"{first} and {len(others)} more" if others else first


def refuse_compiled(model: nn.Module) -> None:
    """Raises InputError where ``model`` or a module in it is compiled.

    Compiled code does not call hooks that were registered after it was compiled.
    """
    for name, module in model.named_modules():
        is_wrapper = "_orig_mod" in dict(module.named_children())  # of torch.compile
        if is_wrapper or getattr(module, "_compiled_call_impl", None) is not None:
            advice = "compile it after unlearning"
            if is_wrapper and not name:
                advice = "give the model within, model._orig_mod, or compile after unlearning"
            raise InputError(
                f"{name or type(module).__name__} is compiled (torch.compile), and compiled code "
                f"does not show the inputs of its layers: {advice}"
            )


def refuse_shared_memory(model: nn.Module, names: Collection[str]) -> None:
    """Raises InputError where a named parameter shares its memory with another parameter.

    Its gradient would not be the whole gradient with respect to its numbers.
    """
    first: dict[Hashable, str] = {}
    for name, parameter in model.named_parameters():
        other = first.setdefault(memory_of(parameter), name)
        if other != name and (name in names or other in names):
            raise InputError(
                f"{name} and {other} are two parameters on one memory: make them one, as in "
                "b.weight = a.weight"
            )


def memory_of(tensor: Tensor) -> Hashable:
    """A key that is the same for tensors whose first number lies at the same address.

    Tied weights, one parameter or several on one storage, have the same key. A tensor without a
    storage of its own here (fake, or spread over processes) has its own.
    """
    own = type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta and tensor.numel()
    return (tensor.device, tensor.data_ptr()) if own else id(tensor)


@dataclass(frozen=True)
class LeftOut:
    """A weight that the default would choose if it could be changed."""

    name: str
    """Parameter name."""
    kind: str
    """What it is, in the plural, for the summary."""
    reason: str
    """Why it cannot be changed: the rest of a sentence that begins with the name."""


@dataclass(frozen=True)
class Choice:
    """The weights to change, and those that were left out."""

    targets: list[Target]
    """In the order of the forward pass."""
    left_out: list[LeftOut]
    """Empty where a glob was given: a match that cannot be changed is an error."""

    @property
    def summary(self) -> str | None:
        """The weights that were left out, by kind, in one line; None if there are none."""
        kinds: dict[str, list[str]] = {}
        for weight in self.left_out:
            kinds.setdefault(weight.kind, []).append(weight.name)
        parts = [
            f"{len(names)} {kind} ({names[0]}{', ...' if len(names) > 1 else ''})"
            for kind, names in kinds.items()
        ]
        return "left out, since kfade cannot change them: " + "; ".join(parts) if parts else None
