"""Output folders: with several processes, and what is found where a run was interrupted."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import zoo
from helpers import command_line
from processes import start
from safetensors.torch import load_file

from kfade.cli import main
from kfade.errors import InputError
from kfade.models.load import save_model
from kfade.runtime import distributed
from kfade.runtime.run_dir import RunDir, differences


@pytest.mark.parametrize("finished", [False, True])
def test_a_process_that_does_not_write_looks_at_nothing_when_it_leaves(
    tmp_path, monkeypatch, finished
):
    def gone(path, pattern):
        """The first process removes what is being read."""
        raise FileNotFoundError(path)

    first = RunDir(tmp_path / "out", {})
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    monkeypatch.setattr(Path, "rglob", gone)
    with RunDir(tmp_path / "out", {}) as other:
        if finished:
            other.finish({}, {})
    assert first.part.is_dir()  # not its to remove


def test_the_first_process_removes_a_run_that_has_nothing_to_keep(tmp_path):
    with RunDir(tmp_path / "out", {}) as first:
        assert first.part.is_dir()
    assert not first.part.exists()
    with RunDir(tmp_path / "out", {}) as first:
        first.keep("piece", lambda path: path.write_text("worth keeping"))
    assert (first.state / "piece").is_file()


@pytest.fixture
def setup(tmp_path) -> dict[str, str]:
    save_model(zoo.tiny("llama", torch.float32), zoo.tokenizer(), tmp_path / "model")
    for name, rows in (("forget", "fghi"), ("retain", "abcdefghij")):
        lines = [json.dumps({"text": f"{x} k l m n o p q"}) + "\n" for x in rows]
        (tmp_path / name).write_text("".join(lines))
    return {name: str(tmp_path / name) for name in ("model", "forget", "retain", "out")}


def command(setup: dict[str, str], *more: str) -> list[str]:
    data = ["--forget", setup["forget"], "--retain", setup["retain"], "--sequence-length", "8"]
    steps = ["--steps", "2", "--alpha", "0.02"]
    given = ["unlearn", setup["model"], *data, *steps, "--out", setup["out"]]
    return command_line(given, more)


@pytest.fixture
def cut(setup, monkeypatch, capsys) -> Path:
    """The folder of a run that was interrupted after its first step."""

    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("kfade.runs.unlearning.step_line", interrupt)
        assert main(command(setup)) == 130
    assert "interrupted; to continue, run the same command with --resume" in capsys.readouterr().err
    part = Path(setup["out"] + ".part")
    assert (part / "state" / "update-001.safetensors").is_file()
    return part


def refusal(setup: dict[str, str], capsys, *more: str) -> str:
    capsys.readouterr()
    assert main(command(setup, "--resume", *more)) == 2
    lines = capsys.readouterr().err
    assert "Traceback" not in lines
    return " ".join(lines.split())


@pytest.mark.parametrize(
    ("kept", "settings"),
    [("fit", "also with other settings of size"), ("update-1", "with the same settings")],
)
def test_a_failed_run_says_with_which_settings_it_continues(tmp_path, kept, settings):
    free = {"size": "update-*"}

    def fail():
        with RunDir(tmp_path / "out", {"size": 1}, free=free) as folder:
            folder.keep(kept, lambda path: path.write_text("a piece"))
            raise InputError("too far")

    with pytest.raises(
        InputError, match=f"kept in .*: --resume continues from it, {settings}; for"
    ):
        fail()
    allowed = contextlib.nullcontext()
    with allowed if kept == "fit" else pytest.raises(InputError, match="--size 1"):
        RunDir(tmp_path / "out", {"size": 2}, resume=True, free=free)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe"])
def test_a_broken_record_of_a_run_is_told(setup, cut, capsys, content):
    for name in ("config.json", "inputs.json"):
        path = cut / name
        before = path.read_bytes()
        path.write_bytes(content)
        told = refusal(setup, capsys)
        assert f"{path}: not what the interrupted run wrote" in told
        assert f"remove {cut}" in told
        path.write_bytes(before)
    assert main(command(setup, "--resume")) == 0  # control


@pytest.mark.parametrize(
    ("name", "what"), [("config.json", "was asked for"), ("inputs.json", "read")]
)
def test_a_record_of_a_run_that_is_gone_is_told(setup, cut, capsys, name, what):
    (cut / name).unlink()
    told = refusal(setup, capsys)
    assert f"{cut / name}: is gone, so that nothing tells what the interrupted run {what}" in told


def test_half_a_kept_update_is_told(setup, cut, capsys):
    path = cut / "state" / "update-001.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    told = refusal(setup, capsys)
    assert f"{path}: not a whole safetensors file" in told
    assert "remove it, so that what it held is computed anew, or the folder" in told
    path.unlink()
    assert main(command(setup, "--resume")) == 0


def test_options_that_differ_are_named(setup, cut, capsys):
    told = refusal(setup, capsys, "--alpha", "0.03", "--no-pack", "--target", "*up_proj*")
    assert "--alpha 0.02 (here 0.03)" in told
    assert "--pack True (here False)" in told
    assert "--target None (here *up_proj*)" in told
    assert "--steps" not in told


def test_a_run_goes_on_with_less_memory(setup, cut, tmp_path):
    assert main(command(setup, "--resume", "--batch-tokens", "8", "--device", "cpu")) == 0
    whole = {**setup, "out": str(tmp_path / "whole")}
    assert main(command(whole)) == 0
    one, other = (load_file(Path(d["out"]) / "update.safetensors") for d in (setup, whole))
    for name in one:
        assert (one[name] - other[name]).norm() < 1e-4 * other[name].norm()


def test_differences_by_hand():
    one = {"a": {"b_c": 1, "d": 2}, "model": "x", "e": "y" * 5 + " " + "z" * 100}
    other = {"a": {"b_c": 3, "d": 2}, "model": "w", "e": None, "f": True}
    assert differences(one, other) == [
        *("--b-c 1 (here 3)", "MODEL x (here w)", "--e yyyyy ... (here None)"),
        "--f None (here True)",
    ]
    assert differences(one, one) == []


def test_all_files_of_a_run_have_one_mode(setup):
    before = os.umask(0o027)
    try:
        assert main(command(setup, "--export-model")) == 0
    finally:
        os.umask(before)
    modes = {p.name: p.stat().st_mode & 0o777 for p in Path(setup["out"]).rglob("*") if p.is_file()}
    assert {"update.safetensors", "model.safetensors", "manifest.json"} <= set(modes)
    assert set(modes.values()) == {0o640}


def test_what_a_killed_write_has_left_is_not_published(setup, cut):
    (cut / ".tmpAb12").write_bytes(b"half")
    assert main(command(setup, "--resume")) == 0
    assert not list(Path(setup["out"]).glob(".tmp*"))


def test_a_kept_run_without_state_is_begun_anew(tmp_path):
    (tmp_path / "out.part").mkdir()
    with RunDir(tmp_path / "out", {"a": 1}, resume=True) as folder:
        folder.reads({"x": "1"})
        folder.keep("piece", lambda path: path.write_text("kept"))
    with pytest.raises(InputError, match=r"asked for --a 1 \(here 2\)"):
        RunDir(tmp_path / "out", {"a": 2}, resume=True)


def test_an_interrupt_by_a_signal_says_how_to_go_on(setup, tmp_path):
    process = start(main, command(setup, "--steps", "4000"), said=tmp_path / "said")
    state = Path(setup["out"] + ".part") / "state"
    deadline = time.monotonic() + 120
    while not list(state.glob("update-*")):
        assert process.exitcode is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130
    error = (tmp_path / "said" / "stderr").read_text()
    assert (
        error.splitlines()[-1]
        == "kfade: interrupted; to continue, run the same command with --resume"
    )


@pytest.fixture
def heard():
    """Interrupts are heard; a job in the background of a shell ignores them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard")
def test_an_interrupt_that_a_library_turns_into_its_own_error_is_one(setup, monkeypatch, capsys):
    """safetensors does so while it reads a tensor. Without an interrupt the error is what it is."""

    def read(*arguments, interrupt: bool, **options):
        try:
            if interrupt:
                signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            pass
        raise ValueError("could not determine the shape")

    before = signal.getsignal(signal.SIGINT)
    apply = ["apply", setup["model"], "x", "--out", setup["out"]]
    monkeypatch.setattr("kfade.runs.editing.Update.load", partial(read, interrupt=True))
    assert main(apply) == 130
    assert capsys.readouterr().err == "kfade: interrupted\n"
    monkeypatch.setattr("kfade.runs.editing.Update.load", partial(read, interrupt=False))
    with pytest.raises(ValueError, match="could not determine"):
        main(apply)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_command_that_does_not_resume_promises_nothing(setup, monkeypatch, capsys):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("kfade.runs.editing.Update.load", interrupt)
    assert main(["apply", setup["model"], "x", "--out", setup["out"]]) == 130
    assert capsys.readouterr().err == "kfade: interrupted\n"
