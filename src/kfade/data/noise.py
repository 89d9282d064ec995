"""Texts with some of their answers' tokens replaced at random."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from kfade.data.sequences import TokenSequence


def noisy(sequences: Sequence[TokenSequence], share: float, seed: int) -> list[TokenSequence]:
    """Copies of ``sequences`` in which scored tokens are replaced, each with probability ``share``.

    A token that is replaced becomes a scored token of any of the sequences, and is not scored; the
    others are predicted after it. A copy without a scored token is left out.

    Args:
        seed: keys the draw.
    """
    draw = random.Random(seed)
    pool = [t for s in sequences for t, scored in zip(s.tokens, s.scored, strict=True) if scored]
    copies = []
    for sequence in sequences:
        hit = [scored and draw.random() < share for scored in sequence.scored]
        tokens = zip(sequence.tokens, hit, strict=True)
        scored = [old and not new for old, new in zip(sequence.scored, hit, strict=True)]
        if any(scored):
            drawn = tuple(draw.choice(pool) if new else old for old, new in tokens)
            copies.append(replace(sequence, tokens=drawn, scored=tuple(scored)))
    return copies
