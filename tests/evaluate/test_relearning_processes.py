"""Several processes attack as one does: relearning_worker.py runs in 2 and in 3 of them (gloo)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import relearning_worker
import torch
import zoo
from helpers import command_line, relative_error
from processes import run_together
from zoo.rows import FORGET, RETAIN

from kfade.cli import main
from kfade.evaluate.log import read_log
from kfade.method.update import Update

# Four steps of AdamW in float64, on sums in another order.
EXACT = 1e-8
KINDS = ("whole", "sharded")
TUNED = ("tuned", "tuned one by one")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def expected() -> dict:
    return relearning_worker.compute(sharded=False)


@pytest.fixture(scope="module", params=[2, 3])
def found(request, tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("processes")
    run_together(request.param, relearning_worker.work, folder, said=folder)
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(request.param)]


def error(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    assert list(ours) == list(theirs)
    return max(relative_error(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_processes_attack_as_one(kind, found, expected):
    for rank in found:
        ours = rank[kind]
        assert ours["kept"]
        for what in TUNED:
            assert error(ours[what], expected[what]) < EXACT
            assert error(ours[what], found[0][kind][what]) == 0  # to the bit
        for (state, step, values), theirs in zip(ours["figures"], expected["figures"], strict=True):
            assert (state, step) == theirs[:2]
            assert values == pytest.approx(theirs[2], rel=1e-6, abs=1e-12)


def test_gradients_of_one_process_are_far_off(found, expected):
    """Negative control: without the sum."""
    for what in TUNED:
        assert max(error(rank["not summed"][what], expected[what]) for rank in found) > 1e-3


@pytest.fixture
def attack(tmp_path):
    """The words of an attack on a tiny model, into a folder."""
    model, update = str(tmp_path / "model"), tmp_path / "update.safetensors"
    zoo.save(tmp_path / "model")
    for name, rows in (("forget", FORGET), ("retain", RETAIN)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    weight = "model.layers.1.mlp.up_proj.weight"
    shape = zoo.tiny("llama").get_parameter(weight).shape
    Update({weight: torch.full(shape, 0.05)}).save(update)
    forget, retain = (str(tmp_path / f"{name}.jsonl") for name in ("forget", "retain"))

    def words(out: Path, *more: str) -> list[str]:
        given = [
            *("attack", model, "--update", str(update), "--forget", forget, "--retain", retain),
            *("--data", retain, "--kind", "benign", "--data", forget, "--kind", "forget"),
            *("--sequence-length", "8", "--steps", "4", "--lr", "1e-3", "--at", "0,2,4"),
        ]
        return command_line([*given, "--out", str(out)], more)

    return words


def rows_of(out: Path) -> dict[str, dict[str, float]]:
    return {name: row["values"] for name, row in read_log(out / "attack.jsonl").items.items()}


@pytest.mark.parametrize("more", [[], ["--shard"]])
def test_an_attack_of_two_processes_from_files(attack, tmp_path, more):
    assert main(attack(tmp_path / "one")) == 0
    run_together(2, main, attack(tmp_path / "two", *more), said=tmp_path / "said")
    ours, theirs = rows_of(tmp_path / "two"), rows_of(tmp_path / "one")
    assert list(ours) == list(theirs)
    for name, values in theirs.items():  # AdamW makes steps of float32's rounding
        assert ours[name] == pytest.approx(values, rel=1e-3, abs=1e-6)
    again = tmp_path / "again"
    cut = relearning_worker.interrupted
    run_together(2, cut, attack(again, *more), said=tmp_path / "cut")
    assert not again.exists()
    run_together(2, main, attack(again, "--resume", *more), said=tmp_path / "resumed")
    assert rows_of(again) == ours
