"""Progress where there is no terminal: lines, with a clock that the test sets."""

from __future__ import annotations

import io

import zoo
from rich.console import Console
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM

import kfade
from kfade.cli import bars, session
from kfade.cli.bars import Bars, Lines
from kfade.runtime import progress


class Watched(Lines):
    """Lines that are kept, at a time that the test sets."""

    def __init__(self):
        self.now, self.said = 0.0, []
        super().__init__(self.said.append, lambda: self.now)

    def after(self, seconds):
        """What is said within the next seconds."""
        before = len(self.said)
        for _ in range(int(seconds)):
            self.now += 1
            self.tick()
        return self.said[before:]


def test_a_long_task_is_told_of_and_a_short_one_is_not():
    lines = Watched()
    task = lines.start("covariances", 10)
    assert lines.after(9) == []
    lines.advance(task, 1)
    assert lines.after(1) == ["covariances: 10 % after 10 s, about 1 min 30 s left"]
    assert lines.after(29) == []
    lines.advance(task, 4)
    assert lines.after(1) == ["covariances: 50 % after 40 s, about 40 s left"]
    lines.now += 3600
    lines.advance(task, 5)
    lines.stop(task)
    assert lines.said[-1] == "covariances: done in 1 h 0 min"
    quick = lines.start("gradient", 1)
    assert lines.after(9) == []
    lines.stop(quick)
    assert len(lines.said) == 3


def test_a_task_of_one_long_item_is_told_of():
    lines = Watched()
    lines.start("answers", 2)
    assert lines.after(41) == ["answers: 0 % after 10 s", "answers: 0 % after 40 s"]


def test_a_task_cut_short_is_not_called_done():
    lines = Watched()
    task = lines.start("training", 8)
    lines.advance(task, 2)
    lines.now += 70
    lines.stop(task)
    assert lines.said == ["training: ended at 25 % after 1 min 10 s"]


def test_rounded_shares_add_up_to_a_whole():
    lines = Watched()
    task = lines.start("TOFU", 1.0)
    for _ in range(10):
        lines.advance(task, 0.1)  # their sum is below 1
    lines.now += 12
    lines.stop(task)
    assert lines.said == ["TOFU: done in 12 s"]


def test_tasks_within_a_task_say_nothing():
    lines = Watched()
    outer = lines.start("questions", 4)
    inner = lines.start("letters", 1)
    assert lines.after(20) == ["questions: 0 % after 10 s"]
    lines.stop(inner)
    assert len(lines.said) == 1
    lines.advance(outer, 4)
    lines.stop(outer)
    assert lines.said[1:] == ["questions: done in 20 s"]


def test_tasks_of_known_work_speak_within_one_of_unknown_work():
    lines = Watched()
    outer = lines.start("trials", None)
    said = []
    for _ in range(6):  # short ones, of which nothing is told
        inner = lines.start("held-out KL", 1)
        said += lines.after(8)
        lines.stop(inner)
    assert said == ["trials: 10 s", "trials: 40 s"]
    inner = lines.start("held-out KL", 2)
    lines.advance(inner, 1)
    assert lines.after(22) == ["held-out KL: 50 % after 22 s, about 22 s left"]
    lines.stop(inner)
    lines.stop(outer)
    assert lines.said[-2:] == [
        "held-out KL: ended at 50 % after 22 s",
        "trials: ended after 1 min 10 s",
    ]


def test_many_tasks_in_a_row_do_not_flood():
    lines = Watched()
    for _ in range(10):
        task = lines.start("held-out KL", 1)
        lines.after(12)
        lines.advance(task, 1)
        lines.stop(task)
    assert sum("after" in line for line in lines.said) <= 5


def test_what_nobody_knows_the_length_of_is_told_in_seconds_and_bytes():
    lines = Watched()
    task = lines.start("loading tiny", None)
    assert lines.after(10) == ["loading tiny: 10 s"]
    lines.received(task, 300_000_000, 2_700_000_000)
    assert lines.after(30) == ["loading tiny: 300.0 MB of 2.7 GB downloaded after 40 s"]
    lines.received(task, 2_000, 0)
    assert lines.after(30) == ["loading tiny: 2.0 kB downloaded after 1 min 10 s"]
    lines.stop(task)
    assert lines.said[-1] == "loading tiny: ended after 1 min 10 s"


def test_bytes_stand_behind_a_bar():
    screen = io.StringIO()
    shown = Bars(Console(file=screen, force_terminal=True, width=200))
    with shown:
        task = shown.start("loading tiny", None)
        shown.received(task, 300_000_000, 2_700_000_000)
    assert "300.0 MB of 2.7 GB downloaded" in screen.getvalue()


def test_a_load_tells_of_what_the_hub_sends(tmp_path, monkeypatch):
    """The bars are made as the hub makes them: of one file, of several, of what is no byte."""
    zoo.save(tmp_path)
    lines, seen = Watched(), []
    read = AutoModelForCausalLM.from_pretrained

    def slow(*arguments, tqdm_class, **more):
        with tqdm_class(unit="B", total=100, initial=20, desc="model.safetensors") as bar:
            bar.update(30)
            seen.extend(lines.after(10))
            bar.total += 400  # one more file
            bar.update(10)
            seen.extend(lines.after(30))
        files = tqdm_class(desc="Fetching 3 files", total=3)
        files.update(3)
        network = tqdm_class(unit="B", total=9, bar_format="{desc}: {bar}| {n_fmt}B")
        network.update(9)
        seen.extend(lines.after(30))
        return read(*arguments, tqdm_class=tqdm_class, **more)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", slow)
    with progress.reporting(lines):
        kfade.load_model(str(tmp_path), device="cpu")
    assert seen == [
        f"loading {tmp_path}: 50 bytes of 100 bytes downloaded after 10 s",
        f"loading {tmp_path}: 60 bytes of 500 bytes downloaded after 40 s",
        f"loading {tmp_path}: 60 bytes of 500 bytes downloaded after 1 min 10 s",
    ]
    assert lines.said[len(seen) :] == [f"loading {tmp_path}: ended after 1 min 10 s"]
    lines.said.clear()
    kfade.load_model(str(tmp_path), device="cpu")  # in a notebook
    assert lines.said == []


def test_bars_of_libraries_are_hidden_for_a_while():
    class Theirs(tqdm):
        def __init__(self, *arguments, **more):
            super().__init__(*arguments, **{**more, "disable": False})

    for kind in (tqdm, Theirs):
        screen = io.StringIO()
        with progress.no_bars():
            assert list(kind(range(3), file=screen)) == [0, 1, 2]
            assert screen.getvalue() == ""
        assert list(kind(range(3), file=screen)) == [0, 1, 2]
        assert "3/3" in screen.getvalue()


def test_lines_without_a_terminal_and_bars_on_one(monkeypatch):
    screen = io.StringIO()
    for terminal, kind in ((False, bars.Lines), (True, bars.Bars)):
        console = Console(file=screen, force_terminal=terminal)
        monkeypatch.setattr(session, "console", console)
        with session.session():
            assert isinstance(session.progress._reporter.get(), kind)
    assert "left" not in screen.getvalue()
