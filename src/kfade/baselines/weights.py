"""What is trained: weights themselves, or low-rank changes of them; both end in plain deltas.

The optimiser works on tensors in float32 or better, whatever the model's dtype: a step of 1e-5 is
lost in a bfloat16 weight. Within ``training`` the model computes with what is trained; afterwards
it is bit for bit what it was.

Shapes: I inputs, O outputs of a linear map, R rank.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kfade.models.load import frozen
from kfade.models.targets import Target, refuse_shared_memory


class Trainable(Protocol):
    """What the training loop asks of the weights that it trains."""

    names: list[str]
    """Parameters of the model that will have changed."""
    tensors: dict[str, Tensor]
    """What the optimiser changes."""

    def training(self) -> AbstractContextManager[None]:
        """The model computes with ``tensors``, and they get gradients."""
        ...

    def at_base(self) -> AbstractContextManager[None]:
        """Within ``training``: the model as it was, for a while."""
        ...

    def reseed(self, seed: int) -> None:
        """Key whatever is random in a step."""
        ...

    def collect(self) -> None:
        """After a backward pass: add what it gave to the gradients of ``tensors``."""
        ...

    def push(self) -> None:
        """After a change of ``tensors``: let the model compute with them."""
        ...

    def deltas(self) -> dict[str, Tensor]:
        """Within ``training``: the change by parameter name, on the CPU, in float32 or better."""
        ...


class Dense:
    """The named parameters of a model, trained in place; a tied one goes by one name."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        own = dict(model.named_parameters(remove_duplicate=False))
        refuse_shared_memory(model, names)
        self.names = list(names)
        self._model = model
        self._parameters = {name: own[name] for name in names}
        # Not on the device: a second copy of all weights may not fit there.
        self._base = {n: p.detach().to("cpu", copy=True) for n, p in self._parameters.items()}
        # A parameter in float32 or better is its own master; detached, they share their storage.
        self.tensors = {n: p.detach().to(master_dtype(p)) for n, p in self._parameters.items()}

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """See :class:`Trainable`."""
        with frozen(self._model):
            try:
                for parameter in self._parameters.values():
                    parameter.requires_grad_(True)
                yield
            finally:
                self._set(self._base)
                for name, parameter in self._parameters.items():
                    parameter.grad = self.tensors[name].grad = None

    @contextlib.contextmanager
    def at_base(self) -> Iterator[None]:
        """See :class:`Trainable`."""
        present = {n: p.detach().clone() for n, p in self._parameters.items()}
        try:
            self._set(self._base)
            yield
        finally:
            self._set(present)

    def reseed(self, seed: int) -> None:
        """Nothing is random."""

    def collect(self) -> None:
        """See :class:`Trainable`."""
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                tensor = self.tensors[name]
                gradient = parameter.grad.to(tensor.dtype)
                if tensor.grad is None:
                    tensor.grad = gradient
                else:
                    tensor.grad += gradient
                parameter.grad = None

    def push(self) -> None:
        """See :class:`Trainable`."""
        self._set({n: t for n, t in self.tensors.items() if t.dtype != self._base[n].dtype})

    def deltas(self) -> dict[str, Tensor]:
        """See :class:`Trainable`."""
        return {n: t.cpu() - self._base[n].to(t.dtype) for n, t in self.tensors.items()}

    def _set(self, values: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in values.items():
                self._parameters[name].copy_(value)


class LowRank:
    """Low-rank changes ΔW = (α/R) B A of linear maps, A [R, I], B [O, R]; B begins at zero.

    Hu et al. 2021; A is drawn as PyTorch draws a linear map's weight. The maps themselves stay as
    they are: hooks add (α/R) B A dropout(x) to their outputs.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[Target],
        *,
        rank: int,
        alpha: float,
        dropout: float,
        seed: int,
    ) -> None:
        self.names = [target.name for target in targets]
        self.tensors = {}
        self._model, self._targets = model, list(targets)
        self._scale, self._dropout = alpha / rank, dropout
        self._at_base = False
        generator = torch.Generator().manual_seed(seed)
        for target in targets:
            outputs, inputs = target.shape
            weight = target.weight
            bound = 1 / math.sqrt(inputs)
            a_RI = torch.empty(rank, inputs, dtype=master_dtype(weight))
            a_RI.uniform_(-bound, bound, generator=generator)
            self.tensors[f"{target.name}.A"] = a_RI.to(weight.device).requires_grad_()
            b_OR = torch.zeros(outputs, rank, dtype=a_RI.dtype, device=weight.device)
            self.tensors[f"{target.name}.B"] = b_OR.requires_grad_()
        self._random = torch.Generator(targets[0].weight.device).manual_seed(seed)

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """See :class:`Trainable`."""
        with frozen(self._model):
            handles = [t.module.register_forward_hook(self._hook(t.name)) for t in self._targets]
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()

    @contextlib.contextmanager
    def at_base(self) -> Iterator[None]:
        """See :class:`Trainable`."""
        self._at_base = True
        try:
            yield
        finally:
            self._at_base = False

    def reseed(self, seed: int) -> None:
        """Key the dropout masks."""
        self._random.manual_seed(seed)

    def collect(self) -> None:
        """Gradients are where they belong."""

    def push(self) -> None:
        """The hooks read the tensors themselves."""

    def deltas(self) -> dict[str, Tensor]:
        """See :class:`Trainable`."""
        changes: dict[str, Tensor] = {}
        for target in self._targets:
            a_RI, b_OR = (self.tensors[f"{target.name}.{part}"].detach() for part in "AB")
            changes.update(target.to_parameters(self._scale * (b_OR @ a_RI).cpu()))
        return changes

    def _hook(self, name: str) -> Any:
        def forward_hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Any:
            if self._at_base:
                return None
            x = args[0]
            if self._dropout and torch.is_grad_enabled():  # training, not measuring
                kept = torch.rand(x.shape, device=x.device, generator=self._random) >= self._dropout
                x = x * kept / (1 - self._dropout)
            a_RI, b_OR = (self.tensors[f"{name}.{part}"].to(x.dtype) for part in "AB")
            return output + self._scale * ((x @ a_RI.T) @ b_OR.T)

        return forward_hook


def master_dtype(tensor: Tensor) -> torch.dtype:
    """float32, or the tensor's own dtype where that is wider."""
    return torch.promote_types(tensor.dtype, torch.float32)
