"""Runs are arranged to fit a memory before any long work, and give the same update."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
import zoo
from processes import killed_after_step, run_together, start
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM
from zoo.rows import FORGET, RETAIN

import kfade.runs.memory
from kfade.cli import main
from kfade.curvature.vectors import InHostMemory, OnDevice, OnDisk
from kfade.method.trial import Trial


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Path:
    """A model whose vectors matter beside a pass over a few tokens, and data."""
    root = tmp_path_factory.mktemp("memory")
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 8}
    config = LlamaConfig(**sizes, num_attention_heads=4, vocab_size=zoo.tokenizer().vocab_size)
    zoo.save(root / "model", LlamaForCausalLM(config))
    for name, rows in (("forget", FORGET), ("retain", RETAIN)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (root / f"{name}.jsonl").write_text(text)
    return root


SIZE = ["--kl", "0.02", "--quality", "fast"]


def unlearn(desk: Path, out: Path, *more: str) -> int:
    sets = ["--forget", str(desk / "forget.jsonl"), "--retain", str(desk / "retain.jsonl")]
    sizes = ["--sequence-length", "16", "--batch-tokens", "32", "--estimator", "diagonal"]
    return main(["unlearn", str(desk / "model"), *sets, *sizes, *SIZE, "--out", str(out), *more])


@pytest.fixture(scope="module")
def plain(desk) -> Path:
    assert unlearn(desk, desk / "plain") == 0
    return desk / "plain"


@pytest.fixture
def rooms(monkeypatch) -> list[kfade.runs.memory.Room]:
    """What runs are given."""
    given = []
    real = kfade.runs.memory.Room

    def noted(*arguments):
        given.append(real(*arguments))
        return given[-1]

    monkeypatch.setattr(kfade.runs.memory, "Room", noted)
    return given


def same_update(one: Path, other: Path) -> bool:
    first, second = (load_file(folder / "update.safetensors") for folder in (one, other))
    return list(first) == list(second) and all(torch.equal(first[n], second[n]) for n in first)


def free(monkeypatch, count: int) -> None:
    monkeypatch.setattr(kfade.runs.memory, "free_bytes", lambda device: count)


ENOUGH, LITTLE, NOTHING = 482_000_000, 466_400_000, 458_000_000
FEW = f"{LITTLE / 1e9:.4g}"


def test_without_an_option_all_is_on_the_device(desk, plain, rooms, tmp_path, monkeypatch):
    free(monkeypatch, ENOUGH)
    assert unlearn(desk, tmp_path / "out") == 0
    [room] = rooms
    assert (room.memory, room.recompute, room.storage) == (None, False, OnDevice())
    assert same_update(tmp_path / "out", plain)


@pytest.mark.parametrize("more", [[], ["--steps", "2"], ["--refine", "1"]])
def test_vectors_go_to_disk_where_memory_is_short(desk, plain, rooms, tmp_path, more):
    assert unlearn(desk, tmp_path / "out", "--memory", f"{LITTLE}", *more) == 0
    [room] = rooms
    assert isinstance(room.storage, OnDisk)
    assert 0 < room.storage.memory < room.memory < ENOUGH - LITTLE
    assert not room.recompute
    assert not (tmp_path / "out.part").exists()
    if more:
        assert unlearn(desk, tmp_path / "more", *more) == 0
        plain = tmp_path / "more"
    assert same_update(tmp_path / "out", plain)


def test_offload_says_where(desk, plain, rooms, tmp_path, capsys):
    assert unlearn(desk, tmp_path / "out", "--offload", "disk") == 0
    assert isinstance(rooms[0].storage, OnDisk)
    assert rooms[0].memory is None
    assert same_update(tmp_path / "out", plain)
    assert unlearn(desk, tmp_path / "cpu", "--offload", "cpu") == 2
    assert "the model is on the CPU; give --offload disk" in capsys.readouterr().err
    assert unlearn(desk, tmp_path / "tape", "--offload", "tape") == 2
    assert "--offload tape: give auto, device, cpu or disk" in capsys.readouterr().err
    held = ["--offload", "device", "--memory", f"{LITTLE}"]
    assert unlearn(desk, tmp_path / "device", *held) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert f"the run needs more; give --memory {FEW}GB --offload auto" in told
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_what_does_not_fit_is_said_before_any_pass(desk, tmp_path, capsys, monkeypatch):
    def never(*arguments, **options):
        raise AssertionError("a pass")

    monkeypatch.setattr("kfade.curvature.estimators.EKFAC.fit", never)
    monkeypatch.setattr(kfade.runs.memory, "SMALL", 0.0)
    free(monkeypatch, LITTLE)
    assert unlearn(desk, tmp_path / "out") == 2
    told = " ".join(capsys.readouterr().err.split())
    assert f"{FEW} GB are free on cpu: the run needs more" in told
    assert f"give --memory {FEW}GB --offload auto" in told
    free(monkeypatch, NOTHING)
    for more in ([], ["--memory", "auto"], ["--memory", f"{NOTHING}"]):
        assert unlearn(desk, tmp_path / "out", *more) == 2
        told = " ".join(capsys.readouterr().err.split())
        assert "GB at the least" in told
        assert "--dtype bfloat16" in told
    assert not list(tmp_path.iterdir())


def test_auto_takes_what_is_free_and_a_resumed_run_the_same(
    desk, plain, rooms, tmp_path, capsys, monkeypatch
):
    class Killed(BaseException): ...

    def killed(*arguments):
        raise Killed

    out = tmp_path / "out"
    free(monkeypatch, LITTLE)
    with monkeypatch.context() as patch:
        patch.setattr(Trial, "best", killed)
        with pytest.raises(Killed):
            unlearn(desk, out, "--memory", "auto")
    told = " ".join(capsys.readouterr().err.split())
    assert f"{FEW} GB are free; as with --memory {FEW}GB --offload auto" in told
    free(monkeypatch, ENOUGH)  # now; the groups that are finished are those of before
    assert unlearn(desk, out, "--memory", "auto", "--resume") == 0
    assert rooms[0].memory == rooms[1].memory
    assert same_update(out, plain)
    assert {path.name for path in out.iterdir()} == {path.name for path in plain.iterdir()}


def test_a_gpu_lends_host_memory(desk, monkeypatch):
    """Where the device is not the host, vectors go there; to disk if it has no room for them."""
    from kfade.planning.arrange import Arranger
    from kfade.planning.memory import Work

    model = LlamaForCausalLM.from_pretrained(desk / "model")
    way = Arranger(model, kfade.find_targets(model), Work(sequence_length=16), "unlearn").at_once()
    needed = 4 * way.subject.vector_bytes  # three, and the weights that are replaced
    for room, word in ((needed, "cpu"), (needed - 1, "disk")):
        free(monkeypatch, room)
        assert kfade.runs.memory._place(way, torch.device("cuda")) == word
    assert isinstance(kfade.runs.memory._storage("cpu", desk, 7), InHostMemory)


def test_a_sweep_and_a_fit_keep_to_a_memory(desk, rooms, tmp_path):
    retain = ["--retain", str(desk / "retain.jsonl"), "--sequence-length", "16"]
    sizes = ["--batch-tokens", "32"]
    fit = [
        "fit",
        str(desk / "model"),
        *retain,
        *sizes,
        "--estimator",
        "diagonal",
        "--out",
        str(tmp_path / "fit"),
    ]
    assert main([*fit, "--memory", f"{LITTLE}"]) == 0
    assert len(list((tmp_path / "fit").glob("curvature-*"))) > 1
    assert isinstance(rooms[0].storage, OnDevice)  # it has no vectors
    grid = ["--kl", "0.01,0.02", "--refine", "0,1", "--forget", str(desk / "forget.jsonl")]
    given = ["--curvature", str(tmp_path / "fit"), *retain, *sizes, *grid]
    points = []
    for name, more in (("plain", []), ("small", ["--memory", f"{LITTLE}"])):
        out = tmp_path / name
        assert main(["sweep", str(desk / "model"), *given, "--out", str(out), *more]) == 0
        lines = [json.loads(line) for line in (out / "points.jsonl").read_text().splitlines()]
        points.append([(line.get("alpha"), line.get("retain_kl")) for line in lines])
    assert points[0] == points[1]
    assert len([alpha for alpha, _ in points[0] if alpha]) == 4
    assert isinstance(rooms[1].storage, OnDevice)
    assert isinstance(rooms[2].storage, OnDisk)
    assert same_update(tmp_path / "plain", tmp_path / "small")


def words_of(desk: Path, out: Path, *more: str, steps: int = 3) -> list[str]:
    sets = ["--forget", str(desk / "forget.jsonl"), "--retain", str(desk / "retain.jsonl")]
    sizes = ["--sequence-length", "16", "--batch-tokens", "32", "--steps", f"{steps}", *more]
    return ["unlearn", str(desk / "model"), *sets, *sizes, "--kl", "0.02", "--out", str(out)]


@pytest.mark.parametrize("more", [["--memory", f"{LITTLE}"], ["--refine", "1"]])
def test_a_run_with_vectors_on_disk_goes_on_after_a_kill(desk, tmp_path, more):
    """To the same bits, and with no trace of the files that its vectors were in."""
    more = ["--estimator", "diagonal", "--offload", "disk", *more]
    whole, again = (words_of(desk, tmp_path / name, *more) for name in ("whole", "again"))
    assert main(whole) == 0
    process = start(killed_after_step, 2, again, said=tmp_path / "said")
    process.join()
    assert process.exitcode == -signal.SIGKILL
    state = {path.name for path in (tmp_path / "again.part" / "state").iterdir()}
    assert {"update-001.safetensors", "update-002.safetensors"} <= state
    assert all(name.startswith(("update-", "curvature-")) for name in state)
    assert main([*again, "--resume"]) == 0
    assert same_update(tmp_path / "whole", tmp_path / "again")


@pytest.mark.slow
@pytest.mark.parametrize("offload", [[], ["--offload", "disk"]])
def test_a_sharded_run_goes_on_after_a_kill(desk, tmp_path, offload):
    more = ["--estimator", "kfac", "--shard", "--layers", "2-5", *offload]
    whole, again = (words_of(desk, tmp_path / name, *more, steps=2) for name in ("whole", "again"))
    run_together(2, main, whole, said=tmp_path / "first")
    with pytest.raises(AssertionError):
        run_together(2, killed_after_step, 1, again, said=tmp_path / "second")
    run_together(2, main, [*again, "--resume"], said=tmp_path / "third")
    assert "resuming after step 1" in (tmp_path / "third/0/stderr").read_text()
    assert same_update(tmp_path / "whole", tmp_path / "again")


def test_fine_tuning_that_does_not_fit_is_said(desk, plain, tmp_path, capsys, monkeypatch):
    model, forget = str(desk / "model"), str(desk / "forget.jsonl")
    sets = ["--forget", forget, "--retain", str(desk / "retain.jsonl")]
    sizes = ["--sequence-length", "16", "--steps", "1"]
    commands = {
        "baseline": ["baseline", "ga", model, *sets, *sizes, "--out", str(tmp_path / "ga")],
        "attack": [
            *("attack", model, "--update", str(plain), *sets, *sizes, "--at", "0,1"),
            *("--data", forget, "--kind", "forget", "--out", str(tmp_path / "attack")),
        ],
    }
    capsys.readouterr()
    for name, words in commands.items():
        free(monkeypatch, NOTHING)
        assert main(words) == 2
        said = capsys.readouterr().err
        assert "0.458 GB are free on cpu, and training needs 0.5" in said
        assert ("--lora 8" in said) == (name == "baseline")
        assert not (tmp_path / name).exists()
        free(monkeypatch, 2 * ENOUGH)
        assert main(words) == 0
