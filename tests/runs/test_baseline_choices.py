"""Numbers of steps of baselines, from epochs and batches."""

from __future__ import annotations

import pytest
import zoo
from zoo.unusual import built

from kfade.baselines import methods
from kfade.errors import InputError
from kfade.runs.baseline_choices import settings_of
from kfade.runs.session import refuse_sharded_experts


@pytest.mark.parametrize(
    ("sequences", "batch", "epochs", "steps"),
    [
        (8, 32, 10, 10),  # a set smaller than a batch is one batch
        (1, 32, 10, 10),
        (32, 32, 10, 10),
        (100, 32, 10, 31),
        (64, 32, 0.5, 1),
    ],
)
def test_steps_of_epochs(sequences, batch, epochs, steps):
    defaults = methods.npo(beta=0.1).defaults
    given = {"batch": batch, "epochs": epochs, "lr": 1e-5}
    assert settings_of(defaults, given, sequences).steps == steps


def test_experts_of_a_sharded_model_are_not_trained(monkeypatch):
    refuse_sharded_experts(built("qwen3_moe"))
    monkeypatch.setattr("kfade.runtime.distributed.is_sharded", lambda model: True)
    refuse_sharded_experts(zoo.tiny("llama"))
    with pytest.raises(InputError, match="--shard does not train the weights of a mixture of exp"):
        refuse_sharded_experts(built("qwen3_moe"))
