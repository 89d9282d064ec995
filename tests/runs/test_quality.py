"""The quality of a run: what it decides, what overrides it, and what a finished run keeps of it."""

from __future__ import annotations

import pytest
import torch
import yaml
from safetensors.torch import load_file

from kfade import Correction, InputError, Run
from kfade.cli import main
from kfade.runs import CorrectionConfig, RunConfig, SizeConfig, StepConfig


def amounts(config: RunConfig) -> tuple[str | None, int | None, int | None]:
    decided = config.decided
    return decided.step.quality, decided.step.steps, decided.correction.correct


def test_a_run_that_says_nothing_has_what_python_has_by_default():
    assert amounts(RunConfig()) == ("default", Run().steps, Run().correction.count)
    assert Run().correction == Correction()
    assert RunConfig().step.refit == Run().refit


def test_a_quality_decides_what_is_not_given():
    found = {word: amounts(RunConfig(step=StepConfig(quality=word))) for word in ("fast", "best")}
    assert found["fast"] == ("fast", 1, 0)
    _, steps, corrections = found["best"]
    assert steps > Run().steps
    assert corrections > Run().correction.count
    own = RunConfig(
        step=StepConfig(quality="best", steps=2), correction=CorrectionConfig(correct=0)
    )
    assert amounts(own) == ("best", 2, 0)
    assert own.decided.decided == own.decided


def test_the_papers_size_means_the_papers_step():
    papers = SizeConfig(alpha=0.01)
    assert amounts(RunConfig(size=papers)) == ("fast", 1, 0)
    asked = RunConfig(size=papers, step=StepConfig(quality="default"))
    assert amounts(asked) == amounts(RunConfig())


def test_an_unknown_quality_is_refused_before_the_model_is_read(tmp_path, capsys):
    with pytest.raises(InputError, match="--quality good: give fast"):
        _ = RunConfig(step=StepConfig(quality="good")).decided
    command = ["unlearn", str(tmp_path / "no model"), "--forget", "f", "--retain", "r"]
    assert main([*command, "--quality", "good", "--out", str(tmp_path / "out")]) == 2
    assert "kfade: --quality good: give fast (one step), " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_finished_run_keeps_what_was_decided(tmp_path, model_dir):
    """So its configuration repeats it where another version decides otherwise."""
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "t1 t2 t3 t4 t5 t6"}\n' * 6)
    out, again = tmp_path / "out", tmp_path / "again"
    command = ["unlearn", str(model_dir), "--forget", str(texts), "--retain", str(texts)]
    command += ["--sequence-length", "4", "--holdout", "2", "--kl", "0.01"]
    assert main([*command, "--quality", "fast", "--out", str(out)]) == 0
    kept = yaml.safe_load((out / "config.yaml").read_text())
    assert (kept["step"]["quality"], kept["step"]["steps"]) == ("fast", 1)
    assert kept["correction"]["correct"] == 0
    assert main([*command, "--config", str(out / "config.yaml"), "--out", str(again)]) == 0
    first, second = (load_file(folder / "update.safetensors") for folder in (out, again))
    assert all(torch.equal(delta, second[name]) for name, delta in first.items())
