"""A sequence over the model's window is refused, whatever is done with it."""

from __future__ import annotations

import pytest
from helpers import flat, random_sequences, tiny_llama

import kfade
from kfade.baselines import methods
from kfade.baselines.loop import train
from kfade.baselines.settings import Settings
from kfade.baselines.weights import Dense
from kfade.data.batches import make_batches
from kfade.data.sequences import TokenSequence
from kfade.errors import InputError
from kfade.evaluate.relearning import Examination, Tuning, fine_tune
from kfade.evaluate.tokens import log_likelihoods
from kfade.method.gradient import forget_gradient
from kfade.method.grid import Point
from kfade.method.measure import hidden_reference, mean_objectives
from kfade.method.sweep import Shared, sweep
from kfade.models.layers import find_targets

WINDOW = 32
RETAIN, HELD_OUT = random_sequences(2), random_sequences(2, seed=1)


def of(tokens: int) -> TokenSequence:
    return TokenSequence((3,) * tokens, (False,) + (True,) * (tokens - 1))


def unlearn(model, forget):
    kfade.unlearn(model, forget=forget, retain=RETAIN, held_out=HELD_OUT, **flat(alpha=0.01))


def unlearn_from(model, retain):
    kfade.unlearn(model, forget=RETAIN, retain=retain, held_out=HELD_OUT, **flat(alpha=0.01))


def fit(model, retain):
    kfade.KFAC().fit(model, make_batches(retain), find_targets(model))


def gradient(model, forget):
    forget_gradient(model, make_batches(forget), find_targets(model), kfade.margin)


def measure_grid(model, forget):
    targets = find_targets(model)
    curvature = kfade.KFAC().fit(model, make_batches(RETAIN), targets)
    point = Point("margin", "all", kfade.Damping(0.1), kfade.StepSize(alpha=0.1))
    shared = Shared(curvature, targets, {"margin": kfade.margin})
    sweep(model, [point], shared, forget=forget, held_out=HELD_OUT)


def baseline(model, forget):
    trainable = Dense(model, [name for name, _ in model.named_parameters()])
    sets = {"forget": forget, "retain": RETAIN, "held_out": HELD_OUT}
    train(model, methods.gradient_ascent().terms, trainable, sets, Settings(0.01, 1, 2))


ENTRIES = {
    "unlearn": (unlearn, "the forget set, number 1"),
    "unlearn, retain": (unlearn_from, "the retain set, number 1"),
    "fit": (fit, "a sequence"),
    "gradient": (gradient, "a sequence"),
    "sweep": (measure_grid, "the forget set, number 1"),
    "baseline": (baseline, "the forget set, number 1"),
    "hidden states": (lambda m, s: hidden_reference(m, make_batches(s), "x"), "a sequence"),
    "loss": (lambda m, s: mean_objectives(m, make_batches(s), [kfade.margin]), "a sequence"),
    "evaluation": (log_likelihoods, "a sequence"),
    "fine-tuning": (lambda m, s: fine_tune(m, s, Tuning(1)), "a sequence"),
    "attack": (lambda m, s: Examination(m, forget=s), "the forget set, number 1"),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_a_sequence_over_the_window_is_refused(name):
    call, where = ENTRIES[name]
    model = tiny_llama()
    model.config.max_position_embeddings = WINDOW
    call(model, [of(8), of(WINDOW + 1)])  # its last token is not read
    told = rf"^{where}: 33 positions, over the window of 32 of LlamaForCausalLM; .*window=32\)"
    with pytest.raises(InputError, match=told):
        call(model, [of(8), of(WINDOW + 2)])
