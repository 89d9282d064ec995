"""Which process keeps the sums of which layers.

Usually each process sums over its own batches for all layers, and the sums are added up at the
end. Each process then needs memory for all factors. A model whose weights are spread over the
processes (``distributed.shard``) is larger than a device, and so are its factors. There each layer
is kept by one process, its owner, and the others send it their rows batch by batch. Sums,
decompositions and eigenvalues of a layer are then held by its owner only.

Shapes: B batch, T positions, R live rows of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kfade.curvature.block import PARTS, EigenBlock
from kfade.curvature.factors import sum_dtype
from kfade.curvature.groups import BytesOf, assign_to_processes
from kfade.curvature.passes import live_rows
from kfade.data.batches import Batch
from kfade.models.targets import Target
from kfade.runtime import distributed

Rows = list[tuple[Tensor, list[int]]]
"""(rows [R, width], number of rows of each sequence), from each process that has any."""
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

    def rows(self, target: Target, x_BT: Tensor) -> Rows:
        """Live rows of ``x_BT`` [B, T, width] that this process sums for ``target``.

        Without owners, its own rows. With owners, the rows of all processes in the owner, and none
        in the others.
        """
        own_R = live_rows(x_BT, self._batch)
        if not self.spread:
            return [(own_R, self._lengths[0])]
        counts = [sum(lengths) for lengths in self._lengths]
        parts = distributed.gather_rows(self.owner(target), own_R, counts)
        return [(part, own) for part, own in zip(parts, self._lengths, strict=False) if sum(own)]


def broadcast_blocks(blocks: Blocks, owners: Owners) -> Blocks:
    """The blocks of a group in all processes, also where layers have owners."""
    if not owners.spread:
        return blocks
    found: Blocks = {}
    inputs: dict[str, Tensor | None] = {}  # a basis that layers share is sent once

    def sent(target: Target, part: str, rows: int, columns: int) -> Tensor | None:
        if not rows:
            return None
        weight, tensor = target.weight, getattr(blocks.get(target.name), part, None)
        if tensor is None:
            kind = sum_dtype(weight.dtype)
            tensor = torch.empty(rows, columns, dtype=kind, device=weight.device)
        return distributed.broadcast(owners.owner(target), tensor)

    for target, (q_out, q_in, eigenvalues) in zip(
        owners.group, _shapes(blocks, owners.group), strict=True
    ):
        if target.input_of not in inputs:
            inputs[target.input_of] = sent(target, "q_in", *q_in)
        left, values = sent(target, "q_out", *q_out), sent(target, "eigenvalues", *eigenvalues)
        assert values is not None
        found[target.name] = EigenBlock(left, inputs[target.input_of], values)
    return found


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
