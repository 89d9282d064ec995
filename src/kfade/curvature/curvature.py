"""The curvature of all targeted layers: what a fit returns and a step needs."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
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
from kfade.models.weights import parameter_of


@dataclass(frozen=True)
class Curvature:
    """G̃ ≈ G, block-diagonal over the targeted weights.

    Units: ½ δᵀGδ predicts the mean KL, in nats per loss token of the data it was fitted on, of
    changing the weights by δ.
    """

    blocks: Mapping[str, EigenBlock]
    provenance: dict[str, Any] = field(default_factory=dict)
    """How it was fitted: estimator, labels, seed, tokens, digests of weights and data."""

    def ridge(self, name: str, damping: Damping) -> float:
        """λ of the weight ``name``.

        If relative, it is a multiple of the mean eigenvalue of the weight; of an expert, of the
        mean over all experts of its parameter. An expert that few retain tokens reach has small
        eigenvalues, which are known badly. A multiple of its own mean would allow the longest
        changes there.
        """
        if not damping.relative:
            return damping.value
        whole = parameter_of(name)
        if whole == name:
            return damping.of(mean_eigenvalue(self.blocks, name))
        return damping.of(self._means_of_experts[whole])

    @cached_property
    def _means_of_experts(self) -> dict[str, float]:
        """Mean eigenvalue of all experts of each fused parameter."""
        means: dict[str, list[float]] = {}
        for name in self.blocks:
            whole = parameter_of(name)
            if whole != name:
                means.setdefault(whole, []).append(mean_eigenvalue(self.blocks, name))
        return {whole: sum(found) / len(found) for whole, found in means.items()}

    def solve(
        self, x: Vector, damping: Damping, storage: Storage = OnDevice()
    ) -> MutableMapping[str, Tensor]:
        """(G̃ + λI)⁻¹ x, kept in ``storage``."""
        solution = storage.vector()
        for name, block in self.blocks.items():
            solution[name] = block.solve(x[name], self.ridge(name, damping))
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


def mean_eigenvalue(blocks: Mapping[str, EigenBlock], name: str) -> float:
    """Mean of Λ of one weight, without reading its block from disk or from another process."""
    if isinstance(blocks, StoredBlocks | OwnedBlocks):
        return blocks.mean_eigenvalue(name)
    return blocks[name].mean_eigenvalue


def curvature_files(path: Path) -> list[Path]:
    """The files of a curvature: a file, or a folder of them.

    Raises:
        InputError: there is none.
    """
    files = sorted(path.glob("curvature-*.safetensors")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise InputError(f"{path}: no such curvature; make one with kfade fit")
    return files
