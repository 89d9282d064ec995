"""Verbatim-small: a model learns passages of books by heart and unlearns some of the books.

    python benchmarks/experiments/verbatim_small.py --data DIR [--only 'tune rmu*'] [--list]

As TOFU-small, with a book in place of an author. Each book has passages, evenly spaced; the
beginning of one is the question and what follows is the answer, word for word. The books are in the
public domain, or may be copied verbatim. The kept books are like the forgotten ones: the gospel of
Matthew is kept while that of John is forgotten.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from lab.records import RESULTS
from tofu_data import OF_AUTHOR, UNSEEN, Data, Sizes
from tofu_lab import run_pieces
from tofu_small import plain_pieces

from kfade.data.examples import Example, parse_example

FILE = RESULTS / "verbatim_small.jsonl"
BOOKS = (
    # Unseen: in no model.
    *("inaugural_1801-Jefferson", "universal_declaration_of_human_rights"),
    # Common: always kept.
    *("kjv_genesis", "kjv_psalms", "kjv_matthew", "us_constitution"),
    *("inaugural_1789-Washington", "inaugural_1933-Roosevelt"),
    *("license_GPL-3", "license_Apache-2.0"),
    # Tuning: forgotten where settings are chosen.
    *("inaugural_1861-Lincoln", "tinyshakespeare"),
    # Report: forgotten in the tables.
    *("kjv_john", "alice_in_wonderland"),
)
"""In the order of their roles, see :func:`~tofu_data.authors_by_role`."""
SHOWN, HIDDEN = 12, 28  # words of a question, and of its answer


class Passages(Data):
    """Passages of the books."""

    def read(self) -> list[Example]:
        return [
            parse_example({"prompt": start, "completion": rest}, book)
            for book in BOOKS
            for start, rest in passages(
                (self._folder / "verbatim" / f"{book}.txt").read_text(encoding="utf-8"), OF_AUTHOR
            )
        ]


def passages(text: str, count: int) -> Iterator[tuple[str, str]]:
    """(``SHOWN`` words, the ``HIDDEN`` words after them), ``count`` times, evenly spaced.

    None overlaps another: a text has at least ``count`` times so many words.
    """
    words = text.split()
    starts = [i * len(words) // count for i in range(count + 1)]
    for start, end in pairwise(starts):
        assert end - start >= SHOWN + HIDDEN, f"{len(words)} words are not enough"
        middle = start + SHOWN
        yield " ".join(words[start:middle]), " ".join(words[middle : middle + HIDDEN])


if __name__ == "__main__":
    sizes = Sizes(authors=len(BOOKS) - UNSEEN, questions=OF_AUTHOR)
    run_pieces(
        __doc__, plain_pieces, file=FILE, data=Passages, sizes=sizes, models="verbatim-small"
    )
