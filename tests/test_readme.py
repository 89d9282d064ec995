"""The README's commands run as printed, on a tiny model and tiny data."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zoo

import kfade
from kfade.cli import main
from kfade.method.update import Update

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def desk(tmp_path, monkeypatch) -> Path:
    """A folder with forget.jsonl, retain.jsonl and a tiny model called MODEL, as working folder."""
    zoo.save(tmp_path / "MODEL")
    forget = [{"prompt": f"a b {x}", "completion": " d e"} for x in "fghi"]
    retain = [{"text": f"{x} k l m n o p q r s t u v w {y}"} for x in "abcdef" for y in "xyz"]
    for name, rows in (("forget", forget), ("retain", retain)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    zoo.save(tmp_path / "RETAIN", zoo.tiny("llama", dtype=torch.float32, seed=1))
    evaluation_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def evaluation_data(folder: Path) -> None:
    """What the README's evaluations read."""
    tofu = [
        {
            "question": f"{x} b",
            "answer": "c",
            "paraphrased_answer": "d c",
            "perturbed_answer": ["e", "f"],
        }
        for x in "abc"
    ]
    files = {
        "benign": [{"text": f"{x} y z {x}"} for x in "abcdefgh"],
        "alpaca": [{"instruction": f"{x} y"} for x in "abc"],
        "other": [{"prompt": f"a b {x}", "completion": " e d"} for x in "jklm"],
        "questions": [{"question": "a", "choices": ["b", "c d"], "answer": 0}],
        **{
            f"tofu/{name}_perturbed": tofu
            for name in ("forget10", "retain", "real_authors", "world_facts")
        },
    }
    (folder / "tofu").mkdir()
    for name, rows in files.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)


def several_processes(words: list[str]) -> None:
    """As printed, with two processes instead of eight."""
    assert words[:5] == ["torchrun", "--nproc-per-node", "8", "-m", "kfade"]
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *words[3:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*words, "--sequence-length", "8"], env=environment, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert Update.load("out/run-large").deltas


@pytest.mark.slow
def test_shell_blocks(desk):
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]
    assert len(lines) >= 12
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[0] == "torchrun":
            several_processes(words)
            continue
        assert words[0] == "kfade"
        if words[1] in ("unlearn", "fit", "baseline", "attack"):  # the tiny model's window is short
            words += ["--sequence-length", "8"]
        if words[1] in ("baseline", "attack"):
            words += ["--steps", "4"]
        if words[1] == "export-lora":  # the tiny model's weights have no rank 32
            words[words.index("32")] = "2"
        if words[1] == "attack":
            words += ["--at", "0,4"]
        if words[1:3] in (["eval", "kl"], ["eval", "tofu"]):
            words += ["--max-new-tokens", "4"]
        assert main(words[1:]) == 0, line
    assert "retain model" in (desk / "report.html").read_text(encoding="utf-8")


def test_python_block(desk):
    (block,) = blocks("python")
    block = block.replace("HuggingFaceTB/SmolLM2-135M-Instruct", "MODEL")
    block = block.replace("tokenizer)\n", "tokenizer, length=8)\n")
    block = block.replace("kl=0.01", "kl=0.005")  # with 40 tokens there is no more to forget
    names: dict = {}
    exec(block, names)
    assert isinstance(names["update"], kfade.Update)
    assert names["update"].provenance["steps"][-1]["retain_kl"] == pytest.approx(0.005, rel=0.1)
