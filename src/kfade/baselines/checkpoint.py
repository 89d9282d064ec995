"""The state of a training run: its evaluations, and what a resumed run needs."""

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
from kfade.runtime.tensors import write_tensors

Row = dict[str, float]
"""One evaluation: ``step``, what :meth:`~kfade.baselines.gauge.DriftGauge.measure` gives and, but
for the first, ``loss``, the mean training loss since the previous evaluation."""


@dataclass(frozen=True)
class Checkpoint:
    """The state of a training run right after an evaluation."""

    curve: list[Row]
    provenance: dict[str, Any]
    """Digests of weights and data, versions."""
    kept: dict[str, Tensor]
    """Changes of weights to keep, by parameter name; none if those of the last evaluation are."""
    tensors: dict[str, Tensor]
    """What is trained."""
    state: dict[str, Tensor]
    """The optimiser's state, by ``NAME/KEY``."""

    @classmethod
    def of(
        cls,
        curve: Sequence[Row],
        provenance: dict[str, Any],
        kept: dict[str, Tensor],
        trainable: Trainable,
        optimizer: Optimizer,
    ) -> Checkpoint:
        """The present state. Save it at once: it holds the trained tensors themselves."""
        state = {
            f"{name}/{key}": value
            for name, tensor in trainable.tensors.items()
            for key, value in optimizer.state[tensor].items()
        }
        return cls(list(curve), provenance, kept, trainable.tensors, state)

    def restore(self, trainable: Trainable, optimizer: Optimizer) -> None:
        """Set the trained tensors and the optimiser to this state."""
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
        """Read what :meth:`save` wrote."""
        parts: dict[str, dict[str, Tensor]] = {"kept": {}, "tensors": {}, "state": {}}
        with safe_open(path, "pt") as file:
            about = {key: json.loads(value) for key, value in file.metadata().items()}
            for key in file.keys():  # noqa: SIM118
                part, _, name = key.partition(":")
                parts[part][name] = file.get_tensor(key)
        return cls(about["curve"], about["provenance"], **parts)


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
