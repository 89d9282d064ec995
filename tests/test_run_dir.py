"""Output folders with several processes: the first one writes, the others keep away."""

from pathlib import Path

import pytest

from kfade.runtime import distributed
from kfade.runtime.run_dir import RunDir


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
