"""Texts with some of their answers' tokens replaced at random."""

from __future__ import annotations

import random
from collections.abc import Sequence

from kfade.data.sequences import TokenSequence


def noisy(
    sequences: Sequence[TokenSequence], chosen: Sequence[int], share: float, seed: int
) -> list[TokenSequence]:
    """Copies of the ``chosen`` sequences in which that share of the scored tokens, rounded, is
    replaced.

    A token that is replaced becomes a scored token of any of the sequences, and is not scored; the
    others are predicted after it. A sequence that is too short for one to be replaced, and one to
    be left, has no copy.

    Args:
        seed: keys the copies. That of a sequence is the same whichever others are chosen.
    """
    pool = [t for s in sequences for t, scored in zip(s.tokens, s.scored, strict=True) if scored]
    copies = []
    for index in chosen:
        tokens, scored = list(sequences[index].tokens), list(sequences[index].scored)
        places = [at for at, is_scored in enumerate(scored) if is_scored]
        count = _replaced(sequences[index], share)
        if count:
            answer = places[0]
            draw = random.Random(f"{seed} {index}")
            for at in draw.sample(places, count):
                tokens[at], scored[at] = draw.choice(pool), False
            copies.append(TokenSequence(tuple(tokens), tuple(scored), answer))
    return copies


def has_copies(sequences: Sequence[TokenSequence], share: float) -> bool:
    """Whether any of the sequences has a copy with that share."""
    return any(_replaced(sequence, share) for sequence in sequences)


def _replaced(sequence: TokenSequence, share: float) -> int:
    """How many tokens are replaced in a copy; 0 if there is none."""
    count = round(share * sequence.loss_tokens)
    return count if count < sequence.loss_tokens else 0
