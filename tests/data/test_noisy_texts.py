"""Texts with some of their answers' tokens replaced."""

from __future__ import annotations

import torch
from helpers import flat, random_sequences, tiny_llama

import kfade
from kfade.data.noise import has_copies, noisy
from kfade.data.sequences import TokenSequence

PROMPT, ANSWER = (1, 2, 3), tuple(range(10, 30))
TEXTS = [
    TokenSequence((*PROMPT, *ANSWER, 4), (*[False] * 3, *[True] * 20, False)) for _ in range(50)
]
EVERY = range(len(TEXTS))


def test_a_share_of_the_answers_tokens_is_replaced_and_not_scored():
    share = 0.25
    copies = noisy(TEXTS, EVERY, share, seed=1)
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
    assert replaced == 50 * 5
    assert noisy(TEXTS, EVERY, share, seed=1) == copies
    assert noisy(TEXTS, EVERY, share, seed=2) != copies
    assert noisy(TEXTS, [7, 3], share, seed=1) == [copies[7], copies[3]]
    changed = sum(
        old != new
        for text, copy in zip(TEXTS, copies, strict=True)
        for old, new in zip(text.tokens, copy.tokens, strict=True)
    )
    assert changed > 0.8 * replaced  # one in twenty is replaced by itself


def test_a_text_too_short_to_lose_a_token_and_to_keep_one_has_no_copy():
    one = random_sequences(40, one_loss_token=True)
    assert noisy(one, range(40), 0.9, seed=0) == []
    two = TokenSequence((1, 2, 3), (False, True, True))
    assert noisy([two], [0], 0.2, seed=0) == []  # so what ends a turn is never all that is left
    assert len(noisy([two], [0], 0.5, seed=0)) == 1


def test_a_share_that_gives_no_copy_at_all_is_told(monkeypatch):
    monkeypatch.setattr("kfade.method.unlearn.say", (said := []).append)
    two = TokenSequence((1, 2, 3), (False, True, True))
    assert has_copies([two, TEXTS[0]], 0.2)
    assert has_copies([two], 0.5)
    assert not has_copies([two], 0.2)
    sets = {"forget": random_sequences(4, one_loss_token=True)}
    sets |= {"retain": random_sequences(4, seed=1), "held_out": random_sequences(4, seed=2)}
    found = [
        kfade.unlearn(tiny_llama(), **sets, **flat(kl=1e-3, noise=noise)) for noise in (0.5, 0.0)
    ]
    assert said == [
        "note: the answers of the forget set are too short for copies with noise 0.5, so the "
        "gradient has none"
    ]
    assert found[0].provenance["noise"] == 0
    for name, delta in found[1].deltas.items():
        assert torch.equal(found[0].deltas[name], delta)
