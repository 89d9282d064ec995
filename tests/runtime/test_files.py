"""What cannot be written is said in one line, and nothing half-written is left."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import zoo

import kfade
from kfade.cli import main
from kfade.curvature.block import EigenBlock
from kfade.curvature.store import StoredBlocks, write_blocks
from kfade.evaluate.item_log import ItemLog
from kfade.evaluate.log import read_log
from kfade.method.update import Update
from kfade.models.layers import find_targets
from kfade.models.load import save_model
from kfade.runtime.files import making, unwritable, write_file, write_text, writing
from kfade.runtime.run_dir import RunDir, check_free

LIMIT = 4096  # bytes that a file may have, where a test says so


@contextlib.contextmanager
def short_files():
    """The system refuses every file beyond LIMIT, in any library, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def no_space(*args, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def base(tmp_path) -> Path:
    save_model(zoo.tiny("llama", torch.float32), zoo.tokenizer(), tmp_path / "base")
    rows = [{"text": f"{x} k l m n o p q r s"} for x in "abcdefgh"]
    (tmp_path / "rows").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "base"


def an_update(size: int = 1) -> Update:
    deltas = {t.name: torch.zeros(t.shape) for t in find_targets(zoo.tiny("llama"))}
    return Update({**deltas, "more": torch.zeros(size)}) if size > 1 else Update(deltas)


def one_line(capsys) -> str:
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("kfade: ")]
    assert len(said) == 1
    return said[0]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "whatever"), "No space left on device); free some space"),
        (Exception("I/O error: No space left on device (os error 28)"), "free some space"),
        (OSError(errno.EROFS, "x"), "Read-only file system); choose a place that you may"),
        (PermissionError(errno.EACCES, "x"), "Permission denied); choose a place that you may"),
        (OSError([("a", "b", "[Errno 28] No space left on device: 'b'")]), "free some space"),
        (OSError("in its own words\nmore"), "(in its own words)"),
    ],
)
def test_the_systems_reason_and_what_to_do(error, said):
    with pytest.raises(kfade.InputError) as caught, writing(Path("out/x")):
        raise error
    assert str(caught.value).startswith("out/x: cannot be written (")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_faults_stay_what_they_are():
    with pytest.raises(KeyError), writing(Path("x")):
        raise KeyError("a bug")


def test_what_is_to_be_copied_is_named():
    error = PermissionError(errno.EACCES, "Permission denied", "/models/a/LICENSE")
    assert "(Permission denied: /models/a/LICENSE)" in str(unwritable(Path("out"), error))


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "a.json"
    write_text(path, "before")
    (tmp_path / "link").symlink_to(path)
    with short_files(), pytest.raises(kfade.InputError, match="File too large"):
        write_text(tmp_path / "link", "x" * (LIMIT + 1))
    assert path.read_text() == "before"
    write_text(tmp_path / "link", "after")
    assert path.read_text() == "after"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "link"]
    assert (tmp_path / "link").is_symlink()


def test_a_device_is_written_to_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_text(tmp_path / "pipe", "through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()
    with pytest.raises(kfade.InputError, match="Is a directory"):
        write_text(tmp_path, "x")


def test_a_folder_that_could_not_be_filled_goes_unless_it_was_there(tmp_path):
    def half(folder):
        with making(folder):
            (folder / "half").write_text("x")
            raise RuntimeError

    for folder in (tmp_path / "new", tmp_path):
        with pytest.raises(RuntimeError):
            half(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["half"]


@pytest.mark.parametrize("what", ["update", "blocks", "model"])
def test_tensors_that_do_not_fit_leave_nothing(tmp_path, what):
    path = tmp_path / "written"
    large, model = torch.zeros(LIMIT), zoo.tiny("llama", torch.float32)
    write = {
        "update": Update({"w": large}).save,
        "blocks": lambda path: write_blocks(path, {"w": EigenBlock(None, None, large[None])}, {}),
        "model": lambda path: save_model(model, zoo.tokenizer(), path),
    }[what]
    with short_files(), pytest.raises(kfade.InputError, match=r"written: cannot .* too large"):
        write(path)
    assert not list(tmp_path.iterdir())


def test_what_is_overwritten_stays_where_the_new_does_not_fit(tmp_path):
    path = tmp_path / "curvature-000.safetensors"
    write_blocks(path, {"w": EigenBlock(None, None, torch.ones(1, 2))}, {"of": "before"})
    with short_files(), pytest.raises(kfade.InputError):
        write_blocks(path, {"w": EigenBlock(None, None, torch.ones(1, LIMIT))}, {})
    assert StoredBlocks("cpu").include(path) == {"of": "before"}


@pytest.mark.parametrize("word", ["apply", "revert"])
def test_apply_on_a_full_disk(base, tmp_path, capsys, word):
    an_update().save(tmp_path / "u.safetensors")
    run = [word, str(base), str(tmp_path / "u.safetensors"), "--out", str(tmp_path / "out")]
    with short_files():
        assert main([*run, "--device", "cpu"]) == 2
    assert "out.writing: cannot be written (File too large)" in one_line(capsys)
    assert not list(tmp_path.glob("out*"))
    assert main([*run, "--device", "cpu"]) == 0


@pytest.mark.parametrize("word", ["unlearn", "fit"])
def test_a_run_on_a_full_disk(base, tmp_path, capsys, word):
    data = ["--retain", str(tmp_path / "rows"), "--sequence-length", "8", "--device", "cpu"]
    data += ["--forget", str(tmp_path / "rows"), "--alpha", "0.1"] if word == "unlearn" else []
    run = [word, str(base), *data, "--out", str(tmp_path / "out")]
    with short_files():
        assert main(run) == 2
    assert "cannot be written (File too large)" in one_line(capsys)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("*.writing"))
    assert main([*run, "--resume"]) == 0


def test_a_log_on_a_full_disk_goes_on_where_it_was(tmp_path):
    header, path = {"benchmark": "kl"}, tmp_path / "items.jsonl"

    def measured():
        with ItemLog(path, header) as log:
            for item in range(100):
                log.add(str(item), text="x" * 100)

    with short_files(), pytest.raises(kfade.InputError, match=r"items\.jsonl: cannot be written"):
        measured()
    assert len(read_log(path, partial=True).items) == LIMIT // 130
    with ItemLog(path, header) as log:
        log.add("last", text="y")
        log.finish({"n": 1})
    assert read_log(path).items["last"] == {"text": "y"}


def test_settings_and_manifests_on_a_full_disk(tmp_path, monkeypatch):
    with RunDir(tmp_path / "out", {}) as folder:
        monkeypatch.setattr(Path, "write_text", no_space)
        with pytest.raises(kfade.InputError, match=r"manifest\.json: cannot .*No space left"):
            folder.finish({}, {}, "a: 1\n")
    assert not list(tmp_path.iterdir())


def test_a_piece_that_does_not_fit_is_not_in_the_state(tmp_path):
    with RunDir(tmp_path / "out", {}) as folder:
        for put in (folder.keep, folder.put):
            with short_files(), pytest.raises(kfade.InputError, match="too large"):
                put("piece", lambda path: path.write_text("x" * 2 * LIMIT))
        assert not list(folder.part.rglob("*piece*"))
    assert not folder.part.exists()


def test_a_full_disk_that_nobody_foresaw(monkeypatch, capsys, tmp_path):
    def printed(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("kfade.cli.app", SimpleNamespace(parse_args=printed))
    assert main(["plan"]) == 2
    assert "the output: cannot be written (No space left on device)" in one_line(capsys)


# --- where results go ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("out", "said"),
    [
        (".", "the folder that you are in"),
        ("./", "the folder that you are in"),
        ("..", "already exists and is not empty"),
        ("../..", "already exists and is not empty"),
        ("/", "already exists and is not empty"),
        ("~", "a ~ that the shell did not replace; write /home/me"),
        ("~/run/", "a ~ that the shell did not replace; write /home/me/run"),
        ("/dev/null", "is not a folder"),
        ("/dev/null/run", "cannot be written (Not a directory"),
        ("full/", "already exists and is not empty"),
        ("x" * 300, "cannot be written (File name too long"),
    ],
)
@pytest.mark.parametrize("word", ["apply", "merge"])
def test_places_that_results_cannot_go_to(tmp_path, monkeypatch, capsys, base, word, out, said):
    an_update().save(tmp_path / "u.safetensors")
    (tmp_path / "in" / "full").mkdir(parents=True)
    (tmp_path / "in" / "full" / "x").write_text("mine")
    (tmp_path / "in" / "here").mkdir()
    monkeypatch.chdir(tmp_path / "in" / "here")
    out = "../full/" if out == "full/" else out
    monkeypatch.setenv("HOME", "/home/me")
    update = str(tmp_path / "u.safetensors")
    inputs = [str(base), update] if word == "apply" else [update, update]
    assert main([word, *inputs, "--out", out]) == 2
    assert said in one_line(capsys)
    assert (tmp_path / "in" / "full" / "x").read_text() == "mine"
    assert sorted(p.name for p in (tmp_path / "in").iterdir()) == ["full", "here"]
    assert not list((tmp_path / "in" / "here").iterdir())


def test_a_trailing_slash_and_dots_within_are_a_place_like_any(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~nobody-of-this-name").mkdir()
    for out in ("run/", "a/../other", "./third", "~nobody-of-this-name"):
        with RunDir(Path(out), {}) as folder:
            folder.finish({}, {})
        assert (tmp_path / out / "manifest.json").is_file()
    check_free(tmp_path / "a")


def test_a_folder_that_is_closed(tmp_path, monkeypatch):
    def closed(*args, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", closed)
    with pytest.raises(kfade.InputError, match=r"out: cannot be written \(Permission denied\); ch"):
        RunDir(tmp_path / "out", {})


def test_a_file_that_is_closed_stays(tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    path.write_text("mine")
    monkeypatch.setattr(os, "access", lambda *asked: False)  # root may write anything

    def closed(aside):
        assert aside == path
        raise PermissionError(errno.EACCES, "Permission denied")

    with pytest.raises(kfade.InputError, match="Permission denied"):
        write_file(path, closed)
    assert path.read_text() == "mine"
