"""The suite for a GPU, rehearsed at tiny sizes on the CPU by its own command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from kfade.planning import cost

ROOT = Path(__file__).parents[1]
# Above the rounding of a width of 96, far below what a wrong eigenvector leaves.
ROUNDING = {"float32": 1e-5, "float64": 1e-13}


@pytest.fixture
def suite(monkeypatch, tmp_path):
    """Runs a piece and returns its records by name."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.gpu.__main__ import main

    def run(piece: str, *options: str) -> dict[str, dict]:
        command = ["gpu", piece, "--device", "cpu", "--tiny", "--out", str(tmp_path), *options]
        monkeypatch.setattr(sys, "argv", command)
        main()
        lines = (tmp_path / f"{piece}.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        return {record.pop("name"): record for record in records}

    return run


def test_decompositions_are_accurate_and_a_power_step_is_not(suite, capsys):
    found = suite("eigh")
    printed = capsys.readouterr().out
    machine = found.pop("machine")
    assert {"card", "driver", "torch", "transformers"} <= set(machine)
    assert {name.split()[0] for name in found} == set(ROUNDING)
    for name, told in found.items():
        bound = ROUNDING[name.split()[0]]
        assert told["orthogonality"] < bound, name
        if "power step" in name:
            assert bound < told["residual"] < 0.1, name
        else:
            assert told["residual"] < bound, name
        assert told["seconds"] > 0
        assert f"| {name} | " in printed


def test_batches_of_decompositions_are_accurate(suite):
    found = suite("batches")
    del found["machine"]
    ways = {name.partition(", ")[2] for name in found}
    assert ways == {"one by one", "side by side", "batch"}
    for name, told in found.items():
        assert max(told["residual"], told["orthogonality"]) < ROUNDING["float32"], name
        assert told["seconds"] > 0


def test_what_is_measured_is_not_measured_again(suite, tmp_path, capsys):
    first = suite("eigh")
    assert suite("eigh") == first  # its seconds, too
    path = tmp_path / "eigh.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-1]) + "\n")
    capsys.readouterr()
    again = suite("eigh")
    last = list(first)[-1]
    assert capsys.readouterr().out.count(" s {") == 1
    assert again.pop(last)["seconds"] != first.pop(last)["seconds"]
    assert again == first


def test_no_measurement_begins_after_its_minutes(suite, capsys):
    assert list(suite("eigh", "--minutes", "0")) == ["machine"]
    assert "0 minutes are over" in capsys.readouterr().out


def test_records_of_another_machine_are_not_continued(suite, tmp_path):
    suite("eigh")
    path = tmp_path / "eigh.jsonl"
    path.write_text(path.read_text().replace('"card":"', '"card":"another '))
    with pytest.raises(SystemExit, match="give --out DIR"):
        suite("eigh")


def test_a_fit_is_measured_beside_its_plan(suite, monkeypatch):
    monkeypatch.setattr(cost, "measure_speed", lambda device, dtype: cost.Speed(1e11, 1e11, 1e10))
    # Beyond 0.005 this random model forgets less, and the step would end there.
    monkeypatch.setattr("benchmarks.gpu.llama_fit.KLS", (0.004,))
    found = suite("fit")
    assert not [name for name, told in found.items() if "failure" in told]
    assert found["speed"]["bfloat16"] == 1e11
    unlearned = found["unlearn blocks 3-6"]
    assert unlearned["measured_kl"] == pytest.approx(unlearned["kl"], rel=0.1)
    assert unlearned["forget_loss_after"] > unlearned["forget_loss_before"]
    for told in found.values():
        for stage in set(told.get("seconds", ())) & {"covariance", "lambda"}:
            assert told["seconds"][stage] > 0
            assert told["planned_seconds"][stage] > 0
            assert told["planned_bytes"][stage] > 0
            assert told["limit"] == pytest.approx(told["flops"]["covariance"] / 1e11)
    dtypes = found["dtypes, block 3"]
    assert 0.9 < dtypes["cosine"] < 1
    assert dtypes["bfloat16"]["kl"] == pytest.approx(dtypes["float32"]["kl"], rel=0.2)
    assert dtypes["float32"]["forget_loss"] > dtypes["float32"]["before"]


def test_a_measurement_that_fails_does_not_stop_the_others(suite, monkeypatch):
    def fails(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with monkeypatch.context() as patch:
        from benchmarks.gpu import decompositions

        patch.setattr(decompositions.Case, "power_step", fails)
        found = suite("eigh")
    failed = {name for name, told in found.items() if "failure" in told}
    assert failed == {name for name in found if "power step" in name}
    assert "out of memory" in found[min(failed)]["failure"]
