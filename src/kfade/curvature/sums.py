"""The sums of a fit's passes over a group of layers, and eigendecompositions of the factors.

Shapes: R live rows of a batch, D width of a factor, I inputs, O outputs of a layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor

from kfade.curvature.eigh import (
    at_once,
    eigendecompose,
    eigendecompose_batch,
    side_by_side,
    takes_batches,
)
from kfade.curvature.factors import (
    CovarianceSum,
    add_sequence_squares,
    rows_first,
    sum_dtype,
)
from kfade.curvature.owners import Owners
from kfade.curvature.passes import LiveRows, PendingInputs
from kfade.data.batches import Batch
from kfade.errors import InputError
from kfade.models.targets import Target
from kfade.runtime import distributed
from kfade.runtime.progress import track

Bases = Mapping[str, tuple[Tensor | None, Tensor | None]]
"""Target name -> (Q_O, Q_I)."""
Factor = tuple[str, CovarianceSum, int]
"""(its name, the sum, number of rows to divide by)."""


class Covariances:
    """Σ a aᵀ for each input factor, Σ g gᵀ for each layer."""

    def __init__(self, owners: Owners) -> None:
        self.a: dict[str, CovarianceSum] = {}
        self.s: dict[str, CovarianceSum] = {}
        self._rows: dict[str, Tensor] = {}  # of each routed target
        self._owners = owners
        for target in owners.own:
            dtype, device = sum_dtype(target.dtype), target.device
            if target.input_of not in self.a:
                self.a[target.input_of] = CovarianceSum(target.shape[1], dtype, device)
            if target.is_routed:
                self._rows[target.name] = torch.zeros((), dtype=torch.int64)
            self.s[target.name] = CovarianceSum(target.shape[0], dtype, device)

    def begin(self, batch: Batch, together: Sequence[Batch]) -> None:
        """Called before each batch."""
        self._owners.begin(batch, together)

    def on_input(self, target: Target, live: LiveRows) -> None:
        """Add the rows of an input, in the owner of the layers that read it."""
        for a_RI, lengths in self._owners.rows(target, live):
            self.a[target.input_of].add(a_RI)
            if target.is_routed:
                self._rows[target.name] += sum(lengths)

    def on_gradient(self, target: Target, live: LiveRows) -> None:
        """Add the rows of an output gradient, in the owner of its layer."""
        for g_RO, _ in self._owners.rows(target, live):
            self.s[target.name].add(g_RO)

    def tensors(self) -> dict[str, Tensor]:
        """The sums so far, by name."""
        both = {"A": self.a, "S": self.s}
        found = {f"{k}/{name}": s.sum_ for k, sums in both.items() for name, s in sums.items()}
        return found | {f"M/{name}": count for name, count in self._rows.items()}

    def routed_rows(self) -> dict[str, int]:
        """Number of rows in each A of experts, over all processes: a position counts for each of
        its experts.

        Raises:
            InputError: an expert has none.
        """
        routed = [target for target in self._owners.group if target.is_routed]
        # A process knows those of its own layers; where layers have owners, the others have zeros.
        own = [int(self._rows.get(target.name, 0)) for target in routed]
        found: Counter[str] = Counter()
        for target, count in zip(routed, distributed.all_reduce_numbers(own), strict=True):
            if count == 0:
                raise InputError(
                    f"no retain text reaches {target.name}: give more of it, or leave the expert "
                    "out with --experts"
                )
            found[target.input_of] += int(count)
        return found


class Eigenvalues:
    """Σ_sequences (Q_Oᵀ ∇W_sequence Q_I)∘² of every target in the given bases."""

    def __init__(self, owners: Owners, bases: Bases) -> None:
        self.grids: dict[str, Tensor] = {}
        self._owners = owners
        self._bases: dict[str, tuple[Tensor | None, Tensor | None]] = {}
        cast_of: dict[int, Tensor] = {}  # one copy of a shared basis in the model's dtype
        self._inputs: PendingInputs[list[tuple[Tensor, Tensor | None]]] = PendingInputs(owners.own)
        for target in owners.own:
            self.grids[target.name] = torch.zeros(
                target.shape, dtype=sum_dtype(target.dtype), device=target.device
            )
            q_out, q_in = bases[target.name]
            cast = [
                q if q is None else cast_of.setdefault(id(q), q.to(target.dtype))
                for q in (q_out, q_in)
            ]
            self._bases[target.name] = (cast[0], cast[1])

    def begin(self, batch: Batch, together: Sequence[Batch]) -> None:
        """Called before each batch."""
        self._owners.begin(batch, together)

    def on_input(self, target: Target, live: LiveRows) -> None:
        """Add the rows of an input, in the owner of the layers that read it."""
        rows = self._owners.rows(target, live)
        if target.name not in self.grids:
            return
        q_in = self._bases[target.name][1]
        width, readers = target.shape[0], self._inputs.readers[target.tensor_of]
        rotated = [_rotate_rows(a_RI, lengths, q_in, width, readers) for a_RI, lengths in rows]
        self._inputs.put(target, rotated)

    def on_gradient(self, target: Target, live: LiveRows) -> None:
        """Add the rows of an output gradient, in the owner of its layer."""
        rows = self._owners.rows(target, live)
        if target.name not in self.grids:
            return
        grid, q_out = self.grids[target.name], self._bases[target.name][0]
        inputs = self._inputs.take(target)
        for (g_RO, lengths), (a_RI, q_in) in zip(rows, inputs, strict=True):
            g_RO, q_left = _rotate_rows(g_RO, lengths, q_out, target.shape[1])
            add_sequence_squares(grid, g_RO, a_RI, lengths, q_out=q_left, q_in=q_in)

    def tensors(self) -> dict[str, Tensor]:
        """The sums so far, by name."""
        return self.grids


def _rotate_rows(
    rows_RD: Tensor, lengths: Sequence[int], q: Tensor | None, width: int, readers: int = 1
) -> tuple[Tensor, Tensor | None]:
    """(rows Q, None), or (rows, Q) where rotating the products instead of the rows costs less."""
    if q is not None and rows_first(sum(lengths) / len(lengths), width, readers):
        return rows_RD @ q, None
    return rows_RD, q


def decompose_shared(work: Sequence[Factor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Like :func:`decompose`, of factors of which every process has a partial sum.

    Each is summed over the processes, decomposed by one of them, and sent to all.
    """
    owners = distributed.assign_by_cost([total.width**3 for _, total, _ in work])
    eigen: dict[str, tuple[Tensor, Tensor]] = {}
    own = []
    for owner, piece in zip(owners, work, strict=True):
        name, total, _ = piece
        distributed.reduce_to(owner, total.sum_)
        if owner == distributed.rank():
            own.append(piece)
        else:
            eigen[name] = (total.sum_.new_empty(total.width), total.sum_)
    eigen.update(decompose(own))
    for owner, (name, _, _) in zip(owners, work, strict=True):
        for tensor in eigen[name]:
            distributed.broadcast(owner, tensor)
    return eigen


def decompose(work: Sequence[Factor]) -> dict[str, tuple[Tensor, Tensor]]:
    """(eigenvalues, eigenvectors) of each factor by its name; vectors overwrite the sums."""
    work = sorted(work, key=lambda piece: -piece[1].width)

    def decompose_one(piece: Factor) -> tuple[Tensor, Tensor]:
        name, total, count = piece
        values, vectors = eigendecompose(total.mean(count), name)
        return values, total.sum_.copy_(vectors)

    def decompose_batch(pieces: Sequence[Factor]) -> Iterator[tuple[Tensor, Tensor]]:
        means_BDD = torch.stack([total.mean(count) for _, total, count in pieces])
        pairs = eigendecompose_batch(means_BDD, [name for name, _, _ in pieces])
        for (_, total, _), (values, vectors) in zip(pieces, pairs, strict=True):
            yield values, total.sum_.copy_(vectors)

    def decompositions() -> Iterator[tuple[Tensor, Tensor]]:
        # Grouped by width: how many run at a time, and so how many threads each has, must not
        # depend on what else is fitted.
        for width, alike in groupby(work, lambda piece: piece[1].width):
            pieces = list(alike)
            sum_ = pieces[0][1].sum_
            count = at_once(width, sum_.element_size(), sum_.device)
            if count > 1 and takes_batches(sum_.device):
                for start in range(0, len(pieces), count):
                    yield from decompose_batch(pieces[start : start + count])
            else:
                yield from side_by_side(decompose_one, pieces, count)

    pieces = track(work, "eigendecompositions", lambda piece: piece[1].width ** 3)
    return {piece[0]: pair for piece, pair in zip(pieces, decompositions(), strict=True)}
