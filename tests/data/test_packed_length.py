"""How long packed sequences are where nothing is said: 512 tokens, or a shorter window."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
import zoo
from transformers import LlamaConfig, LlamaForCausalLM
from zoo.rows import EXTRA, FORGET, RETAIN

from kfade.cli import main
from kfade.data.examples import Example
from kfade.data.sequences import encode, packed_length
from kfade.errors import InputError
from kfade.method.update import Update
from kfade.models.lengths import model_window


@pytest.fixture
def files(tmp_path):
    zoo.save(tmp_path / "model")
    for name, rows in (("forget", FORGET), ("retain", RETAIN)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def sources(folder):
    return ["--forget", f"{folder}/forget.jsonl", "--retain", f"{folder}/retain.jsonl"]


def recorded(path):
    return json.loads((path / "manifest.json").read_text())["config"]


def test_the_length_by_what_is_given_and_the_window():
    assert [packed_length(None, w) for w in (None, 32, 512, 4096)] == [512, 32, 512, 512]
    assert [packed_length(8, w) for w in (None, 8, 9)] == [8, 8, 8]
    with pytest.raises(InputError, match="--sequence-length 9 is over the model's window of 8 "):
        packed_length(9, 8)


def test_sequences_are_as_long_as_the_window_unless_it_is_said():
    texts = [Example(str(i), text="a b c d") for i in range(300)]
    longest = [
        max(len(s.tokens) for s in encode(texts, zoo.tokenizer(), **given))
        for given in ({}, {"window": 32}, {"window": 32, "length": 8})
    ]
    assert longest == [512, 32, 8]
    with pytest.raises(InputError, match="--sequence-length 512 is over the model's window of 32"):
        encode(texts, zoo.tokenizer(), window=32, length=512)


def test_runs_record_the_length_that_they_used(files):
    model = str(files / "model")
    own = ["--retain", f"{files}/retain.jsonl", "--out", f"{files}/fit"]
    assert main(["fit", model, *own]) == 0
    assert recorded(files / "fit")["data"]["sequence_length"] == zoo.WINDOW
    run = files / "run"
    assert main(["unlearn", model, *sources(files), "--kl", "0.01", "--out", str(run)]) == 0
    config = yaml.safe_load((run / "config.yaml").read_text())
    update = Update.load(run).provenance["config"]
    for found in (config, update, recorded(run)):
        assert found["data"]["sequence_length"] == zoo.WINDOW
    swept = ["--curvature", f"{files}/fit", "--forget", f"{files}/forget.jsonl", "--kl", "0.01"]
    assert main(["sweep", model, *swept, "--out", f"{files}/sweep"]) == 0
    assert recorded(files / "sweep")["data"]["sequence_length"] == zoo.WINDOW
    trained = [*sources(files), *EXTRA.get("gd", ()), "--steps", "1", "--lr", "0.01"]
    assert main(["baseline", "gd", model, *trained, "--out", f"{files}/gd"]) == 0
    assert recorded(files / "gd")["data"]["sequence_length"] == zoo.WINDOW
    attack = ["--update", str(run), *sources(files), "--data", f"{files}/retain.jsonl"]
    attack += ["--steps", "1", "--at", "1", "--out", f"{files}/attack"]
    assert main(["attack", model, *attack]) == 0
    assert recorded(files / "attack")["run"]["data"]["sequence_length"] == zoo.WINDOW


def test_a_plan_keeps_to_the_window(tmp_path, capsys):
    folder = str(tmp_path)
    LlamaConfig(**{**zoo.GROUPED, "max_position_embeddings": 64}).save_pretrained(folder)
    assert main(["plan", folder, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["work"]["sequence_length"] == 64
    assert main(["plan", folder, "--sequence-length", "65"]) == 2
    assert "--sequence-length 65 is over the model's window of 64" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("window", "rope", "expected"),
    [
        (64, {"rope_type": "default"}, 64),
        (64, {"rope_type": "linear", "factor": 4.0}, 64),
        (64, {"rope_type": "dynamic", "factor": 4.0}, 256),
        (
            64,
            {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 32},
            128,
        ),
        (
            64,
            {"rope_type": "dynamic", "factor": 1.5, "original_max_position_embeddings": 32},
            64,
        ),
        (
            64,
            {
                "rope_type": "longrope",
                "factor": 8.0,
                "original_max_position_embeddings": 16,
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
            },
            64,
        ),
    ],
)
def test_the_window_of_stretched_frequencies(window, rope, expected):
    shape = {**zoo.GROUPED, "max_position_embeddings": window}
    config = LlamaConfig(**shape, rope_parameters={"rope_theta": 10.0, **rope})
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert model_window(model) == expected
