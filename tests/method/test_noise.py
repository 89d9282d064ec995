"""Copies of the forget texts with replaced tokens, in the forget gradient."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import flat, random_sequences, relative_error, said_by, tiny_llama

import kfade
from kfade import KFAC, make_batches, margin
from kfade.curvature.estimators import Identity
from kfade.data.batches import digest_batches
from kfade.data.noise import noisy
from kfade.method.gradient import forget_gradient
from kfade.method.sampling import Sampler
from kfade.models.layers import find_targets

FORGET = random_sequences(6, seed=7, shortest=6)
SETS = {"retain": random_sequences(12, seed=8), "held_out": random_sequences(8, seed=9)}


def updated(**options) -> torch.Tensor:
    options = {"fit": KFAC(), "damping": 0.1, "refit": False, **options}
    deltas = kfade.unlearn(tiny_llama(), forget=FORGET, **SETS, **flat(**options)).deltas
    return torch.cat([deltas[name].flatten() for name in deltas])


def test_the_gradient_is_of_the_texts_and_of_their_copies():
    """Without curvature a step is along the gradient."""
    model = tiny_llama()
    targets = find_targets(model)
    step = updated(fit=Identity(), kl=1e-3, noise=0.5)
    both = {}
    for name, texts in (
        ("with", [*FORGET, *noisy(FORGET, range(6), 0.5, seed=0)]),
        ("without", FORGET),
    ):
        found = forget_gradient(model, make_batches(texts), targets, margin)
        both[name] = torch.cat([found[target.name].flatten() for target in targets])

    def cosine(name: str) -> float:
        return torch.nn.functional.cosine_similarity(step, both[name], dim=0).item()

    assert cosine("with") == pytest.approx(1, abs=1e-9)  # rounding in float64
    assert cosine("without") < 0.99


def test_every_step_has_the_same_copies(monkeypatch):
    drawn = []
    real = Sampler.draw

    def draw(self, sequences, count, step=0, noise=0.0, prompts=False):
        batches = real(self, sequences, count, step, noise, prompts)
        if noise:
            drawn.append(digest_batches(batches))
        return batches

    monkeypatch.setattr(Sampler, "draw", draw)
    noisy_run = updated(kl=1e-3, steps=3, noise=0.5)
    assert len(drawn) == 3
    assert len(set(drawn)) == 1
    assert relative_error(noisy_run, updated(kl=1e-3, steps=3)) > 0.01


def test_a_resumed_run_with_a_bound_and_noise_equals_an_uninterrupted_one():
    options = {"kl": 1e-3, "steps": 3, "bound": 2.0, "noise": 0.5, "weigh_texts": True}
    kept = []
    whole = updated(**options, on_step=kept.append)
    for start in kept[:-1]:
        assert torch.equal(updated(**options, start=start), whole)


def test_a_bound_and_noise_are_of_texts_that_are_known_by_heart(monkeypatch):
    """By default: the texts that a model says itself have them, random ones have not."""
    model, said = tiny_llama(), []
    monkeypatch.setattr("kfade.method.unlearn.say", said.append)
    with torch.no_grad():
        model.lm_head.weight.mul_(100.0)  # nearly certain of what it says
    own = [said_by(model, start) for start in range(6)]
    spread = {}
    for name, forget in (("own", own), ("random", FORGET)):
        direction, size = kfade.Direction(damping=kfade.Damping()), kfade.StepSize(kl=1e-4)
        run = kfade.Run(steps=2, correction=kfade.Correction(count=0))
        update = kfade.unlearn(
            model, forget=forget, **SETS, direction=direction, size=size, run=run
        )
        first = update.provenance["steps"][0]["forget_loss_before"]
        spread[name] = update.provenance["bound"], update.provenance["noise"], first < math.log(2)
    assert spread == {"own": (2.0, 0.25, True), "random": (0.0, 0.0, False)}
    (note,) = (line for line in said if "known by heart" in line)
    assert "--bound 2 gives both" in note


@pytest.mark.parametrize(
    ("settings", "size", "steps"),
    [
        ({"bound": 0.0}, {"kl": 1e-4}, 2),
        ({"bound": 2.0}, {"kl": 1e-4}, 2),
        ({}, {"alpha": 0.1}, 2),
        ({}, {"kl": 1e-4}, 1),
    ],
)
def test_nothing_is_said_of_a_bound_that_no_text_would_have_or_that_was_chosen(
    settings, size, steps, monkeypatch
):
    said = []
    monkeypatch.setattr("kfade.method.unlearn.say", said.append)
    updated(**{"bound": None, "noise": None, **settings}, **size, steps=steps)
    assert not [line for line in said if "known by heart" in line]


def test_a_run_that_continues_keeps_the_bound_and_the_noise_of_its_first_steps():
    """Also where by default such texts would have none."""
    options = {"kl": 1e-3, "steps": 3, "bound": None, "noise": None}
    kept = []
    whole = updated(**{**options, "bound": 2.0, "noise": 0.5}, on_step=kept.append)
    assert torch.equal(updated(**options, start=kept[0]), whole)
    fresh = updated(**options)
    assert relative_error(fresh, whole) > 0.01


def test_noise_is_a_share():
    for wrong in (-0.1, 1.0, float("nan")):
        with pytest.raises(kfade.InputError, match=f"--noise {wrong}: give a number from 0"):
            kfade.Direction(noise=wrong)
