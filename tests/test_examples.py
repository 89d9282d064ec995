"""The examples run as printed, on a tiny model."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import zoo

import kfade

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=["prompt", "text"])
def given(tmp_path, request) -> list[str]:
    """Model, forget and retain data in files."""
    zoo.save(tmp_path / "model")
    rows = {
        "forget": [
            {"prompt": f"a b {x}", "completion": " d e"}
            if request.param == "prompt"
            else {"text": f"a b {x} d e"}
            for x in "fghi"
        ],
        "retain": [{"text": f"{x} k l m n o p q r s"} for x in "abcdefghijkl"],
    }
    for name, own in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in own)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return [str(tmp_path / n) for n in ("model", "forget.jsonl", "retain.jsonl")]


def test_quickstart(given, capsys):
    update = load("quickstart").main(*given)
    assert isinstance(update, kfade.Update)
    assert "forget loss" in capsys.readouterr().out


def test_notebook(given, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["notebook.py", *given])
    # With 40 tokens a text is forgotten before the largest of these KLs.
    monkeypatch.setattr(kfade.StepSize, "decided", lambda size, vocabulary: size)
    load("notebook")
    said = capsys.readouterr().out
    kls = [float(kl) for kl in re.findall(r"retain KL (\S+):", said)]
    assert kls == pytest.approx([0.003, 0.01, 0.03], rel=0.1)  # as near as a search goes
    assert "edited model:" in said


def test_own_objective(given):
    example = load("own_objective")
    found = example.main(*given)
    assert set(found) == {"margin", "cross_entropy", "below_chance"}
    logits = torch.tensor([[4.0, 0.0, 0.0], [-4.0, 0.0, 0.0]], requires_grad=True)
    target = torch.tensor([0, 0])  # likely, and less likely than chance
    (own,) = torch.autograd.grad(example.below_chance(logits, target).sum(), logits)
    (plain,) = torch.autograd.grad(kfade.cross_entropy(logits, target).sum(), logits)
    assert torch.equal(own[0], plain[0])
    assert own[1].eq(0).all()
    assert plain[1].abs().max() > 0.9  # control: without the limit there is a gradient
    assert example.below_chance(logits, target)[1].item() == pytest.approx(math.log(3))


def test_compare_methods(given, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "k l m"}\n{"prompt": "n o p"}\n', encoding="utf-8")
    page = load("compare_methods").main(*given, str(prompts), str(tmp_path / "out"))
    text = page.read_text(encoding="utf-8")
    assert "K-FADE" in text
    assert "NPO" in text
