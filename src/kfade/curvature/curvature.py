"""The curvature of all targeted layers: what a fit returns and a step needs."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kfade.curvature.block import EigenBlock
from kfade.curvature.damping import Damping
from kfade.curvature.owners import OwnedBlocks
from kfade.curvature.store import StoredBlocks, write_blocks
from kfade.curvature.vectors import OnDevice, Storage, Vector
from kfade.errors import InputError


@dataclass(frozen=True)
class Curvature:
    """G̃ ≈ G, block-diagonal over the targeted weights.

    Units: ½ δᵀGδ predicts the mean KL, in nats per loss token of the data it was fitted on, of
    changing the weights by δ.
    """

    blocks: Mapping[str, EigenBlock]
    provenance: dict[str, Any] = field(default_factory=dict)
    """How it was fitted: estimator, labels, seed, tokens, digests of weights and data."""

    def solve(
        self, x: Vector, damping: Damping, storage: Storage = OnDevice()
    ) -> MutableMapping[str, Tensor]:
        """(G̃ + λI)⁻¹ x, kept in ``storage``."""
        solution = storage.vector()
        for name, block in self.blocks.items():
            solution[name] = block.solve(x[name], damping.of(block))
        return solution

    def matvec(self, x: Vector) -> dict[str, Tensor]:
        """G̃ x."""
        return {name: block.matvec(x[name]) for name, block in self.blocks.items()}

    def quadratic(self, x: Vector) -> float:
        """xᵀG̃x, summed over all layers in float64."""
        return float(sum(block.quadratic(x[name]).double() for name, block in self.blocks.items()))

    def only(self, names: Sequence[str], device: torch.device | str) -> Curvature:
        """The curvature of some of the weights, on ``device``."""
        if isinstance(self.blocks, StoredBlocks | OwnedBlocks):
            return Curvature(self.blocks.only(names, device), self.provenance)
        return Curvature({name: self.blocks[name].to(device) for name in names}, self.provenance)

    def save(self, path: Path) -> None:
        """Write one safetensors file; bases that layers share are written once."""
        write_blocks(path, self.blocks, self.provenance)

    @classmethod
    def load(cls, path: Path, device: torch.device | str = "cpu") -> Curvature:
        """Read what :meth:`save` or ``kfade fit`` wrote: a file, or a folder of them.

        Blocks are read one at a time, when they are used, so a curvature may be larger than
        memory.

        Raises:
            InputError: no such file, or not a curvature file of this format.
        """
        blocks = StoredBlocks(device)
        provenance: dict[str, Any] = {}
        for file in curvature_files(path):
            provenance = blocks.include(file)
        return cls(blocks, provenance)


def curvature_files(path: Path) -> list[Path]:
    """The files of a curvature: a file, or a folder of them.

    Raises:
        InputError: there is none.
    """
    files = sorted(path.glob("curvature-*.safetensors")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise InputError(f"{path}: no such curvature; make one with kfade fit")
    return files
