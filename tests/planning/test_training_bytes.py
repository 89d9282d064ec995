"""Planned peaks of training against the bytes that a training step holds."""

from __future__ import annotations

import pytest
import torch
from helpers import LiveBytes, random_sequences
from transformers import LlamaConfig, LlamaForCausalLM

from kfade import find_targets
from kfade.baselines.loop import _net
from kfade.baselines.losses import likelihood
from kfade.baselines.settings import Settings
from kfade.baselines.training import Training
from kfade.baselines.weights import Dense, LowRank
from kfade.planning.memory import RUNTIME_BYTES, model_bytes
from kfade.planning.training import training_bytes


def model_in(dtype):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=64,
    )
    return LlamaForCausalLM(config).eval().to(dtype)


def trainable_of(kind, model):
    if kind == "low rank":
        targets = find_targets(model)
        return LowRank(model, targets, rank=4, alpha=8.0, dropout=0.0, seed=0)
    names = [name for name, _ in model.named_parameters()]
    return Dense(model, names if kind == "all" else [n for n in names if ".mlp." in n])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["all", "some", "low rank"])
@pytest.mark.parametrize("length", [9, 160])  # weights or activations take most
def test_a_training_step_stays_within_its_plan(kind, dtype, length):
    model = model_in(dtype)
    trainable = trainable_of(kind, model)
    sequences = random_sequences(6, shortest=length, longest=length)
    sets = {"forget": sequences, "retain": sequences, "held_out": sequences}
    settings = Settings(lr=1e-3, steps=2, batch=6, batch_tokens=6 * length)
    tensors = trainable.tensors
    factors = sum(t.nbytes for t in tensors.values()) if kind == "low rank" else None
    planned = training_bytes(model, trainable.names, (6, length - 1), factors=factors)
    planned -= RUNTIME_BYTES + model_bytes(model)
    apart = [*model.parameters(), *model.buffers()]
    with trainable.training():
        run = Training(
            _net(model, trainable),
            [likelihood("forget", -1.0), likelihood("retain", 1.0)],
            trainable,
            sets,
            settings,
        )
        with LiveBytes(apart) as live:
            run.step(0)
            run.step(1)
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    outside = sum(t.nbytes for t in tensors.values() if t.untyped_storage().data_ptr() not in known)
    assert 0.6 * planned < live.peak + outside <= planned
