"""Weights that are trained in place, and weights that are put back bit for bit.

An optimiser works on *master* tensors in float32 or better, whatever the model's dtype: a step of
1e-5 is lost in a bfloat16 weight.

Of a sharded model each process has the masters of its own parts, and puts back its own parts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from kfade.models.load import frozen
from kfade.models.targets import refuse_shared_memory
from kfade.runtime import distributed


class Masters:
    """The named parameters of a model, each with the master tensor that an optimiser changes.

    Raises:
        InputError: a named parameter shares its memory with another parameter.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        refuse_shared_memory(model, names)
        own = dict(model.named_parameters(remove_duplicate=False))
        self._model = model
        self.names = list(names)
        self.parameters = {name: own[name] for name in names}
        self.tensors: dict[str, Tensor] = {}
        self._apart: list[str] = []  # masters with a storage of their own
        for name, parameter in self.parameters.items():
            given, dtype = parameter.detach(), master_dtype(parameter)
            part = distributed.own_part(given)
            # A whole parameter in float32 or better is its own master: detached, they share their
            # storage. FSDP may move the storage of a part.
            if part is not given or part.dtype != dtype:
                self._apart.append(name)
            self.tensors[name] = part.to(dtype, copy=part is not given)

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """The model in evaluation mode, with gradients of these parameters alone.

        No gradients are left behind.
        """
        with frozen(self._model):
            try:
                for parameter in self.parameters.values():
                    parameter.requires_grad_(True)
                yield
            finally:
                for name, parameter in self.parameters.items():
                    parameter.grad = self.tensors[name].grad = None

    def collect(self) -> None:
        """After a backward pass: move the parameters' gradients to their masters, and add there."""
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            master, gradient = self.tensors[name], distributed.own_part(parameter.grad)
            gradient = gradient.to(master.dtype)
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            parameter.grad = None

    def push(self) -> None:
        """After an optimiser step: round the masters to the parameters' dtype."""
        _copy(self.parameters, {name: self.tensors[name] for name in self._apart})


@contextlib.contextmanager
def restored(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Put ``tensors`` back bit for bit on leaving; yields copies of them as they were.

    The copies are on the CPU: a second copy of all weights may not fit on the device. Of a sharded
    tensor they are of this process's part.
    """
    before = {
        name: distributed.own_part(tensor.detach()).to("cpu", copy=True)
        for name, tensor in tensors.items()
    }
    try:
        yield before
    finally:
        _copy(tensors, before)


def master_dtype(tensor: Tensor) -> torch.dtype:
    """float32, or the tensor's own dtype where that is wider."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _copy(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            distributed.own_part(tensors[name]).copy_(value)
