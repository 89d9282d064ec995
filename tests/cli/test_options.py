"""The options of every command: none is lost, none comes unnoticed, each says what it does.

``options.txt`` lists them as they were when each was written by hand; scripts rely on them.
"""

from __future__ import annotations

import re
from functools import reduce
from pathlib import Path

import pytest
from cyclopts import App

from kfade.cli import app, main

LISTED = Path(__file__).with_name("options.txt")
ADDED = {
    # One class of settings is read by several commands.
    "check": {"--recompute", "--no-recompute"},
    # Vectors of the size of the targeted weights need not be on the device.
    "plan": {"--offload"},
    "sweep": {"--offload", "--memory"},
    "unlearn": {"--offload"},
}
IN_BOTH_FORMS = {"--model", "--method", "--update"}  # a positional argument has a name as well


def arguments(command: str):
    """What a command takes, without the frames of its settings."""
    collection = reduce(App.__getitem__, command.split(), app).assemble_argument_collection()
    return [argument for argument in collection if argument.parse and argument.name != "*"]


def before() -> dict[str, set[str]]:
    """Options by command, as they were."""
    found: dict[str, set[str]] = {}
    for line in LISTED.read_text(encoding="utf-8").splitlines():
        if line.startswith("kfade "):
            words = line.split()[1:]
            command = " ".join(word for word in words if not word.isupper())
            found[command] = set()
        else:
            found[command] |= set(line.split())
    return found


@pytest.mark.parametrize("command", sorted(before()))
def test_options_are_as_they_were(command):
    now = {
        name for one in arguments(command) for name in (*one.names, *one.negatives) if "--" in name
    }
    then = before()[command]
    added = now - then - ADDED.get(command, set()) - IN_BOTH_FORMS
    assert (then - now, added) == (set(), set())


def test_every_option_says_what_it_does():
    listed = re.findall(r"^\* `([^`]*)`(.*)", app.generate_docs(), re.MULTILINE)
    silent = [names for names, text in listed if len(text.strip(": ")) < 5]
    assert len(listed) > 300
    assert silent == []


def test_no_command_is_missing():
    names = {name for name in app if not name.startswith("-")} - {"eval"}
    names |= {f"eval {name}" for name in app["eval"] if not name.startswith("-")}
    assert names == set(before())


@pytest.mark.parametrize("command", ["plan", "check"])
def test_a_missing_model_is_named(command, capsys):
    assert main([command]) == 2
    assert "MODEL is missing: give a hub id" in capsys.readouterr().err


def test_of_an_option_given_twice_the_last_one_counts(tmp_path):
    """Also for the files from which other options get their values."""
    for name, seed in (("first", 1), ("last", 2)):
        (tmp_path / f"{name}.yaml").write_text(f"seed: {seed}\n", encoding="utf-8")
    files = [word for n in ("first", "last") for word in ("--config", str(tmp_path / f"{n}.yaml"))]
    _, given, _ = app.parse_args(["unlearn", "MODEL", "--out", "out", *files])
    assert given.arguments["run"].seed == 2
