"""Which process keeps the sums of which layers.

Usually each process sums over its own batches for all layers, and the sums are added up at the
end. Each process then needs memory for all factors. A model whose weights are spread over the
processes (``distributed.shard``) is larger than a device, and so are its factors. There each layer
is kept by one process, its owner, and the others send it their rows batch by batch. Sums,
decompositions and eigenvalues of a layer are then held by its owner only.

Shapes: B batch, T positions, R live rows of a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kfade.curvature.block import PARTS, EigenBlock
from kfade.curvature.factors import sum_dtype
from kfade.curvature.groups import BytesOf, assign_to_processes
from kfade.curvature.passes import LiveRows
from kfade.data.batches import Batch
from kfade.models.experts import ExpertMap
from kfade.models.targets import Target
from kfade.runtime import distributed

Rows = list[tuple[Tensor, list[int]]]
"""(rows [R, width], the number of them in each sequence that has any), of each process that has
any."""
Blocks = dict[str, EigenBlock]


class Owners:
    """Which process keeps each target of a group, and how rows get there.

    ``bytes_of`` weighs layers, see ``groups``. ``spread``: each layer has one owner.
    """

    def __init__(self, group: Sequence[Target], bytes_of: BytesOf, *, spread: bool) -> None:
        self.spread = spread
        """Whether each layer is kept by one process, its owner."""
        self.group = group
        shares = assign_to_processes(group, bytes_of, distributed.count()) if spread else []
        self._owner = {t.name: process for process, own in enumerate(shares) for t in own}
        self._batch: Batch | None = None
        self._lengths: list[list[int]] = []

    @property
    def own(self) -> list[Target]:
        """The targets whose sums this process keeps."""
        return self.kept_by(distributed.rank())

    def kept_by(self, process: int) -> list[Target]:
        """The targets whose sums that process keeps."""
        return [t for t in self.group if self._owner.get(t.name, process) == process]

    def owner(self, target: Target) -> int:
        """The process that keeps ``target``, if layers have owners."""
        return self._owner[target.name]

    def begin(self, batch: Batch, together: Sequence[Batch]) -> None:
        """Called before each batch, in all processes; ``together``: see ``passes.rounds``."""
        self._batch = batch
        self._lengths = [other.lengths for other in together]

    def rows(self, target: Target, live: LiveRows) -> Rows:
        """The live rows that this process sums for ``target``.

        Without owners, its own rows. With owners, the rows of all processes in the owner, and none
        in the others.
        """
        if not self.spread:
            return [(live.rows_RD, live.lengths)] if live.lengths else []
        everywhere = self._lengths
        if live.routing is not None and isinstance(target.module, ExpertMap):
            assert self._batch is not None
            everywhere = live.routing.lengths(self._batch, target.module.expert)
        counts = [sum(lengths) for lengths in everywhere]
        if not any(counts):  # an expert that no process has rows of
            return []
        parts = distributed.gather_rows(self.owner(target), live.rows_RD, counts)
        return [(part, own) for part, own in zip(parts, everywhere, strict=False) if sum(own)]


@dataclass(frozen=True)
class _Place:
    """Where a block is, and what it is."""

    owner: int
    shapes: list[tuple[int, int]]
    """Of Q_O, Q_I and Λ; (0, 0) where there is none."""
    dtype: torch.dtype
    device: torch.device
    mean_eigenvalue: float


class OwnedBlocks(Mapping[str, EigenBlock]):
    """Blocks that stay with the owners of their layers.

    Reading one is collective: every process must do it, in the same order. It is then whole in all
    of them.
    """

    def __init__(self) -> None:
        self._own: Blocks = {}
        self._places: dict[str, _Place] = {}

    def add(self, blocks: Blocks, owners: Owners) -> None:
        """Add the blocks of a group, of which each process gives those of its own layers."""
        self._own |= blocks
        shapes = _shapes(blocks, owners.group)
        own = [blocks[t.name].mean_eigenvalue if t.name in blocks else 0.0 for t in owners.group]
        means = distributed.all_reduce_numbers(own)
        for target, found, mean in zip(owners.group, shapes, means, strict=True):
            dtype = sum_dtype(target.dtype)
            place = _Place(owners.owner(target), found, dtype, target.device, mean)
            self._places[target.name] = place

    def only(self, names: Iterable[str], device: torch.device | str) -> OwnedBlocks:
        """The blocks of the weights ``names``, on ``device``."""
        some = OwnedBlocks()
        for name in names:
            some._places[name] = replace(self._places[name], device=torch.device(device))
            if name in self._own:
                some._own[name] = self._own[name].to(device)
        return some

    def mean_eigenvalue(self, name: str) -> float:
        """Mean of Λ of one weight."""
        return self._places[name].mean_eigenvalue

    def __getitem__(self, name: str) -> EigenBlock:
        place = self._places[name]
        parts: list[Tensor | None] = []
        for part, shape in zip(PARTS, place.shapes, strict=True):
            tensor = getattr(self._own.get(name), part, None)
            if tensor is None and 0 not in shape:
                tensor = torch.empty(shape, dtype=place.dtype, device=place.device)
            parts.append(tensor if tensor is None else distributed.broadcast(place.owner, tensor))
        q_out, q_in, eigenvalues = parts
        assert eigenvalues is not None
        return EigenBlock(q_out, q_in, eigenvalues)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _shapes(blocks: Blocks, group: Sequence[Target]) -> list[list[tuple[int, int]]]:
    """The shapes of each target's parts, which its owner alone knows: a sum over processes."""
    own = [
        size
        for target in group
        for part in PARTS
        for size in getattr(getattr(blocks.get(target.name), part, None), "shape", (0, 0))
    ]
    sizes = [int(size) for size in distributed.all_reduce_numbers(own)]
    pairs = list(zip(sizes[::2], sizes[1::2], strict=True))
    return [pairs[i : i + len(PARTS)] for i in range(0, len(pairs), len(PARTS))]
