"""The base model's outputs on the sequences of a run, without a second model in memory.

They are computed for several steps ahead, with the base weights put back meanwhile, and kept on the
CPU: hidden states, or less, of each sequence. When they take too much memory, all are dropped, and
computed again when they are needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from kfade.baselines.losses import Net, Row, Rows, Term, alone
from kfade.data.sequences import TokenSequence
from kfade.models.head import hidden_states
from kfade.runtime import distributed
from kfade.runtime.progress import track

AHEAD = 65536  # positions for which the base weights are put back once
LIMIT = 4 * 2**30  # bytes

Drawn = dict[str, list[int]]
"""Numbers of the sequences in a batch, by set."""


class References:
    """What the terms need of the base model's outputs, by term and sequence.

    Args:
        sets: the sequences that the terms' batches are drawn from, by name.
        ahead: positions computed at a time.
        limit: bytes kept.
    """

    def __init__(
        self,
        net: Net,
        terms: Sequence[Term],
        sets: Mapping[str, Sequence[TokenSequence]],
        *,
        ahead: int = AHEAD,
        limit: int = LIMIT,
    ) -> None:
        self._net, self._terms, self._sets = net, terms, sets
        self._ahead, self._limit = ahead, limit
        self._rows: dict[tuple[int, int], Row] = {}

    def rows(self, term: int, numbers: Sequence[int]) -> Rows:
        """The rows of these sequences; none for a term without a reference."""
        if self._terms[term].reference is None:
            return []
        return [self._rows[term, number] for number in numbers]

    def missing(self, drawn: Drawn) -> bool:
        """Whether any row of the sequences ``drawn`` is missing."""
        return any(key not in self._rows for key in self._needed(drawn))

    def compute(self, coming: Iterable[Sequence[Drawn]]) -> None:
        """Compute the missing rows of the first ``coming`` step, and of later ones up to ``ahead``.

        Call it while the model is the base model.
        """
        if sum(x.nbytes for row in self._rows.values() for x in row) > self._limit:
            self._rows.clear()
        wanted: dict[tuple[int, int], None] = {}  # in order, each once
        positions = 0
        for step in coming:
            needed = [key for drawn in step for key in self._needed(drawn)]
            lacking = [key for key in needed if key not in self._rows and key not in wanted]
            own = sum(self._sequence(key).live for key in lacking)
            if wanted and positions + own > self._ahead:
                break
            wanted.update(dict.fromkeys(lacking))
            positions += own
        added = distributed.extra_passes(self._net.model, len(wanted))
        with torch.no_grad():
            for key in track(list(wanted), "base outputs", lambda k: self._sequence(k).live):
                reference = self._terms[key[0]].reference
                assert reference is not None
                # One by one: the rounding of a sequence's outputs depends on its batch, and a
                # resumed run would not end where an uninterrupted one does.
                row = reference(self._net, self._sequence(key))
                self._rows[key] = tuple(x.to("cpu", copy=True) for x in row)
            for _ in range(added):
                batch = alone(self._net, next(iter(self._sets.values()))[0])
                hidden_states(self._net.model, batch.input_BT)

    def _needed(self, drawn: Drawn) -> list[tuple[int, int]]:
        return [
            (k, number)
            for k, term in enumerate(self._terms)
            if term.reference is not None
            for number in drawn[term.on]
        ]

    def _sequence(self, key: tuple[int, int]) -> TokenSequence:
        term, number = key
        return self._sets[self._terms[term].on][number]
