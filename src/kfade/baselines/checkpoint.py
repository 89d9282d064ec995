"""The state of a training run: its evaluations, and what a resumed run needs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from kfade.baselines.weights import Trainable, gathered
from kfade.curvature.vectors import FileVector, Layerwise, Vector, read_through
from kfade.runtime import distributed
from kfade.runtime.tensors import write_tensors

Row = dict[str, float]
"""One evaluation: ``step``, what :meth:`~kfade.baselines.gauge.DriftGauge.measure` gives and, but
for the first, ``loss``, the mean training loss since the previous evaluation."""


@dataclass(frozen=True)
class Checkpoint:
    """The state of a training run right after an evaluation.

    Its tensors are whole. Where processes hold parts, a tensor is gathered when it is read, by all
    processes together. So a run may go on with another number of processes.
    """

    curve: list[Row]
    provenance: dict[str, Any]
    """Digests of weights and data, versions."""
    kept: Vector
    """Changes of weights to keep, by parameter name; none if those of the last evaluation are."""
    tensors: Vector
    """What is trained."""
    state: Vector
    """The optimiser's state, by ``NAME/KEY``."""

    @classmethod
    def of(
        cls,
        curve: Sequence[Row],
        provenance: dict[str, Any],
        kept: Vector,
        trainable: Trainable,
        optimizer: Optimizer,
    ) -> Checkpoint:
        """The present state. Save it at once: it holds the trained tensors themselves."""
        like, state, state_like = trainable.parameters, {}, {}
        for name, tensor in trainable.tensors.items():
            for key, value in optimizer.state[tensor].items():
                state[f"{name}/{key}"] = value
                # Step counts are scalars, which are not divided.
                state_like[f"{name}/{key}"] = like[name] if value.dim() else value
        tensors = gathered(trainable.tensors, like)
        return cls(list(curve), provenance, kept, tensors, gathered(state, state_like))

    def restore(self, trainable: Trainable, optimizer: Optimizer) -> None:
        """Set the trained tensors and the optimiser to this state."""
        like = trainable.parameters
        with torch.no_grad():
            for name, tensor in trainable.tensors.items():
                tensor.copy_(distributed.part_like(like[name], self.tensors[name]))
        for whole_name, value in self.state.items():
            name, _, key = whole_name.rpartition("/")
            tensor = trainable.tensors[name]
            if value.dim():
                value = distributed.part_like(like[name], value).to(tensor.device, copy=True)
            # Step counts are scalars, which AdamW wants on the CPU.
            optimizer.state[tensor][key] = value
        trainable.push()

    def save(self, path: Path) -> None:
        """Write one safetensors file; the other processes must :meth:`read` meanwhile."""
        about = {"curve": json.dumps(self.curve), "provenance": json.dumps(self.provenance)}
        write_tensors(path, self._all(), about)

    def read(self) -> None:
        """What other processes do while one saves."""
        read_through(self._all())

    def _all(self) -> Vector:
        """All tensors by ``PART:NAME``."""
        parts = {"kept": self.kept, "tensors": self.tensors, "state": self.state}

        def layer(name: str) -> Tensor:
            part, _, own = name.partition(":")
            return parts[part][own].detach()

        return Layerwise([f"{part}:{n}" for part, own in parts.items() for n in own], layer)

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Open what :meth:`save` wrote. Tensors stay in the file and are read when used."""
        file = FileVector(path)

        def part(part: str) -> Vector:
            names = [n.removeprefix(f"{part}:") for n in file if n.startswith(f"{part}:")]
            return Layerwise(names, lambda name: file[f"{part}:{name}"])

        about = {key: json.loads(value) for key, value in file.metadata.items()}
        return cls(about["curve"], about["provenance"], *map(part, ("kept", "tensors", "state")))


def keep(curve: Sequence[Mapping[str, Any]], max_kl: float | None) -> int:
    """The step whose update is kept, of the evaluations after the first.

    It is the last one. With a KL budget it is the one with the highest forget loss within the
    budget, and if none is within, the one with the lowest KL.
    """
    rows = curve[1:]
    if max_kl is None:
        return int(rows[-1]["step"])
    within = [row for row in rows if row["retain_kl"] <= max_kl]
    if within:
        return int(max(within, key=lambda row: row["forget_loss"])["step"])
    return int(min(rows, key=lambda row: row["retain_kl"])["step"])
