"""How far a training run is: its evaluations, which of them to keep, and all it takes to go on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.optim import Optimizer

from kfade.baselines.weights import Trainable
from kfade.runtime.files import write_tensors

Row = dict[str, float]
"""One evaluation: ``step``, what :class:`~kfade.baselines.gauge.Measured` has, and after the first
``loss``, the mean of the training loss since the evaluation before."""


@dataclass(frozen=True)
class Checkpoint:
    """A training run right after an evaluation."""

    curve: list[Row]
    provenance: dict[str, Any]
    """Digests of weights and data, versions."""
    kept: dict[str, Tensor]
    """Deltas of the evaluation to keep, by parameter name; none if it is the last one."""
    tensors: dict[str, Tensor]
    """What is trained."""
    state: dict[str, Tensor]
    """The optimiser's, by ``NAME/KEY``."""

    @classmethod
    def of(
        cls,
        curve: Sequence[Row],
        provenance: dict[str, Any],
        kept: dict[str, Tensor],
        trainable: Trainable,
        optimizer: Optimizer,
    ) -> Checkpoint:
        """The present; the tensors are those that are trained on, so save it at once."""
        state = {
            f"{name}/{key}": value
            for name, tensor in trainable.tensors.items()
            for key, value in optimizer.state[tensor].items()
        }
        return cls(list(curve), provenance, kept, trainable.tensors, state)

    def restore(self, trainable: Trainable, optimizer: Optimizer) -> None:
        """Set what is trained, and the optimiser, to where they were."""
        with torch.no_grad():
            for name, tensor in trainable.tensors.items():
                tensor.copy_(self.tensors[name])
        for name, value in self.state.items():
            name, _, key = name.rpartition("/")
            tensor = trainable.tensors[name]
            # Step counts are scalars, which AdamW wants on the CPU.
            optimizer.state[tensor][key] = value.to(tensor.device) if value.dim() else value
        trainable.push()

    def save(self, path: Path) -> None:
        """Write one safetensors file."""
        parts = {"kept": self.kept, "tensors": self.tensors, "state": self.state}
        tensors = {
            f"{part}:{name}": tensor.detach()
            for part, own in parts.items()
            for name, tensor in own.items()
        }
        about = {"curve": json.dumps(self.curve), "provenance": json.dumps(self.provenance)}
        write_tensors(path, tensors, about)

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """What :meth:`save` wrote."""
        parts: dict[str, dict[str, Tensor]] = {"kept": {}, "tensors": {}, "state": {}}
        with safe_open(path, "pt") as file:
            about = {key: json.loads(value) for key, value in file.metadata().items()}
            for key in file.keys():  # noqa: SIM118
                part, _, name = key.partition(":")
                parts[part][name] = file.get_tensor(key)
        return cls(about["curve"], about["provenance"], **parts)


def keep(curve: Sequence[Mapping[str, Any]], max_kl: float | None) -> int:
    """The step whose update is kept, of the evaluations after training began.

    The last one; with a KL budget, the one of the highest forget loss among those within it, and
    where none is within, the one of the lowest KL.
    """
    rows = curve[1:]
    if max_kl is None:
        return int(rows[-1]["step"])
    within = [row for row in rows if row["retain_kl"] <= max_kl]
    if within:
        return int(max(within, key=lambda row: row["forget_loss"])["step"])
    return int(min(rows, key=lambda row: row["retain_kl"])["step"])
