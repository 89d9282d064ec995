"""Curvature on disk: finished groups of layers, read back block by block, and unfinished sums.

A folder holds one file for each group, ``curvature-000.safetensors`` and so on. While a fit runs
it also holds the sums of unfinished passes, ``sums-*.safetensors``. Every file is written under
another name and then renamed, so it is complete or absent.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kfade.curvature.block import PARTS, EigenBlock
from kfade.errors import InputError
from kfade.runtime import distributed
from kfade.runtime.files import reading_kept
from kfade.runtime.tensors import write_tensors

FORMAT = "kfade-curvature-1"
WRITES = 30  # a write of unfinished sums takes at most one part in so many of the time


class StoredBlocks(Mapping[str, EigenBlock]):
    """Blocks in safetensors files. Each access reads from disk; nothing is cached."""

    def __init__(self, device: torch.device | str) -> None:
        self._device = str(device)
        self._where: dict[str, tuple[Path, dict[str, str]]] = {}
        self._means: dict[str, float] = {}

    def include(self, path: Path) -> dict[str, Any]:
        """Add the blocks of a file and return its provenance.

        Raises:
            InputError: not a curvature file of this format.
        """
        try:
            with safe_open(path, "pt") as file:
                metadata = json.loads((file.metadata() or {}).get("kfade", "{}"))
        except SafetensorError as error:
            raise InputError(f"{path}: not a whole safetensors file ({error})") from None
        if metadata.get("format") != FORMAT:
            raise InputError(f"{path}: not a curvature file of this version of kfade")
        for name, parts in metadata["layout"].items():
            self._where[name] = (path, parts)
        self._means |= metadata.get("mean_eigenvalues", {})  # older files have none
        provenance: dict[str, Any] = metadata["provenance"]
        return provenance

    def only(self, names: Iterable[str], device: torch.device | str) -> StoredBlocks:
        """The blocks of the weights ``names``, read to ``device``."""
        some = StoredBlocks(device)
        some._where = {name: self._where[name] for name in names}
        some._means = {name: self._means[name] for name in some._where if name in self._means}
        return some

    def mean_eigenvalue(self, name: str) -> float:
        """Mean of Λ of one weight, which its file notes."""
        noted = self._means.get(name)
        return self[name].mean_eigenvalue if noted is None else noted

    def __getitem__(self, name: str) -> EigenBlock:
        path, parts = self._where[name]
        with safe_open(path, "pt", device=self._device) as file:
            tensors = {part: file.get_tensor(key) for part, key in parts.items()}
        return EigenBlock(tensors.get("q_out"), tensors.get("q_in"), tensors["eigenvalues"])

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def write_blocks(
    path: Path, blocks: Mapping[str, EigenBlock], provenance: Mapping[str, Any]
) -> None:
    """Write one safetensors file; bases that layers share are written once.

    Raises:
        InputError: it cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    stored: dict[int, str] = {}
    layout: dict[str, dict[str, str]] = {}
    for name, block in blocks.items():
        layout[name] = {}
        for part in PARTS:
            tensor = getattr(block, part)
            if tensor is None:
                continue
            key = stored.setdefault(id(tensor), f"{name}/{part}")
            layout[name][part] = key
            tensors[key] = tensor  # a reference, so that no id is reused
    means = {name: block.mean_eigenvalue for name, block in blocks.items()}
    metadata = {
        "format": FORMAT,
        "layout": layout,
        "mean_eigenvalues": means,
        "provenance": provenance,
    }
    write_tensors(path, tensors, {"kfade": json.dumps(metadata)})


@dataclass
class Store:
    """The folder of a fit: finished groups of layers, and unfinished sums.

    Several processes share one folder. A finished group is written by the first process; where
    each process keeps layers of its own (``owners``), each writes a file of its own.
    """

    folder: Path
    provenance: dict[str, Any] = field(default_factory=dict)
    """What the fit is of (model, data, settings). Kept sums are continued only if it is equal."""
    seconds: float = 120.0
    """Least time between two writes of unfinished sums; 0: they are written after every batch."""
    device: torch.device | str = "cpu"
    """The device that blocks are read to."""

    def finished(self, number: int, names: Sequence[str], facts: Mapping[str, Any]) -> bool:
        """Whether file ``number`` exists.

        Raises:
            InputError: it exists, but holds other blocks than ``names`` or was made with other
                ``facts``.
        """
        path = self._finished_path(number)
        if not path.is_file():
            return False
        blocks = StoredBlocks(self.device)
        with reading_kept(path):
            made = blocks.include(path)
        if list(blocks) != list(names) or _text(made) != _text({**facts, **self.provenance}):
            raise InputError(
                f"{path}: of another fit (model, data, settings or --memory differ); repeat it as "
                "it was, or remove the folder"
            )
        return True

    def finish(
        self,
        number: int,
        blocks: Mapping[str, EigenBlock],
        facts: Mapping[str, Any],
        group: int,
    ) -> None:
        """Write ``blocks``, if there are any, as file ``number``, and delete this process's
        unfinished sums of ``group``."""
        if blocks:
            write_blocks(self._finished_path(number), blocks, {**facts, **self.provenance})
        distributed.barrier()
        for path in self.folder.glob(f"sums-{group:03}-*-{distributed.rank():03}.*"):
            path.unlink()

    def blocks(self, numbers: Iterable[int]) -> StoredBlocks:
        """The blocks in the files of those numbers."""
        blocks = StoredBlocks(self.device)
        for number in numbers:
            blocks.include(self._finished_path(number))
        return blocks

    def checkpoint(
        self, group: int, facts: Mapping[str, Any], name: str, *, in_step: bool = False
    ) -> SumsCheckpoint:
        """Where this process keeps its unfinished sums of the pass ``name`` over one group.

        Args:
            facts: what the sums depend on. Sums with other facts are refused, except that with
                other "batches" (another budget of positions, say) the pass begins anew.
            in_step: processes save after the same batch, since each sums rows of all of them.
        """
        file = f"sums-{group:03}-{name}-{distributed.rank():03}.safetensors"
        made_for = {**facts, **self.provenance, "processes": distributed.count()}
        cut = str(made_for.pop("batches", None))
        return SumsCheckpoint(self.folder / file, _text(made_for), cut, self.seconds, in_step)

    def _finished_path(self, number: int) -> Path:
        return self.folder / f"curvature-{number:03}.safetensors"


class SumsCheckpoint:
    """The sums of one pass, written at intervals: a ``passes.Checkpoint``.

    From one write to the next at least ``seconds`` pass, and ``WRITES`` times what the last write
    took: large sums on a slow disk cost a few percent of the time at most.
    """

    def __init__(self, path: Path, made_for: str, cut: str, seconds: float, in_step: bool) -> None:
        self._path, self._made_for, self._cut, self._seconds = path, made_for, cut, seconds
        self._in_step = in_step
        self._saved = time.monotonic()
        self._took = 0.0

    def due(self) -> bool:
        """Whether the last write is long ago. Processes that save in step ask together."""
        interval = max(self._seconds, WRITES * self._took) if self._seconds else 0.0
        due = time.monotonic() - self._saved >= interval
        return distributed.any_of(due) if self._in_step else due

    def load(self, tensors: Mapping[str, Tensor]) -> int:
        """Fill ``tensors`` and return the number of batches in them.

        Returns 0 and fills nothing where no sums were kept, where the data were divided into other
        batches, or where processes that save in step were interrupted in between and so have kept
        different numbers of batches.

        Raises:
            InputError: they were summed over other data, another model or by more processes; or
                the file is broken.
        """
        batches = self._saved_batches()
        if self._in_step and distributed.maximum(batches) != -distributed.maximum(-batches):
            return 0
        if batches:
            self._fill(tensors)
        return batches

    def _saved_batches(self) -> int:
        if not self._path.is_file():
            return 0
        with self._opened() as file:
            metadata = file.metadata()
            return int(metadata["batches"]) if metadata["cut"] == self._cut else 0

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Any]:
        try:
            with safe_open(self._path, "pt") as file:
                metadata = file.metadata()
                if metadata["made_for"] != self._made_for:
                    raise InputError(
                        f"{self._path}: sums of another fit (model, data, settings or number of "
                        "processes differ); repeat it as it was, or remove the folder"
                    )
                yield file
        except SafetensorError as error:
            raise InputError(
                f"{self._path}: not a whole safetensors file ({error}); remove it"
            ) from None

    def _fill(self, tensors: Mapping[str, Tensor]) -> None:
        with self._opened() as file:
            for name, tensor in tensors.items():
                tensor.copy_(file.get_tensor(name))

    def save(self, batches: int, tensors: Mapping[str, Tensor]) -> None:
        """Write the sums over the first ``batches`` batches."""
        begun = time.monotonic()
        metadata = {"batches": str(batches), "cut": self._cut, "made_for": self._made_for}
        write_tensors(self._path, tensors, metadata)
        self._saved = time.monotonic()
        took = self._saved - begun
        self._took = distributed.maximum(took) if self._in_step else took


def _text(facts: Mapping[str, Any]) -> str:
    """Facts as JSON, in which form they are compared."""
    return json.dumps(facts, sort_keys=True)
