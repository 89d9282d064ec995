"""Texts with some of their answers' tokens replaced."""

from __future__ import annotations

import math

from helpers import random_sequences

from kfade.data.noise import noisy
from kfade.data.sequences import TokenSequence

PROMPT, ANSWER = (1, 2, 3), tuple(range(10, 30))
TEXTS = [
    TokenSequence((*PROMPT, *ANSWER, 4), (*[False] * 3, *[True] * 20, False)) for _ in range(50)
]


def test_a_share_of_the_answers_tokens_is_replaced_and_not_scored():
    share = 0.25
    copies = noisy(TEXTS, share, seed=1)
    replaced = 0
    for text, copy in zip(TEXTS, copies, strict=True):
        assert copy.tokens[:3] == PROMPT
        assert copy.tokens[-1] == 4
        for old, new, was, now in zip(
            text.tokens, copy.tokens, text.scored, copy.scored, strict=True
        ):
            assert now == (was and now)
            if now or not was:
                assert new == old
            else:
                replaced += 1
                assert new in ANSWER  # never a token of a prompt
    n = 50 * 20
    assert abs(replaced - share * n) < 4 * math.sqrt(share * (1 - share) * n)  # 4 deviations
    assert noisy(TEXTS, share, seed=1) == copies
    assert noisy(TEXTS, share, seed=2) != copies
    changed = sum(
        old != new
        for text, copy in zip(TEXTS, copies, strict=True)
        for old, new in zip(text.tokens, copy.tokens, strict=True)
    )
    assert changed > 0.8 * replaced  # one in twenty is replaced by itself


def test_a_copy_with_nothing_to_predict_is_left_out():
    one = random_sequences(40, one_loss_token=True)
    copies = noisy(one, 0.5, seed=0)
    assert 0 < len(copies) < 40
    assert all(copy in one for copy in copies)
