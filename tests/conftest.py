"""Fixtures: one tiny float64 model, its targets, and a few random sequences."""

from __future__ import annotations

import os
from pathlib import Path

# No test asks the hub. Without a network each one that names a missing model would wait for a
# minute. It is read when huggingface_hub is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import zoo
from helpers import random_sequences, tiny_llama
from on_device import use_device

from kfade.data.batches import Batch, make_batches
from kfade.data.sequences import TokenSequence
from kfade.models.layers import find_targets
from kfade.models.targets import Target

torch.set_num_threads(1)
use_device()


@pytest.fixture
def model():
    return tiny_llama()


@pytest.fixture
def targets(model) -> list[Target]:
    return find_targets(model)


@pytest.fixture
def sequences() -> list[TokenSequence]:
    return random_sequences(8)


@pytest.fixture
def batches(sequences) -> list[Batch]:
    """Several batches, with padding in some."""
    return make_batches(sequences, budget=20)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    """A folder with a tiny model and its tokenizer."""
    folder: Path = tmp_path_factory.mktemp("model")
    zoo.save(folder)
    return folder
