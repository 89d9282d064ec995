"""What ``kfade check`` finds of a model's numbers in company, with models that it must fail."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import zoo
from zoo.caches import OTHERS
from zoo.rotary import MODELS
from zoo.unusual import built

import kfade
from kfade.data.batches import make_batches
from kfade.errors import InputError
from kfade.models.lengths import fresh_frequencies
from kfade.runs.checking import (
    Trial,
    _generation,
    _lengths,
    _padding,
    _routing,
    _small_step,
    _unequal,
)
from kfade.runs.session import Loaded

TOKENS = zoo.sequences((31, 28, 30, 27))


def loaded(model) -> Loaded:
    model.generation_config.eos_token_id = None
    return Loaded(model, zoo.tokenizer(), kfade.find_targets(model))


def test_sound_models_pass():
    sound = loaded(zoo.tiny("llama", dtype=torch.float32))
    assert _padding(sound, TOKENS).passed
    found = _generation(sound, TOKENS)
    assert found.passed
    assert found.text == "5 prompts continued in batches and one by one: 5 alike"
    assert _lengths(sound, TOKENS) == []


def first_come(module, args, output):
    """An expert that takes no more than 12 tokens of a batch and drops the rest."""
    rows = output.flatten(0, 1)
    return (rows * (torch.arange(len(rows)) < 12)[:, None]).view_as(output)


def over_the_batch(module, args, output):
    """A normalisation by the batch's own scale."""
    return output / output.detach().std()


def test_a_block_that_sees_the_whole_batch_fails():
    model = zoo.tiny("llama", dtype=torch.float32)
    found = loaded(model)
    handle = model.model.layers[1].mlp.register_forward_hook(over_the_batch)
    with pytest.raises(InputError, match="looks ahead"):  # at later positions of the same sequence
        _padding(found, TOKENS)
    handle.remove()
    model.model.layers[1].mlp.register_forward_hook(first_come)
    padding = _padding(found, TOKENS)
    assert not padding.passed
    assert "alone and in one padded batch differ" in padding.text


def of_the_others(module, args, output):
    """Half the mean over the batch is taken away, where there is more than one."""
    return output - 0.5 * output.mean(0, keepdim=True) * (len(output) > 1)


def of_the_width(module, args, output):
    """A scale by the number of positions, padding included."""
    return output * (1 + 0.1 * output.shape[1])


def of_the_row(module, args, output):
    """A scale by the place in the batch."""
    return output * (1 + 0.1 * torch.arange(len(output))[:, None, None])


@pytest.mark.parametrize("tokens", [TOKENS[:1], zoo.sequences((2,))], ids=["one", "two tokens"])
@pytest.mark.parametrize("fault", [of_the_others, of_the_width, of_the_row])
def test_one_sequence_is_enough_to_see_padding_and_company(fault, tokens):
    assert len({len(s.tokens) for s in _unequal(tokens, zoo.WINDOW)}) == 8
    model = zoo.tiny("llama", dtype=torch.float32)
    found = loaded(model)
    assert _padding(found, tokens).passed
    model.model.layers[0].mlp.register_forward_hook(fault)
    assert not _padding(found, tokens).passed


def test_unequal_sequences_stay_within_a_small_window():
    assert [len(s.tokens) for s in _unequal(zoo.sequences((4,)), 6)] == [6, 5, 4, 4, 3, 2, 2, 2]


def test_a_gradient_of_zero_is_told_in_one_line():
    model = zoo.tiny("llama", dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
    targets = kfade.find_targets(model, pattern="*layers.1.mlp.gate_proj.weight")
    with pytest.raises(InputError, match=r"the gradient is zero .*1\.mlp\.gate_proj\.weight"):
        _padding(Loaded(model, zoo.tokenizer(), targets), TOKENS)


def small_step(model):
    """What is found of the exact form."""
    return _small_step(loaded(model), TOKENS, kfade.EKFAC(), 0)[0]


def test_a_step_that_holds_at_first_is_the_only_one():
    found = small_step(zoo.tiny("llama", dtype=torch.float32))
    assert found.passed
    assert "it predicts 1.0e-04 nats" in found.text
    assert "larger steps" not in found.text
    assert _routing([Trial(1e-4, 1e-4, 1e-5, None)]) == []


def test_a_model_that_routes_passes_by_a_step_that_leaves_its_routes():
    model = loaded(built("qwen3_moe"))
    others = replace(model, targets=kfade.find_targets(model.model, experts="none"))
    found, routing, _ = _small_step(others, TOKENS, kfade.EKFAC(), 0)
    assert found.passed
    assert "for larger steps the ratio is" in found.text
    assert "beyond it the router chooses other experts" in found.text
    assert routing.name == "routing"
    assert routing.text.count("% at a KL of") > 1


def test_the_share_of_rerouted_positions_is_told_for_each_step():
    trials = [Trial(1e-4, 2e-4, 1e-5, 0.034), Trial(1e-6, 1e-6, 1e-7, 0.0)]
    (found,) = _routing(trials)
    assert "3.4 % at a KL of 2e-04 nats, 0 % at a KL of 1e-06 nats" in found.text


def test_curvature_of_higher_order_passes_by_a_smaller_step():
    model = zoo.tiny("llama", dtype=torch.float64)
    model.model.layers[1].mlp.register_forward_hook(lambda m, a, out: out + (300 * out).sin() / 300)
    found = small_step(model)
    assert found.passed
    assert "beyond it terms of higher order matter" in found.text


def test_a_wrong_form_fails_at_any_size(monkeypatch):
    own = kfade.runs.checking.quadratic_form
    monkeypatch.setattr(
        "kfade.runs.checking.quadratic_form", lambda *args, **head: 1.5 * own(*args, **head)
    )
    found = small_step(zoo.tiny("llama", dtype=torch.float32))
    assert not found.passed
    assert "it predicts 1.0e-08 nats" in found.text


@pytest.mark.parametrize("name", MODELS)
def test_lengths_on_both_sides_pass(name):
    (found,) = _lengths(loaded(MODELS[name]()), TOKENS)
    assert found.passed
    assert "change beyond 16 positions; log-likelihoods of 10, 32 and 48 tokens" in found.text


@pytest.mark.parametrize("name", ["dynamic", "phi3"])
def test_lengths_in_one_batch_fail(name, monkeypatch):
    monkeypatch.setattr(
        "kfade.evaluate.tokens.batches_for",
        lambda model, sequences, budget: make_batches(sequences, budget=budget),
    )
    (found,) = _lengths(loaded(MODELS[name]()), TOKENS)
    assert not found.passed


def test_frequencies_that_are_remembered_fail(monkeypatch):
    monkeypatch.setattr("kfade.models.lengths._is_dynamic", lambda module: False)
    model = MODELS["dynamic"]()
    with fresh_frequencies(model):
        (found,) = _lengths(loaded(model), TOKENS)
    assert not found.passed


@pytest.mark.parametrize("name", ["a state that sees padding", "a cache that mixes rows"])
def test_generation_in_batches_that_differ_fails(name, monkeypatch):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = OTHERS[name][0]().eval()
    model.generation_config.eos_token_id = None
    found = Loaded(model, zoo.tokenizer(), [zoo_target()])
    assert _generation(found, TOKENS).passed
    monkeypatch.setattr("kfade.evaluate.generation.company", lambda model, prompts: "any")
    apart = _generation(found, TOKENS)
    assert not apart.passed
    assert "the others apart where the two tokens' log-probabilities differ by up to" in apart.text


def zoo_target():
    return kfade.find_targets(zoo.tiny("llama", dtype=torch.float32))[0]  # only its dtype is read


def test_generation_that_fails_is_told_in_the_librarys_words(monkeypatch):
    model = zoo.tiny("llama", dtype=torch.float32)

    def broken(*args, **kwargs):
        raise ValueError("no cache of this kind\nmore")

    monkeypatch.setattr(model, "generate", broken)
    found = _generation(loaded(model), TOKENS)
    assert not found.passed
    assert found.text == "it fails: ValueError: no cache of this kind"
