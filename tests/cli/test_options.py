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
EXPERTS = {"--experts", "--expert-rows", "--expert-inputs"}
ADDED = {
    # One class of settings is read by several commands.
    "check": {"--recompute", "--no-recompute", "--shard", *EXPERTS},
    # Fine-tuning of models that are larger than a device; later methods.
    "baseline": {
        *("--shard", "--beta1", "--beta2", "--sam-radius"),
        *("--components", "--adapter-lr"),
    },
    "attack": {"--shard"},
    # Vectors of the size of the targeted weights need not be on the device.
    "plan": {"--offload", *EXPERTS, "--steps", "--noise", "--correct", "--correct-sequences"},
    "sweep": {"--offload", "--memory"},
    "unlearn": {
        *("--offload", *EXPERTS),
        *("--correct", "--correct-damping", "--correct-sequences", "--quality"),
        *("--bands", "--bound", "--noise", "--weigh-texts", "--no-weigh-texts"),
        *("--at-prompts", "--no-at-prompts", "--first-share"),
    },
    # Experts of a mixture are targets.
    "fit": EXPERTS,
    # Evaluations run in several processes.
    **{f"eval {n}": {"--shard"} for n in ("choice", "kl", "memorisation", "mt-bench", "tofu")},
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


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("unlearn m", "--out is missing: folder to write"),
        ("unlearn m --kl 1", "--out is missing: folder to write"),
        ("unlearn m --out", "--out needs a value: folder to write"),
        ("unlearn m --out --json", "--out needs a value: folder to write"),
        ("unlearn m --ou o", "unknown option: --ou. Did you mean --out?"),
        ("unlearn m --ou=o", "unknown option: --ou. Did you mean --out?"),
        ("fit m --out o --layers", "--layers needs a value: transformer blocks to change, counted"),
        ("fit m n --out o", "too many arguments: n"),
        ("apply m", "UPDATE is missing: folder of a kfade run, or an update file"),
        ("merge", "UPDATES is missing: two or more folders of kfade runs, or update files"),
        ("sweep m --out o", "--curvature is missing: folder of a kfade fit, with the curvature"),
        ("eval kl m", "--prompts is missing: benign instructions: JSONL of"),
        ("export-lora u", "--rank is missing: rank of the adapter of each weight"),
    ],
)
def test_what_is_missing_is_named_with_its_purpose(capsys, line, said):
    assert main(line.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"kfade: {said}")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("unlearn m --out o --kl 0.01 --kl 0.02", "--kl is given more than once: give it once"),
        ("unlearn m --out o --kl=0.01 --kl=0.01", "--kl is given more than once: give it once"),
        ("unlearn m --out o --json --json", "--json is given more than once: give it once"),
        ("unlearn m --out o --out p", "--out is given more than once: give it once"),
        ("fit m --out o --config a --config b", "--config is given more than once: give it once"),
        (
            "fit m --out o --pack --no-pack",
            "--pack and --no-pack are given: give one of them",
        ),
        ("sweep m --out o --curvature c --kl 1 --kl 2", "--kl is given more than once"),
        ("attack m --out o --data d --at 1 --at 2", "--at is given more than once"),
    ],
)
def test_an_option_given_twice_is_refused(capsys, line, said):
    assert main(line.split()) == 2
    assert capsys.readouterr().err.startswith(f"kfade: {said}")


def test_a_list_is_given_by_one_option_for_each_element():
    line = "unlearn m --out o --template-arg a=1 --template-arg b=2"
    _, given, _ = app.parse_args(line.split())
    assert given.arguments["run"].data.template_args == ["a=1", "b=2"]
