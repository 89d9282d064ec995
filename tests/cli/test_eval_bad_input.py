"""Bad input to any evaluation: one line on stderr that names it, exit 2, nothing left behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kfade.cli import main
from kfade.evaluate.item_log import ItemLog


@pytest.fixture
def desk(tmp_path, monkeypatch) -> Path:
    """Files of each kind, good and bad; as working folder."""
    files = {
        "texts.jsonl": [{"text": "a b c d e f"}, {"text": "g h i j k l"}],
        "prompts.jsonl": [{"instruction": "a b"}, {"instruction": "c"}],
        "questions.jsonl": [{"question": "a", "choices": ["b", "c"], "answer": 0}],
        "bench.jsonl": [{"question_id": 1, "category": "math", "turns": ["a"]}],
        "other.jsonl": [{"epoch": 1, "loss": 2.5}],
        "empty.jsonl": [],
    }
    for name, rows in files.items():
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "binary.jsonl").write_bytes(b"\x89PNG\r\n\xff\xfe\n")
    (tmp_path / "tofu").mkdir()
    for name in ("forget01", "retain", "real_authors", "world_facts"):
        (tmp_path / "tofu" / f"{name}_perturbed.json").write_text("")
    with ItemLog(tmp_path / "kl.jsonl", {"benchmark": "kl"}) as log:
        log.finish({})
    with ItemLog(tmp_path / "cut.jsonl", {"benchmark": "memorisation"}) as log:
        log.add("member 0", tokens=1)
    monkeypatch.chdir(tmp_path)
    return tmp_path


KL = ("kl", "--quantise", "int8", "--max-new-tokens", "4", "--prompts")
MEMBERS = ("memorisation", "--members")
JUDGED = ("mt-bench", "--judge-url", "http://127.0.0.1:9", "--judge-model", "j", "--questions")
CHOICE = ("choice", "--questions")
TOFU = ("tofu", "--split", "forget01")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        # An empty set.
        ((*KL, "empty.jsonl"), "empty.jsonl holds no prompts"),
        ((*MEMBERS, "empty.jsonl"), "empty.jsonl holds no examples"),
        (
            (*MEMBERS, "texts.jsonl", "--non-members", "empty.jsonl"),
            "empty.jsonl holds no examples",
        ),
        ((*JUDGED, "empty.jsonl"), "empty.jsonl holds no questions"),
        ((*CHOICE, "empty.jsonl"), "empty.jsonl holds no questions"),
        (
            (*CHOICE, "questions.jsonl", *CHOICE[1:], "empty.jsonl"),
            "empty.jsonl holds no questions",
        ),
        ((*TOFU, "--data", "tofu"), "the set is empty"),
        # Data of another form, or none at all.
        ((*KL, "texts.jsonl"), "texts.jsonl, line 1: has text; write one of"),
        ((*MEMBERS, "other.jsonl"), "other.jsonl, line 1"),
        ((*JUDGED, "questions.jsonl"), "questions.jsonl, line 1: write"),
        ((*CHOICE, "bench.jsonl"), "bench.jsonl, line 1: write"),
        ((*TOFU, "--data", "nowhere"), "nowhere: has no retain_perturbed.json"),
        *(((*command, "binary.jsonl"), "not UTF-8") for command in (KL, MEMBERS, JUDGED, CHOICE)),
        *(((*command, "none.jsonl"), "none.jsonl") for command in (KL, MEMBERS, JUDGED, CHOICE)),
        # A log of another format, of another evaluation, or of an interrupted one.
        ((*MEMBERS, "texts.jsonl", "--retain-log", "other.jsonl"), "not an evaluation log"),
        ((*MEMBERS, "texts.jsonl", "--retain-log", "binary.jsonl"), "not UTF-8"),
        ((*MEMBERS, "texts.jsonl", "--retain-log", "kl.jsonl"), "not a log of kfade eval memor"),
        ((*MEMBERS, "texts.jsonl", "--retain-log", "cut.jsonl"), "was interrupted"),
        ((*TOFU, "--retain-log", "other.jsonl"), "not an evaluation log"),
        ((*TOFU, "--retain-log", "binary.jsonl"), "not UTF-8"),
        ((*TOFU, "--retain-log", "kl.jsonl"), "a log of another evaluation than TOFU"),
        # A missing retain model.
        ((*MEMBERS, "texts.jsonl", "--retain-log", "none"), "no such evaluation log"),
        ((*TOFU, "--retain-log", "none"), "no such TOFU log"),
    ],
)
def test_it_is_named_before_the_model_is_read(desk, arguments, said, capsys):
    command, *options = arguments
    assert main(["eval", command, "no/such/model", *options, "--out", "out"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("kfade: ")
    assert said in line
    assert not list(desk.glob("out*"))


@pytest.mark.parametrize(
    "arguments",
    [
        (*KL, "prompts.jsonl"),
        (*MEMBERS, "texts.jsonl"),
        (*JUDGED, "bench.jsonl"),
        (*CHOICE, "questions.jsonl"),
    ],
)
def test_a_missing_model_is_named(desk, arguments, capsys):
    """The negative control of the test above: with good data it is the model that is missed."""
    command, *options = arguments
    (desk / "folder").mkdir()
    assert main(["eval", command, "folder", *options, "--out", "out"]) == 2
    assert "folder: not a model folder" in capsys.readouterr().err
    assert not list(desk.glob("out*"))


def test_completions_of_another_format_are_not_overwritten(desk, model_dir, capsys):
    for content in ("binary.jsonl", "other.jsonl", "kl.jsonl"):
        folder = desk / f"kept-{content}"
        folder.mkdir()
        kept = (desk / content).read_bytes()
        (folder / "completions.jsonl").write_bytes(kept)
        command, *options = (*KL, "prompts.jsonl", "--completions", str(folder), "--out", "out")
        assert main(["eval", command, str(model_dir), *options]) == 2
        assert "completions.jsonl" in capsys.readouterr().err
        assert (folder / "completions.jsonl").read_bytes() == kept
        assert not list(desk.glob("out*"))
