"""What is trained: the weights themselves, or low-rank changes of them. Both give plain deltas.

Within ``training`` the model computes with what is trained; afterwards it is bit for bit what it
was. Of a sharded model each process trains its own parts of the weights.

Shapes: I inputs, O outputs of a linear map, R rank.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kfade.curvature.vectors import Layerwise, Vector
from kfade.models.load import frozen
from kfade.models.masters import Masters, master_dtype, restored
from kfade.models.targets import Target
from kfade.runtime import distributed


class Trainable(Protocol):
    """The weights of a training run, as the training loop uses them."""

    names: list[str]
    """Parameters of the model that training changes."""
    tensors: dict[str, Tensor]
    """What the optimiser changes, in float32 or better."""

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """By the names of ``tensors``, what these are divided like over the processes."""
        ...

    def training(self) -> AbstractContextManager[None]:
        """Within the ``with``, the model computes with ``tensors`` and they get gradients."""
        ...

    def at_base(self) -> AbstractContextManager[None]:
        """Within ``training`` and the ``with``, the model is as it was before."""
        ...

    def reseed(self, seed: int) -> None:
        """Seed whatever is random in a step."""
        ...

    def collect(self) -> None:
        """After a backward pass: add its gradients to those of ``tensors``."""
        ...

    def push(self) -> None:
        """After ``tensors`` have changed: make the model compute with them."""
        ...

    def deltas(self) -> Vector:
        """Within ``training``: the change by parameter name, on the CPU, in float32 or better.

        It is computed at once. Of a sharded model each process keeps its part, and a layer is
        gathered when it is read, by all processes together.
        """
        ...


class Dense(Masters):
    """The named parameters of a model, trained in place; a tied one goes by one name."""

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """See :class:`Trainable`."""
        with restored(self.parameters) as self._base, super().training():
            yield

    @contextlib.contextmanager
    def at_base(self) -> Iterator[None]:
        """See :class:`Trainable`."""
        with restored(self.parameters):
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    distributed.own_part(parameter).copy_(self._base[name])
            yield

    def reseed(self, seed: int) -> None:
        """Nothing to do: no step is random."""

    def deltas(self) -> Vector:
        """See :class:`Trainable`."""
        parts = {n: t.cpu() - self._base[n].to(t.dtype) for n, t in self.tensors.items()}
        return gathered(parts, self.parameters)


class LowRank:
    """Low-rank changes ΔW = (α/R) B A of linear maps, A [R, I], B [O, R] (Hu et al. 2021).

    B begins at zero; A is drawn as PyTorch draws a linear map's weight. The weights of the maps do
    not change: hooks add (α/R) B A dropout(x) to the maps' outputs.
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
            a_RI = torch.empty(rank, inputs, dtype=master_dtype(weight), device="cpu")
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
        """Seed the dropout masks."""
        self._random.manual_seed(seed)

    def collect(self) -> None:
        """Nothing to do: backward passes add to the gradients of ``tensors``."""

    def push(self) -> None:
        """Nothing to do: the hooks read ``tensors``."""

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """See :class:`Trainable`; low-rank changes are whole in every process."""
        return self.tensors

    def deltas(self) -> Vector:
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


def gathered(parts: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> Vector:
    """The whole tensors of which this process has ``parts``, each gathered when it is read."""
    return Layerwise(parts, lambda name: distributed.gather_like(like[name], parts[name]).cpu())
