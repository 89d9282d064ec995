"""Curvature on disk: finished groups of layers, read back block by block, and unfinished sums.

A folder holds ``curvature-000.safetensors``, one file a group, and while a fit runs
``sums-*.safetensors``: what its passes have added up. Every file is written aside and renamed.
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

from kfade.curvature.block import EigenBlock
from kfade.errors import InputError
from kfade.runtime import distributed
from kfade.runtime.files import reading_kept, write_tensors

FORMAT = "kfade-curvature-1"
PARTS = ("q_out", "q_in", "eigenvalues")


class StoredBlocks(Mapping[str, EigenBlock]):
    """Blocks in safetensors files, each read when it is asked for and not kept."""

    def __init__(self, device: torch.device | str) -> None:
        self._device = str(device)
        self._where: dict[str, tuple[Path, dict[str, str]]] = {}

    def include(self, path: Path) -> dict[str, Any]:
        """The blocks of one more file; returns its provenance.

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
        return metadata["provenance"]

    def only(self, names: Iterable[str], device: torch.device | str) -> StoredBlocks:
        """The blocks of some weights, read to ``device``."""
        some = StoredBlocks(device)
        some._where = {name: self._where[name] for name in names}
        return some

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
    """One safetensors file; bases that layers share are written once.

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
            tensors[key] = tensor  # held, so that no id is used twice
    metadata = {"format": FORMAT, "layout": layout, "provenance": provenance}
    write_tensors(path, tensors, {"kfade": json.dumps(metadata)})


@dataclass
class Store:
    """Where a fit puts what it has finished and keeps what it has not.

    With several processes all see the same folder; a finished group is written by the first, or
    where each process keeps the curvature of layers of its own, by each of them as one file.
    """

    folder: Path
    provenance: dict[str, Any] = field(default_factory=dict)
    """Of the model and the data: a kept sum is only continued where it is the same."""
    seconds: float = 120.0
    """Between two savings of unfinished sums."""
    device: torch.device | str = "cpu"
    """Where blocks are read to."""

    def finished(self, number: int, names: Sequence[str], facts: Mapping[str, Any]) -> bool:
        """Whether a file is there, with the blocks ``names`` and made as ``facts`` say.

        Raises:
            InputError: there is another fit's.
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
        """Write ``blocks`` as file ``number``, if there are any, and drop the sums that led to
        them: those of ``group``."""
        if blocks:
            write_blocks(self._finished_path(number), blocks, {**facts, **self.provenance})
        distributed.barrier()
        for path in self.folder.glob(f"sums-{group:03}-*-{distributed.rank():03}.*"):
            path.unlink()

    def blocks(self, numbers: Iterable[int]) -> StoredBlocks:
        """What is in the files of those numbers."""
        blocks = StoredBlocks(self.device)
        for number in numbers:
            blocks.include(self._finished_path(number))
        return blocks

    def keeper(
        self, group: int, facts: Mapping[str, Any], stage: str, *, together: bool = False
    ) -> SumsKeeper:
        """Keeps the sums of one pass over one group, in this process; ``facts`` decide them, of
        which other ``batches``, as of another budget, only make it begin anew. ``together``:
        processes save after the same batches, since each sums what others bring."""
        name = f"sums-{group:03}-{stage}-{distributed.rank():03}.safetensors"
        made_for = {**facts, **self.provenance, "processes": distributed.count()}
        cut = str(made_for.pop("batches", None))
        return SumsKeeper(self.folder / name, _text(made_for), cut, self.seconds, together)

    def _finished_path(self, number: int) -> Path:
        return self.folder / f"curvature-{number:03}.safetensors"


class SumsKeeper:
    """The sums of one pass, written every so many seconds; see ``passes.Keeper``."""

    def __init__(self, path: Path, made_for: str, cut: str, seconds: float, together: bool) -> None:
        self._path, self._made_for, self._cut, self._seconds = path, made_for, cut, seconds
        self._together = together
        self._saved = time.monotonic()

    def load(self, tensors: Mapping[str, Tensor]) -> int:
        """Fill ``tensors``; the number of batches in them. Where processes save together and were
        interrupted in between, so that they have different numbers, or where the batches are cut
        otherwise: 0, and nothing is filled.

        Raises:
            InputError: they were summed over other data, another model or by more processes; or
                the file is broken.
        """
        batches = self._saved_batches()
        if self._together and len({own for [own] in distributed.all_gather_lists([batches])}) > 1:
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
        """Keep the sums over that many batches, if the last saving is long enough ago."""
        due = time.monotonic() - self._saved >= self._seconds
        if self._together:
            due = any(own for [own] in distributed.all_gather_lists([due]))
        if not due:
            return
        metadata = {"batches": str(batches), "cut": self._cut, "made_for": self._made_for}
        write_tensors(self._path, tensors, metadata)
        self._saved = time.monotonic()


def _text(facts: Mapping[str, Any]) -> str:
    """Facts as they are compared: what JSON makes of them."""
    return json.dumps(facts, sort_keys=True)
