"""What the base model says on the sequences of a run, without a second model in memory.

Its outputs are computed a stretch of steps ahead, with the base weights put back for a while, and
kept on the CPU: hidden states, or less, of each sequence. Where all that were kept would take too
much, it is dropped and computed anew when it is needed again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from kfade.baselines.losses import Net, Row, Rows, Term
from kfade.data.batches import make_batches
from kfade.data.sequences import TokenSequence
from kfade.runtime.progress import track

AHEAD = 65536  # the base weights come and go once for so many positions
LIMIT = 4 * 2**30

Drawn = dict[str, list[int]]
"""Numbers of the sequences in a batch, by set."""


class References:
    """Rows of the base model's outputs, by term and sequence.

    Args:
        sets: the sequences that the terms' batches are drawn from, by name.
        ahead: positions computed at a time.
        limit: bytes kept.
    """

    def __init__(
        self,
        net: Net,
        terms: Sequence[Term],
        sets: dict[str, Sequence[TokenSequence]],
        *,
        ahead: int = AHEAD,
        limit: int = LIMIT,
    ) -> None:
        self._net, self._terms, self._sets = net, terms, sets
        self._ahead, self._limit = ahead, limit
        self._rows: dict[tuple[int, int], Row] = {}

    def rows(self, term: int, numbers: Sequence[int]) -> Rows:
        """What is kept for those sequences; nothing for a term that needs nothing."""
        if self._terms[term].reference is None:
            return []
        return [self._rows[term, number] for number in numbers]

    def missing(self, drawn: Drawn) -> bool:
        """Whether a batch of the sequences ``drawn`` lacks any."""
        return any(key not in self._rows for key in self._needed(drawn))

    def compute(self, coming: Iterable[Sequence[Drawn]]) -> None:
        """Compute what the ``coming`` steps' batches lack, of as many steps as ``ahead`` allows.

        Of the first step, always. To be called while the model is the base model.
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
        device = next(self._net.model.parameters()).device
        with torch.no_grad():
            for key in track(list(wanted), "base outputs", lambda k: self._sequence(k).live):
                reference = self._terms[key[0]].reference
                assert reference is not None
                # One by one: what a sequence shares a batch with would show in the last digits,
                # and a resumed run would not end where an uninterrupted one does.
                (batch,) = make_batches([self._sequence(key)], device=device)
                (row,) = reference(self._net, batch)
                self._rows[key] = tuple(x.to("cpu", copy=True) for x in row)

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
