"""What is not a causal language model as kfade needs it, or not what the model reads: one line."""

from __future__ import annotations

import pytest
import torch
import zoo
from helpers import Snapshot, flat, random_sequences, same_bits, tiny_llama
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from transformers import (
    CTRLConfig,
    CTRLLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    MptConfig,
    MptForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

import kfade
from kfade.data.batches import make_batches
from kfade.data.sequences import TokenSequence
from kfade.errors import InputError
from kfade.method.grid import Point
from kfade.method.measure import hidden_reference
from kfade.method.size import StepSize
from kfade.method.sweep import Shared, sweep
from kfade.models.interface import check_batches, check_length, check_readable
from kfade.models.layers import choose_targets, find_targets
from kfade.planning.arrange import Arranger
from kfade.planning.memory import Work, examine
from kfade.runs.choices import estimator_of


@pytest.fixture
def data():
    return {
        "forget": random_sequences(2, seed=2),
        "held_out": random_sequences(2, seed=1),
        "retain": random_sequences(4),
    }


class Wrapper(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.inner, self.config = model, model.config

    def forward(self, *arguments, **named):
        return self.inner(*arguments, **named)


class PeftLike(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.base_model = model

    def merge_and_unload(self):
        return self.base_model


def with_two_heads():
    model = tiny_llama()
    model.lm_head = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 17)).double()
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Wrapper(tiny_llama()), "Wrapper has no get_input_embeddings: .*give the model it"),
        (lambda: nn.DataParallel(tiny_llama()), r"DataParallel has no get_input.*its \.module\)"),
        (lambda: PeftLike(tiny_llama()), r"PeftLike: adapters .*model\.merge_and_unload\(\)"),
        (with_two_heads, "its vocabulary head, a Sequential, is not one linear map"),
    ],
    ids=["wrapper", "data parallel", "adapters", "head"],
)
def test_what_is_no_model_of_one_linear_head_is_named(build, message, data):
    model, targets = build(), find_targets(tiny_llama())
    with pytest.raises(InputError, match=message):
        find_targets(model)
    with pytest.raises(InputError, match=message):
        kfade.unlearn(model, **data, **flat(alpha=0.01))
    with pytest.raises(InputError, match=message):
        kfade.KFAC().fit(model, make_batches(data["retain"]), targets)


def test_an_empty_list_of_targets(data):
    model = tiny_llama()
    with pytest.raises(InputError, match="targets: an empty list"):
        kfade.unlearn(model, **data, **flat(targets=[], alpha=0.01))
    for fit in (kfade.Identity, kfade.Diagonal, kfade.KFAC, kfade.EKFAC):
        with pytest.raises(InputError, match="targets: an empty list"):
            fit().fit(model, make_batches(data["retain"]), [])


def sequence(*tokens: int) -> TokenSequence:
    return TokenSequence(tokens, (False, *[True] * (len(tokens) - 1)))


@pytest.mark.parametrize(("token", "where"), [(17, "forget"), (99, "retain"), (-1, "held_out")])
def test_tokens_without_an_embedding(data, token, where):
    model = tiny_llama()
    told = f"a text holds the token {token}, but the model's embedding has 17 rows"
    data[where] = [*data[where], sequence(1, 2, token)]
    with pytest.raises(InputError, match=told):
        kfade.unlearn(model, **data, **flat(alpha=0.01))
    batches = make_batches([sequence(1, 2, token)])
    targets = find_targets(model)
    for fit in (kfade.Identity, kfade.Diagonal, kfade.KFAC, kfade.EKFAC):
        with pytest.raises(InputError, match=told):
            fit().fit(model, batches, targets)
    point = Point("margin", "all", kfade.Damping(0.1), StepSize(alpha=0.1))
    with pytest.raises(InputError, match=told):
        sweep(
            model,
            [point],
            Shared(
                kfade.KFAC().fit(model, make_batches(random_sequences(2)), targets),
                targets,
                {"margin": kfade.margin},
            ),
            forget=[sequence(1, 2, token)],
            held_out=data["held_out"],
        )


SHAPE = {"vocab_size": 17, "n_embd": 8, "n_layer": 2, "n_head": 2}
LEARNED = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**SHAPE, n_positions=12)),
    "gpt-neo": lambda: GPTNeoForCausalLM(
        GPTNeoConfig(
            vocab_size=17,
            hidden_size=8,
            num_layers=2,
            num_heads=2,
            max_position_embeddings=12,
            attention_types=[[["global", "local"], 1]],
        )
    ),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=17,
            hidden_size=8,
            ffn_dim=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=12,
            word_embed_proj_dim=8,
        )
    ),
    "mpt": lambda: MptForCausalLM(
        MptConfig(vocab_size=17, d_model=8, n_heads=2, n_layers=2, max_seq_len=12)
    ),
    "ctrl": lambda: CTRLLMHeadModel(CTRLConfig(**SHAPE, dff=12, n_positions=12)),
}


@pytest.mark.parametrize("family", LEARNED)
def test_a_sequence_longer_than_the_learned_positions(family, data):
    model = LEARNED[family]().double().eval()
    longest, longer = (sequence(*[3] * n) for n in (13, 14))  # 12 and 13 positions
    kind = type(model).__name__
    told = (
        f"({kind} cannot read 13 positions|13 positions, over the window of 12 of {kind}).*encode"
    )
    check_readable(model, [longest])
    check_batches(model, make_batches([longest]))
    kfade.KFAC().fit(model, make_batches([longest]), find_targets(model))
    with pytest.raises(InputError, match=told):
        kfade.KFAC().fit(model, make_batches([longer]), find_targets(model))
    data["held_out"] = [*data["held_out"], longer]
    with pytest.raises(InputError, match=told):
        kfade.unlearn(model, **data, **flat(alpha=0.01))
    targets = find_targets(model)
    examine(model, targets, Work(sequence_length=13))
    with pytest.raises(InputError, match=told):
        examine(model, targets, Work(sequence_length=14))
    with pytest.raises(InputError, match=told):
        Arranger(model, targets, Work(batch_tokens=64, sequence_length=14), "fit").at_once()


def test_an_index_beyond_a_table_is_told_without_the_table_being_read():
    """On a GPU reading it would end the process's use of the device."""
    model = LEARNED["gpt2"]().eval()
    model.config.n_positions = 0  # not stated
    with pytest.raises(InputError, match=r"\(row 12 of a table of 12\); give shorter"):
        check_length(model, 13)


def test_a_rotary_model_without_a_stated_window_reads_any_length():
    model = tiny_llama()
    model.config.max_position_embeddings = 0  # not stated
    check_length(model, 80)


@pytest.mark.parametrize("where", ["mlp.up_proj", "self_attn.q_proj"])
@pytest.mark.parametrize("kind", ["weight_norm", "pruned"])
def test_a_weight_made_of_other_parameters_is_left_out(where, kind, data):
    model = tiny_llama()
    module = model.model.layers[0].get_submodule(where)
    if kind == "weight_norm":
        parametrizations.weight_norm(module)
    else:
        prune.random_unstructured(module, "weight", 0.5)
    name = f"model.layers.0.{where}.weight"
    chosen = choose_targets(model)
    mlp = "mlp" in where
    assert len(chosen.targets) == 6 - mlp
    assert [w.name for w in chosen.left_out] == [name] * mlp  # attention is no default
    if mlp:
        assert "1 weights made of other parameters" in chosen.summary
    with pytest.raises(InputError, match=f"{name} is made of other parameters .*make it permanent"):
        find_targets(model, pattern=f"*{where}*")
    update = kfade.unlearn(model, **data, **flat(alpha=0.01))
    assert name not in update.deltas
    if kind == "weight_norm":
        parametrize.remove_parametrizations(module, "weight")
    else:
        prune.remove(module, "weight")
    assert len(find_targets(model)) == 6


def test_weights_made_in_inference_mode(data):
    with torch.inference_mode():
        model = tiny_llama()
    with pytest.raises(InputError, match="LlamaForCausalLM: its weights were made within torch"):
        find_targets(model)
    with pytest.raises(InputError, match=r"made within torch\.inference_mode"):
        hidden_reference(model, make_batches(data["retain"]), "x")


def test_a_configuration_without_named_outputs_changes_nothing(data):
    plain, tuples = tiny_llama(), tiny_llama()
    tuples.config.return_dict = False
    before = Snapshot.of(tuples)
    ours, theirs = (kfade.unlearn(model, **data, **flat(alpha=0.01)) for model in (tuples, plain))
    assert all(torch.equal(ours.deltas[name], theirs.deltas[name]) for name in theirs.deltas)
    assert tuples.config.return_dict is False
    assert before.differences(tuples) == []


@pytest.mark.parametrize(
    ("tokens", "scored", "message"),
    [
        ((1, 2), (False,), "2 tokens with 1 marks"),
        ((1, 2), (False, False), "without a scored token"),
        ((1, 2), (True, True), "first token is scored"),
        ((), (), "without a scored token"),
    ],
)
def test_a_sequence_that_is_none(tokens, scored, message):
    with pytest.raises(InputError, match=message):
        TokenSequence(tokens, scored)


def test_nan_is_blamed_on_the_weight_that_holds_it(data):
    model = tiny_llama()
    targets = find_targets(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"NaN or Inf in model\.layers\.1\.mlp\.up_proj\.weight"):
        kfade.KFAC().fit(model, make_batches(data["retain"]), targets)


def test_a_memory_below_the_model_is_told_as_such():
    model = zoo.tiny("llama")
    work = Work(batch_tokens=64, sequence_length=16)
    budget = Arranger(model, find_targets(model), work, "fit").least(1).budget
    with pytest.raises(InputError, match=r"the model and a pass alone are over it by 0\.4\d GB"):
        kfade.KFAC().fit(model, make_batches([sequence(1, 2)]), find_targets(model), memory=budget)


def test_each_estimator_is_known_by_its_name():
    kinds = (kfade.Identity, kfade.Diagonal, kfade.KFAC, kfade.EKFAC)
    assert [estimator_of(kind.name) for kind in kinds] == [kind() for kind in kinds]
    draw = kfade.sampled_labels
    assert [estimator_of(kind.name, draw) for kind in kinds[1:]] == [k(draw) for k in kinds[1:]]


def test_fit_kfac_is_short_for_kfac():
    model = tiny_llama()
    targets, batches = find_targets(model), make_batches(random_sequences(3))
    draw = kfade.sampled_labels
    short = kfade.fit_kfac(model, batches, targets, draw=draw, seed=1)
    full = kfade.KFAC(draw).fit(model, batches, targets, seed=1)
    other = kfade.KFAC(draw).fit(model, batches, targets)
    assert short.provenance == full.provenance
    for name, block in full.blocks.items():
        assert same_bits(short.blocks[name].eigenvalues, block.eigenvalues)
        assert not same_bits(other.blocks[name].eigenvalues, block.eigenvalues)
