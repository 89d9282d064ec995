"""The curvature of all targeted layers: what a fit returns and a step needs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kfade.curvature.block import EigenBlock
from kfade.errors import InputError

FORMAT = "kfade-curvature-1"
Matrices = dict[str, Tensor]
"""Target name -> matrix [O, I]: a vector in the space of all targeted weights."""


@dataclass(frozen=True)
class Curvature:
    """G̃ ≈ G, block-diagonal over the targeted weights.

    Units: ½ δᵀGδ predicts the mean KL, in nats per loss token of the data it was fitted on, of
    changing the weights by δ.
    """

    blocks: dict[str, EigenBlock]
    provenance: dict[str, Any] = field(default_factory=dict)
    """How it was made: estimator, draw, seed, tokens, digests of weights and data."""

    def solve(self, x: Mapping[str, Tensor], *, damping: float, relative: bool) -> Matrices:
        """(G̃ + λI)⁻¹ x; λ is ``damping``, times each layer's mean eigenvalue if ``relative``."""
        return {
            name: block.solve(x[name], block.damping(damping, relative))
            for name, block in self.blocks.items()
        }

    def matvec(self, x: Mapping[str, Tensor]) -> Matrices:
        """G̃ x."""
        return {name: block.matvec(x[name]) for name, block in self.blocks.items()}

    def quadratic(self, x: Mapping[str, Tensor]) -> float:
        """xᵀG̃x, summed over all layers in float64."""
        return sum(block.quadratic(x[name]).double().item() for name, block in self.blocks.items())

    def save(self, path: Path) -> None:
        """Write one safetensors file; bases that layers share are written once."""
        tensors: dict[str, Tensor] = {}
        stored: dict[int, str] = {}
        layout: dict[str, dict[str, str]] = {}
        for name, block in self.blocks.items():
            layout[name] = {}
            for part in ("q_out", "q_in", "eigenvalues"):
                tensor = getattr(block, part)
                if tensor is None:
                    continue
                key = stored.setdefault(id(tensor), f"{name}/{part}")
                layout[name][part] = key
                tensors[key] = tensor.contiguous()
        metadata = {"format": FORMAT, "layout": layout, "provenance": self.provenance}
        save_file(tensors, path, {"kfade": json.dumps(metadata)})

    @classmethod
    def load(cls, path: Path, device: torch.device | str = "cpu") -> Curvature:
        """Read what :meth:`save` wrote.

        Raises:
            InputError: no such file, or not a curvature file of this format.
        """
        if not path.is_file():
            raise InputError(f"{path}: no such curvature file; make one with kfade fit")
        try:
            with safe_open(path, "pt", device=str(device)) as file:
                metadata = json.loads((file.metadata() or {}).get("kfade", "{}"))
                if metadata.get("format") != FORMAT:
                    raise InputError(f"{path}: not a curvature file of this version of kfade")
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise InputError(f"{path}: not a whole safetensors file ({error})") from None
        blocks = {
            name: EigenBlock(
                tensors.get(parts.get("q_out", "")),
                tensors.get(parts.get("q_in", "")),
                tensors[parts["eigenvalues"]],
            )
            for name, parts in metadata["layout"].items()
        }
        return cls(blocks, metadata["provenance"])
