"""Vectors in the space of the targeted weights, and where they are kept.

A gradient, a direction or an update has as many numbers as the targeted weights, in float32: 22.5
GB for the feed-forward weights of an 8B model. No computation needs more than one layer of it at a
time. So a vector is a mapping from names to tensors whose layers are read, used and dropped one by
one, and a :class:`Storage` says where they are in the meantime.
"""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kfade.errors import InputError
from kfade.runtime import distributed
from kfade.runtime.files import writing
from kfade.runtime.tensors import tensor_bytes

Vector = Mapping[str, Tensor]
"""Name of a target or of a parameter -> its part of the vector."""


class Storage(Protocol):
    """Where vectors are kept."""

    @property
    def memory(self) -> int | None:
        """Bytes of a vector that may be on the device at a time, where a pass sums it; None: all
        of it."""

    def vector(self) -> MutableMapping[str, Tensor]:
        """An empty vector. A layer that is read is on the device that it was on when written."""


@dataclass(frozen=True)
class OnDevice:
    """Keeps vectors on the device of their layers."""

    memory: ClassVar[None] = None

    def vector(self) -> MutableMapping[str, Tensor]:
        """An empty vector."""
        return {}


@dataclass(frozen=True)
class InHostMemory:
    """Keeps vectors in the memory of the processor."""

    memory: int | None = None
    """See :class:`Storage`."""

    def vector(self) -> MutableMapping[str, Tensor]:
        """An empty vector."""
        return _HostVector()


@dataclass(frozen=True)
class OnDisk:
    """Keeps each vector in a file without a name, which is gone when the vector or the process
    is."""

    folder: Path
    """An existing folder on the disk to use."""
    memory: int | None = None
    """See :class:`Storage`."""

    def vector(self) -> MutableMapping[str, Tensor]:
        """An empty vector.

        Raises:
            InputError: the folder cannot be written to.
        """
        return _DiskVector(self.folder)


class _Indexed(Mapping[str, Tensor]):
    """A mapping with an index of its names; looking for a name reads no layer."""

    _index: dict[str, Any]

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, name: object) -> bool:
        return name in self._index


class _Kept(_Indexed, MutableMapping[str, Tensor]):
    def __delitem__(self, name: str) -> None:
        del self._index[name]


class _HostVector(_Kept):
    def __init__(self) -> None:
        self._index: dict[str, tuple[Tensor, torch.device]] = {}

    def __setitem__(self, name: str, layer: Tensor) -> None:
        host = layer.cpu()
        if layer.is_cuda:  # copies from pinned memory are faster
            host = host.pin_memory()
        self._index[name] = host, layer.device

    def __getitem__(self, name: str) -> Tensor:
        layer, device = self._index[name]
        return layer.to(device)


@dataclass(frozen=True)
class _Piece:
    """Where a layer lies in a file, and what it is."""

    offset: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


class _DiskVector(_Kept):
    """Layers one after another in a temporary file.

    The file is read and written, not mapped: pages of a mapped file count as memory of the process.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._end = folder, 0
        self._index: dict[str, _Piece] = {}
        with writing(folder):
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        weakref.finalize(self, self._file.close)

    def __setitem__(self, name: str, layer: Tensor) -> None:
        old = self._index.get(name)
        fits = old is not None and (old.shape, old.dtype) == (layer.shape, layer.dtype)
        offset = old.offset if old is not None and fits else self._end
        piece = _Piece(offset, layer.shape, layer.dtype, layer.device)
        with writing(self._folder):
            self._file.seek(piece.offset)
            data = tensor_bytes(layer)
            while len(data):
                data = data[self._file.write(data) :]
        self._index[name] = piece
        self._end = max(self._end, piece.offset + piece.bytes)

    def __getitem__(self, name: str) -> Tensor:
        piece = self._index[name]
        data = torch.empty(piece.shape, dtype=piece.dtype, device="cpu")
        view = tensor_bytes(data)
        self._file.seek(piece.offset)
        while len(view):
            view = view[self._file.readinto(view) or _missing(self._folder) :]
        return data.to(piece.device)


def _missing(folder: Path) -> int:
    raise InputError(f"{folder}: a temporary file there is shorter than it was; run again")


@dataclass(frozen=True)
class Divided:
    """Divides each layer of a vector over the processes, which keep their parts in ``storage``.

    Writing and reading a layer are collective: every process must do it, in the same order.
    """

    storage: Storage

    @property
    def memory(self) -> int | None:
        """See :class:`Storage`."""
        return self.storage.memory

    def vector(self) -> MutableMapping[str, Tensor]:
        """An empty vector."""
        return _DividedVector(self.storage.vector())


class _DividedVector(_Kept):
    def __init__(self, parts: MutableMapping[str, Tensor]) -> None:
        self._parts = parts
        self._index: dict[str, torch.Size] = {}

    def __setitem__(self, name: str, layer: Tensor) -> None:
        part = distributed.own_slice(layer.reshape(-1))
        self._parts[name] = part.clone()  # a part of a tensor would keep the whole in memory
        self._index[name] = layer.shape

    def __getitem__(self, name: str) -> Tensor:
        shape = self._index[name]
        return distributed.gather_slices(self._parts[name], shape.numel()).view(shape)

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        del self._parts[name]


class FileVector(_Indexed):
    """The tensors of a safetensors file, each read when it is asked for, to the CPU.

    Reading raises InputError once another file is in its place, or it was written to.
    """

    def __init__(self, path: Path) -> None:
        """Raises InputError where it is not a whole safetensors file."""
        self._path, self._version = path, _version(path)
        try:
            with safe_open(path, "pt") as file:
                self._index = dict.fromkeys(file.offset_keys())  # in the order of the file
                self.metadata: dict[str, str] = file.metadata() or {}
        except SafetensorError as error:
            raise InputError(f"{path}: not a whole safetensors file ({error})") from None

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._index:
            raise KeyError(name)
        try:
            with safe_open(self._path, "pt") as file:
                tensor: Tensor = file.get_tensor(name)
            version = _version(self._path)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{self._path}: changed while it was in use ({error})") from None
        if version != self._version:
            raise InputError(f"{self._path}: changed while it was in use; load it again")
        return tensor


def _version(path: Path) -> tuple[int, ...]:
    """Tells a file from others that are put in its place, and from itself after a change."""
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


class Layerwise(_Indexed):
    """A vector whose layers are computed each time they are read. Nothing is kept.

    Args:
        names: of its layers, in their order.
        layer: computes the layer of a name.
    """

    def __init__(self, names: Iterable[str], layer: Callable[[str], Tensor]) -> None:
        self._index, self._layer = dict.fromkeys(names), layer

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._index:
            raise KeyError(name)
        return self._layer(name)


def scaled(vector: Vector, factor: float) -> Vector:
    """``factor`` times a vector, layer by layer when it is read."""
    return Layerwise(vector, lambda name: vector[name] * factor)


def only(vector: Vector, names: Iterable[str]) -> Vector:
    """Some layers of a vector, each taken from it when it is read."""
    return Layerwise(names, lambda name: vector[name])


def plus(vector: Vector, other: Vector, scale: float = 1.0) -> Vector:
    """``vector`` + ``scale`` · ``other``, layer by layer when it is read. A layer that one of them
    lacks is zero there."""

    def layer(name: str) -> Tensor:
        if name not in other:
            return vector[name]
        added = scale * other[name]
        return vector[name] + added if name in vector else added

    return Layerwise([*vector, *other], layer)


def on_device(vector: Vector, device: torch.device | str) -> Vector:
    """The vector on another device, layer by layer when it is read."""
    return Layerwise(vector, lambda name: vector[name].to(device))


def read_through(vector: Vector) -> None:
    """Read every layer and drop it: what other processes do while one writes a divided vector."""
    for name in vector:
        vector[name]


def keep(vector: Vector, storage: Storage) -> Vector:
    """``vector``, computed or read layer by layer, and kept in ``storage``."""
    kept = storage.vector()
    for name in vector:
        kept[name] = vector[name]
    return kept
