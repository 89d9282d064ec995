"""Evaluations in several processes write, to the byte, what one process writes.

evaluations_worker.py runs in 3 processes (gloo) with a whole model, in 2 with a sharded one.
"""

from __future__ import annotations

import json
from pathlib import Path

import evaluations_worker as worker
import pytest
from processes import run_together

from kfade.cli import main

pytest.importorskip("rouge_score", reason="the extra tofu is not installed")
pytestmark = pytest.mark.slow
ENDS = [0, 130, 0]  # exit codes: at once, interrupted, resumed
NAMES = [f"{name}{ending}" for name in worker.EVALUATIONS for ending in ("", ", resumed")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("inputs")
    worker.write_inputs(path)
    return path


@pytest.fixture(scope="module")
def expected(folder, tmp_path_factory) -> Path:
    to = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        codes = worker.evaluate(folder, to)
    assert codes == dict.fromkeys(worker.EVALUATIONS, ENDS)
    return to


@pytest.fixture(
    scope="module",
    params=[(3, False), (2, True)],
    ids=lambda given: f"{given[0]} processes{', sharded' if given[1] else ''}",
)
def found(request, folder, tmp_path_factory) -> tuple[Path, list[dict], bool]:
    """Where several processes have written, what each tells, and whether the model was sharded."""
    count, sharded = request.param
    to = tmp_path_factory.mktemp("several")
    run_together(count, worker.work, folder, to, sharded, said=to / "said")
    told = [json.loads((to / f"rank-{rank}.json").read_text()) for rank in range(count)]
    return to, told, sharded


def content(path: Path) -> dict[str, object]:
    """The files of an evaluation, without times and memory."""
    files: dict[str, object] = {file.name: file.read_bytes() for file in path.glob("*.jsonl")}
    files["manifest"] = json.loads((path / "manifest.json").read_text())
    metrics = json.loads((path / "metrics.json").read_text())
    files["metrics"] = {k: v for k, v in metrics.items() if k not in ("seconds", "peak_bytes")}
    return files


@pytest.mark.parametrize("name", NAMES)
def test_files_are_those_of_one_process(name, found, expected):
    to, _, sharded = found
    if sharded and name.split(",")[0] in worker.UNSHARDED:
        return
    ours, theirs = content(to / name), content(expected / name)
    assert ours.keys() == theirs.keys()
    for file in theirs:
        assert ours[file] == theirs[file], file
    assert len(theirs["items.jsonl"].splitlines()) > 2 + worker.INTERRUPTED_AT


def test_one_process_resumes_what_several_have_begun(found, folder, expected):
    to, told, _ = found
    assert all(own["left"] == [130] * len(worker.LEFT) for own in told)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert worker.resume(folder, to / "left") == [0] * len(worker.LEFT)
    for name in worker.LEFT:
        assert content(to / "left" / name) == content(expected / f"{name}, resumed")


def test_the_comparison_sees_another_update(folder, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    words = [w for w in worker.EVALUATIONS["memorisation"] if w != "model"]
    assert main(["eval", words[0], "edited", *words[1:], "--out", str(tmp_path / "other")]) == 0
    ours, theirs = content(tmp_path / "other"), content(expected / "memorisation")
    assert ours["items.jsonl"] != theirs["items.jsonl"]
    assert ours["metrics"] != theirs["metrics"]


def test_one_process_prints_and_all_end_alike(found):
    to, told, sharded = found
    names = [n for n in worker.EVALUATIONS if not (sharded and n in worker.UNSHARDED)]
    for rank, own in enumerate(told):
        assert own["codes"] == dict.fromkeys(names, ENDS)
        assert own["refused"] == 2
        assert own["check"] == 0
        said = (to / f"said/{rank}/stderr").read_text()
        assert ("small step on blocks" in said) == (rank == 0)
        assert "are not finite" in " ".join(said.split())
        lines = (to / f"said/{rank}/stdout").read_text().splitlines()
        assert len(lines) == (len(names) if rank == 0 else 0)


def test_every_item_is_computed_once(found):
    _, told, _ = found
    items = list(range(worker.ITEMS))
    for own in told:
        assert own["once"]["results"] == [i * i for i in items]
        assert own["nested"]["results"] == [[i * i, (i + 1) ** 2] for i in range(4)]
        assert own["undivided"] == {"results": [0, 1, 4, 9], "done": [0, 1, 2, 3]}
        assert own["exchanged"] == list(range(len(told)))
        assert own["lm-eval"]["answers"] == [f"{c} {x}" for c in "abcdefg" for x in "xy"]
    assert sorted(i for own in told for i in own["once"]["done"]) == items
    assert sorted(i for own in told for i in own["nested"]["done"]) == [0, 1, 1, 2, 2, 3, 3, 4]
    assert all(own["once"]["done"] and own["nested"]["done"] for own in told)
    asked = [own["lm-eval"]["asked"] for own in told]
    assert sorted(request for own in asked for request in own) == [
        [c, x] for c in "abcdefg" for x in "xy"
    ]
    for own in asked:  # requests with one context stay together
        assert own
        assert all(own.count([c, "x"]) == own.count([c, "y"]) for c in "abcdefg")


def test_an_error_of_one_process_is_raised_in_all(found):
    _, told, _ = found
    assert {own["failed"] for own in told} == {"item 7 is broken"}


def test_several_processes_are_needed_to_shard(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    out = str(tmp_path / "out")
    assert main(["eval", *worker.EVALUATIONS["kl"], "--out", out, "--shard"]) == 2
    assert "there is one process; start with torchrun" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
