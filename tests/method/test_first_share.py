"""How much of the way the first of several steps goes."""

from __future__ import annotations

import pytest
import torch
from helpers import flat, random_sequences, said_by, tiny_llama

import kfade
from kfade import KFAC
from kfade.method.size import MIDWAY_TOLERANCE

FORGET = random_sequences(6, seed=7, shortest=6)
SETS = {"retain": random_sequences(12, seed=8), "held_out": random_sequences(8, seed=9)}
KL = 1e-4  # of a run; small, so that the texts are not forgotten before it is reached


def unlearned(model=None, forget=FORGET, **options) -> kfade.Update:
    options = {"fit": KFAC(), "damping": 0.1, "refit": False, "first_share": None, **options}
    return kfade.unlearn(model or tiny_llama(), forget=forget, **SETS, **flat(**options))


def kls(update: kfade.Update) -> list[float]:
    return [step["retain_kl"] for step in update.provenance["steps"]]


def test_the_shares_of_all_steps_are_the_whole_way():
    for given, loss, expected in (
        (None, 0.1, [1 / 4] * 4),  # known by heart
        (None, 3.0, [1 / 2] + [1 / 6] * 3),
        (0.7, 0.1, [0.7] + [0.1] * 3),
        (0.7, 3.0, [0.7] + [0.1] * 3),
    ):
        run = kfade.Run(steps=4, first_share=given).decided(loss)
        gone = []
        for step in range(4):
            gone.append(run.share(step) * (1 - sum(gone)))
        assert gone == pytest.approx(expected)


def test_a_single_step_goes_all_the_way():
    for given in (None, 0.3):
        run = kfade.Run(steps=1, first_share=given).decided(3.0)
        assert run.share(0) == 1.0


def test_texts_that_are_not_known_by_heart_have_a_first_step_of_half_the_way():
    """Half of the way in √KL is a quarter of the KL."""
    first, *_, last = kls(unlearned(kl=KL, steps=3))
    assert first == pytest.approx(KL / 4, rel=MIDWAY_TOLERANCE)
    assert last == pytest.approx(KL, rel=0.1)


def test_texts_that_are_known_by_heart_have_equal_steps():
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(100.0)  # nearly certain of what it says
    own = [said_by(model, start) for start in range(6)]
    update = unlearned(model, own, kl=KL, steps=3)
    assert update.provenance["steps"][0]["forget_loss_before"] < 0.1
    assert kls(update)[0] == pytest.approx(KL / 9, rel=MIDWAY_TOLERANCE)


def test_a_share_that_is_given_counts():
    for share in (0.2, 0.8):
        update = unlearned(kl=KL, steps=3, first_share=share)
        assert kls(update)[0] == pytest.approx(share**2 * KL, rel=MIDWAY_TOLERANCE)


def test_a_run_that_continues_equals_an_uninterrupted_one():
    kept: list[kfade.Update] = []
    whole = unlearned(kl=KL, steps=3, on_step=kept.append)
    for start in kept[:-1]:
        again = unlearned(kl=KL, steps=3, start=start)
        assert all(torch.equal(delta, again.deltas[name]) for name, delta in whole.deltas.items())


def test_a_run_says_that_its_first_step_is_longer(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr("kfade.method.unlearn.say", said.append)
    unlearned(kl=KL, steps=3)
    (note,) = (line for line in said if "--first-share" in line)
    assert "goes 0.5 of the way" in note


@pytest.mark.parametrize(
    "options",
    [
        {"kl": KL, "steps": 3, "first_share": 0.5},
        {"kl": KL},
        {"kl": KL, "steps": 2},
        {"alpha": 0.01, "steps": 3},
    ],
)
def test_nothing_is_said_of_a_share_that_was_chosen_or_is_as_usual(options, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr("kfade.method.unlearn.say", said.append)
    unlearned(**options)
    assert not [line for line in said if "--first-share" in line]


def test_a_share_is_between_none_and_all():
    for wrong in (0.0, -0.1, 1.5, float("nan")):
        with pytest.raises(kfade.InputError, match=f"--first-share {wrong}: give a number above 0"):
            kfade.Run(first_share=wrong)
