"""Every recipe loads, says what the paper says, and runs on a tiny model of its architecture."""

from __future__ import annotations

import json
import math
import re
import runpy
from pathlib import Path

import pytest
import torch
import zoo
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from kfade.cli import main
from kfade.errors import InputError
from kfade.method.update import Update
from kfade.models.layers import parse_layers
from kfade.runs.config import read_config

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"), key=lambda path: path.name)
PAPER = [path for path in RECIPES if not path.name.startswith("small")]
PREPARE = runpy.run_path(str(FOLDER / "prepare.py"))
TEXTS = [{"text": " ".join("abcdefghijklmnopqrstuvwxyz"[i : i + 9])} for i in range(16)]
QUESTIONS = [{"question": f"a {x} b", "answer": f"c {x} d"} for x in "efghijklmnopqrst"]


def name(path: Path) -> str:
    return path.stem


def test_there_is_one_for_every_run_of_the_paper():
    names = {path.stem for path in RECIPES}
    runs = {"wmdp-bio", "wmdp-cyber", "tofu-forget05", "tofu-forget10"}
    kinds = ("ekfac", "kfac", "diagonal", "identity", "forget-in-hessian", "quarter", "sixteenth")
    ablations = {f"ablation-{kind}" for kind in kinds}
    assert runs | ablations | {"small-capitals", "small-tofu", "small-topic"} == names
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    for path in RECIPES:
        short = path.stem.replace("ablation", "") if "ablation" in path.stem else path.stem
        assert f"`{path.stem}`" in page or f"`{short}`" in page


# Model, estimator, objective, steps, forget sequences a step, λ, α, blocks: the paper's appendix D.
TABLE = {
    "wmdp-bio": ("zephyr-7b-beta", "ekfac", "margin", 4, 2500, 1e-14, 2e-3, "3-6"),
    "wmdp-cyber": ("out/wmdp-bio/model", "ekfac", "margin", 4, 2500, 1e-14, 5e-3, "3-6"),
    "tofu-forget05": ("tofu_ft_llama2-7b", "kfac", "ce", 1, None, 1e-8, 5e-3, None),
    "tofu-forget10": ("tofu_ft_llama2-7b", "kfac", "ce", 1, None, 1e-8, 5e-3, None),
    "ablation-ekfac": ("tofu_ft_phi-1.5", "ekfac", "ce", 1, None, 1e-10, 5e-3, None),
    "ablation-kfac": ("tofu_ft_phi-1.5", "kfac", "ce", 1, None, 1e-8, 5e-3, None),
    "ablation-diagonal": ("tofu_ft_phi-1.5", "diagonal", "ce", 1, None, 1e-10, 5e-3, None),
    "ablation-identity": ("tofu_ft_phi-1.5", "identity", "ce", 1, None, 1e-10, 5e-3, None),
    "ablation-forget-in-hessian": ("tofu_ft_phi-1.5", "ekfac", "ce", 1, None, 1e-10, 5e-3, None),
    "ablation-quarter": ("tofu_ft_phi-1.5", "ekfac", "ce", 1, None, 1e-10, 5e-3, None),
    "ablation-sixteenth": ("tofu_ft_phi-1.5", "ekfac", "ce", 1, None, 1e-10, 5e-3, None),
}


@pytest.mark.parametrize("path", PAPER, ids=name)
def test_settings_are_the_papers(path):
    run = read_config(path)
    model, *rest = TABLE[path.stem]
    assert run.model.model.endswith(model)
    assert rest == [
        run.fit.estimator, run.step.objective, run.step.steps, run.step.forget_batch,
        run.step.damping, run.size.alpha, run.fit.layers,
    ]  # fmt: skip
    assert run.fit.labels == "sampled"
    assert run.step.refit or run.step.steps == 1
    assert run.decided.correction.correct == 0
    assert run.step.relative_damping is run.size.kl is run.size.max_kl is None


@pytest.mark.parametrize("path", PAPER, ids=name)
def test_both_readings_of_the_step_size_are_stated(path):
    text = path.read_text(encoding="utf-8")
    alpha = read_config(path).size.alpha
    literal = float(re.search(r"alpha\^2/2 = (\S+) nats", text).group(1))
    root, squared = re.search(r"#   alpha: (\S+) +# predicts (\S+) nats", text).groups()
    assert literal == pytest.approx(alpha**2 / 2, rel=1e-2)
    assert float(root) == pytest.approx(math.sqrt(alpha), rel=1e-3)
    assert float(squared) == pytest.approx(alpha / 2, rel=1e-2)


def tiny_like(model: str, blocks: int) -> torch.nn.Module:
    """A random model of that model's architecture, with as many blocks and a wide window."""
    shape = {**zoo.SHAPE, "num_hidden_layers": blocks, "max_position_embeddings": 512}
    torch.manual_seed(0)
    if "zephyr" in model or "wmdp" in model:
        config = MistralConfig(**shape, num_key_value_heads=1, head_dim=8)
        return MistralForCausalLM(config)
    if "phi" in model:
        return PhiForCausalLM(PhiConfig(**shape, partial_rotary_factor=0.5))
    return LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=1))


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_it_runs_on_a_tiny_model_of_its_architecture(path, tmp_path):
    run = read_config(path)
    blocks = 1 + max(parse_layers(run.fit.layers or "0-1", 99))
    folder, out = str(tmp_path / "model"), tmp_path / "out"
    tiny_like(run.model.model, blocks).eval().save_pretrained(folder)
    zoo.tokenizer(chat=run.data.template == "chat").save_pretrained(folder)
    rows = QUESTIONS if "tofu" in path.read_text() else TEXTS
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    more = ["--forget-batch", "3"] if run.step.forget_batch else []
    arguments = [
        *("unlearn", folder, "--config", str(path), "--out", str(out), "--sequence-length", "16"),
        *("--forget", str(data), "--retain", str(data), "--holdout", "3", *more),
    ]
    assert main(arguments) == 0
    done = read_config(out / "config.yaml")
    assert (done.fit, done.size, done.step.objective) == (run.fit, run.size, run.step.objective)
    update = Update.load(out)
    steps = update.provenance["steps"]
    assert len(steps) == run.decided.step.steps
    touched = {int(key.split(".layers.")[1].split(".")[0]) for key in update.deltas}
    assert touched == parse_layers(run.fit.layers or "0-1", 99)
    assert all(math.isfinite(step["retain_kl"]) and step["retain_kl"] > 0 for step in steps)
    if run.size.alpha is not None:
        assert all(step["alpha"] == run.size.alpha for step in steps)
        assert steps[0]["predicted_kl"] == pytest.approx(run.size.alpha**2 / 2, rel=1e-4)
    if run.size.max_kl is not None:
        assert steps[-1]["retain_kl"] <= run.size.max_kl


def test_sequences_are_counted():
    """Two tokens and EOS a text: three texts fill four packed sequences of two tokens."""
    rows = [{"text": "a b"}, {"text": "  "}, {"text": "c d"}, {"text": "e f"}, {"text": "g h"}]
    taken = PREPARE["take_sequences"](rows, zoo.tokenizer(), 4, 2)
    assert [row["text"] for row in taken] == ["a b", "c d", "e f"]
    with pytest.raises(InputError, match="only 6 sequences of 2 tokens, not 9"):
        PREPARE["take_sequences"](rows, zoo.tokenizer(), 9, 2)


def test_a_share_of_lines(tmp_path):
    source, out = tmp_path / "all.jsonl", tmp_path / "new" / "some.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS), encoding="utf-8")
    PREPARE["main"]([str(source), "--share", "0.25", "--out", str(out)])
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 4
    places = [QUESTIONS.index(row) for row in rows]
    assert places == sorted(set(places))
    with pytest.raises(SystemExit):
        PREPARE["main"]([str(source), "--share", "2", "--out", str(out)])
