"""Models whose rotary frequencies follow the length of the batch: numbers that do not."""

from __future__ import annotations

import copy

import pytest
import torch
import zoo
from helpers import flat, greedy
from zoo.rotary import MODELS, TRAINED, dynamic, llama, longrope

import kfade
from kfade.baselines.elm import Guidance, steered_sample
from kfade.baselines.losses import Net
from kfade.data.batches import make_batches
from kfade.data.sequences import TokenSequence
from kfade.errors import InputError
from kfade.evaluate.generation import Decoding, generate, shares_batches
from kfade.evaluate.tokens import log_likelihoods
from kfade.method.gradient import forget_gradient
from kfade.method.measure import hidden_reference, mean_objectives
from kfade.models.head import hidden_states, read_head
from kfade.models.lengths import fresh_frequencies, length_class

UNAFFECTED = {
    "default": lambda: llama(rope_type="default", rope_theta=10.0),
    "linear": lambda: llama(rope_type="linear", factor=4.0, rope_theta=10.0),
    "yarn": lambda: llama(
        rope_type="yarn", factor=4.0, rope_theta=10.0, original_max_position_embeddings=TRAINED
    ),
    "llama3": lambda: llama(
        rope_type="llama3",
        factor=4.0,
        rope_theta=10.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=TRAINED,
    ),
    "gpt2": lambda: zoo.tiny("gpt2", dtype=torch.float32),
    "gemma3": lambda: zoo.tiny("gemma3", dtype=torch.float32),
}


def sequence(tokens: int, shift: int = 0) -> TokenSequence:
    numbers = tuple(5 + (7 * i * i + 3 * i + shift) % 31 for i in range(tokens))
    return TokenSequence(numbers, (False,) + (True,) * (tokens - 1))


def alone(build, one: TokenSequence) -> float:
    """By transformers, on a model that has seen nothing else."""
    tokens = torch.tensor([one.tokens])
    with torch.no_grad():
        logits = build()(input_ids=tokens[:, :-1]).logits[0]
    return logits.log_softmax(-1).gather(1, tokens[0, 1:, None]).sum().item()


LENGTHS = [10, 60, 12, 40, 17, 18, 16, 60]
SEQUENCES = [sequence(n, i) for i, n in enumerate(LENGTHS)]


@pytest.mark.parametrize("name", MODELS)
def test_a_sequence_is_as_likely_in_any_company(name):
    build = MODELS[name]
    expected = [alone(build, one) for one in SEQUENCES]
    model = build()
    assert log_likelihoods(model, SEQUENCES) == pytest.approx(expected, abs=2e-4)
    for i in (1, 0, 3, 4, 5, 6, 2):  # one after the other, longer ones before shorter ones
        assert log_likelihoods(model, [SEQUENCES[i]]) == pytest.approx([expected[i]], abs=2e-4)


@pytest.mark.parametrize("name", MODELS)
def test_a_beginning_is_read_from_the_pass_of_a_longer_one_only_if_it_is_as_likely_there(name):
    build, whole = MODELS[name], sequence(60)
    begun = [TokenSequence(whole.tokens[:n], whole.scored[:n]) for n in (60, 58, 16, 12)]
    expected = [alone(build, one) for one in begun]
    assert log_likelihoods(build(), begun, share=True) == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("name", MODELS)
def test_one_batch_of_all_would_differ_and_is_refused(name):
    model = MODELS[name]()
    pair = [sequence(10), sequence(60)]
    with torch.no_grad():
        (both,) = make_batches(pair)
        short = hidden_states(model, both.input_BT)[1, :9]
        with fresh_frequencies(model):
            lone = hidden_states(model, both.input_BT[1:, :9])[0]
    assert (short - lone).abs().max() > 1e-2
    targets = kfade.find_targets(model)
    match = r"a batch holds sequences of 9 and 59 positions.* beyond 16: .*group=length_class"
    with pytest.raises(InputError, match=match):
        forget_gradient(model, [both], targets, kfade.margin)
    with pytest.raises(InputError, match=match):
        kfade.KFAC().fit(model, [both], targets)
    with pytest.raises(InputError, match=match):
        hidden_reference(model, [both], "base")
    with pytest.raises(InputError, match=match):
        mean_objectives(model, [both], [kfade.margin])


@pytest.mark.parametrize("name", ["dynamic", "phi3", "gemma3 dynamic"])
def test_gradients_alone_and_in_batches_agree(name):
    model = MODELS[name]()
    targets = kfade.find_targets(model)
    group = length_class(model)
    one, many = (make_batches(SEQUENCES, budget=b, group=group) for b in (1, 10_000))
    assert len(many) < len(one) == len(SEQUENCES)
    first, second = (forget_gradient(model, b, targets, kfade.margin) for b in (one, many))
    for key in first:
        torch.testing.assert_close(first[key], second[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", UNAFFECTED)
def test_models_whose_frequencies_are_fixed_get_the_same_batches(name):
    group = length_class(UNAFFECTED[name]())
    assert group.borders == []
    assert shares_batches(UNAFFECTED[name](), zoo.tokenizer())
    plain, grouped = make_batches(SEQUENCES), make_batches(SEQUENCES, group=group)
    assert [b.id_B.tolist() for b in plain] == [b.id_B.tolist() for b in grouped]


def test_short_sequences_of_a_dynamic_model_share_batches():
    group = length_class(dynamic(window=2048))
    assert group.borders == [2048]
    assert not shares_batches(dynamic(window=2048), zoo.tokenizer())
    assert [len(b.id_B) for b in make_batches(SEQUENCES, group=group)] == [len(SEQUENCES)]


def test_batches_by_class():
    def lengths(model) -> list[list[int]]:
        batches = make_batches(SEQUENCES, group=length_class(model))
        return [[LENGTHS[i] for i in b.id_B.tolist()] for b in batches]

    # a sequence of n tokens has n - 1 positions: 17 tokens are still within 16
    assert lengths(longrope()) == [[60, 60, 40, 18], [17, 16, 12, 10]]
    assert lengths(dynamic()) == [[60, 60], [40], [18], [17, 16, 12, 10]]


def test_steps_within_a_class():
    assert length_class(longrope()).steps(10, 50) == 7  # passes over 10 to 16 positions
    assert length_class(longrope()).steps(17, 50) == 50
    assert length_class(dynamic()).steps(20, 50) == 1
    assert length_class(zoo.tiny("llama")).steps(20, 50) == 50


def test_a_dynamic_model_is_left_as_it_was_made():
    model = dynamic()
    before = copy.deepcopy(dict(model.named_buffers()))
    log_likelihoods(model, SEQUENCES)
    after = dict(model.named_buffers())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.model.rotary_emb.max_seq_len_cached == TRAINED
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["dynamic", "phi3"])
def test_unlearning_with_sequences_on_both_sides(name):
    model = MODELS[name]()
    update = kfade.unlearn(
        model, forget=SEQUENCES[:4], retain=SEQUENCES[2:], held_out=SEQUENCES[:2], **flat(kl=1e-3)
    )
    (step,) = update.provenance["steps"]
    assert step["measured_kl"] == pytest.approx(1e-3, rel=0.1)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch_tokens", [1, 4096])
def test_generation_across_the_border_is_that_of_each_prompt_alone(name, batch_tokens):
    build = MODELS[name]
    model = build()
    model.generation_config.eos_token_id = None
    prompts = [list(sequence(n, n).tokens) for n in (3, 9, 12, 15, 16, 17, 20, 20, 30)]
    prompts[-2][0] = 30
    expected = {}
    for i, prompt in enumerate(prompts):
        fresh = build()  # transformers' own frequencies remember the longest input
        expected[i] = greedy(fresh, prompt, [2], 12)
    decoding = Decoding(12, batch_tokens)
    found = dict(generate(model, zoo.tokenizer(), prompts, decoding))
    assert found == expected
    assert len({tuple(tokens) for tokens in expected.values()}) > 4


@pytest.mark.parametrize("name", ["dynamic", "longrope", "gemma3 longrope"])
def test_elms_continuations_across_the_border_are_those_without_a_cache(name):
    model = MODELS[name]()
    prompt, novice, expert = (sequence(n, n).tokens for n in (14, 3, 20))
    steering = Guidance(expert, novice, (9,), None, None, None, fluent_tokens=8, fluent_eta=1e4)
    head = read_head(model)
    with fresh_frequencies(model):
        drawn = steered_sample(Net(model, head, head), prompt, steering)

    def log_p(start, so_far):
        with torch.no_grad():  # a model that has seen nothing else
            logits = MODELS[name]()(input_ids=torch.tensor([[*start, *so_far]])).logits[0, -1]
        return logits.log_softmax(dim=-1)

    for n, token in enumerate(drawn):  # so large an eta leaves one choice
        assert token == int((log_p(novice, drawn[:n]) - log_p(expert, drawn[:n])).argmax())
