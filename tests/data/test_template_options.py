"""Chat templates: arguments that they do not read, and what an evaluation takes from a run."""

from __future__ import annotations

import inspect
import json
import shutil

import pytest
import zoo
from transformers import PreTrainedTokenizerBase

from kfade.cli import main
from kfade.data.chat import OWN_ARGUMENTS, ChatTemplate
from kfade.data.examples import parse_example
from kfade.data.sequences import encode
from kfade.errors import InputError

WORD = zoo.CHAT_TEMPLATE.replace("<assistant>", "{{ word }}")
ROWS = [
    {"messages": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": c}]}
    for c in "cdefg"
]


def test_names_of_the_machinery_are_no_arguments():
    parameters = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    assert set(parameters) <= OWN_ARGUMENTS
    for name in ("messages", "tools", "return_nothing", "strftime_now"):
        with pytest.raises(InputError, match=f"--template-arg {name}: this is set by what renders"):
            ChatTemplate(arguments={name: 1})


def test_arguments_that_a_template_does_not_read_are_told_once(caplog):
    default = "{% set brief = brief if brief is defined else true %}"
    template = ChatTemplate(
        default + zoo.CHAT_TEMPLATE + "{# told once #}", {"brief": False, "thinking": 1, "eos": 2}
    )
    examples = [parse_example(row, "line 1") for row in ROWS]
    for _ in range(2):
        encode(examples, zoo.tokenizer(chat=True), template=template)
    assert caplog.messages == ["--template-arg: the chat template does not read thinking, eos"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a model, data, a template, and a run that used it."""
    folder = tmp_path_factory.mktemp("run")
    zoo.save(folder / "model", chat=True)
    for name in ("forget", "retain"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "own.jinja").write_text(WORD)
    sources = ["--forget", f"{folder}/forget.jsonl", "--retain", f"{folder}/retain.jsonl"]
    how = ["--template-file", f"{folder}/own.jinja", "--template-arg", "word=z"]
    arguments = [str(folder / "model"), *sources, *how, "--kl", "0.01", "--sequence-length", "16"]
    assert main(["unlearn", *arguments, "--out", f"{folder}/run"]) == 0
    return folder


@pytest.fixture
def judge(run, tmp_path):
    """Evaluate with the update of the run; returns (exit code, settings)."""

    def judged(*more: str):
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        command = ["eval", "memorisation", str(run / "model"), "--update", str(run / "run")]
        command += ["--members", str(run / "forget.jsonl"), "--out", str(out), *more]
        code = main(command)
        manifest = out / "manifest.json"
        return code, json.loads(manifest.read_text())["config"] if manifest.is_file() else {}

    return judged


def test_an_evaluation_takes_template_and_arguments_of_the_run(run, judge, tmp_path, caplog):
    data = json.loads((run / "run" / "manifest.json").read_text())["config"]["data"]
    assert len(data["template_sha256"]) == 64
    code, settings = judge()
    assert code == 0
    told = f"note: as in the run that made --update: --template-file {run}/own.jinja, "
    assert caplog.messages == [told + "--template-arg word=z"]
    keys = ("template_file", "template_args", "template_sha256", "template_date")
    assert [settings[key] for key in keys] == [data[key] for key in keys]
    # what is given goes first
    (tmp_path / "other.jinja").write_text(zoo.CHAT_TEMPLATE)
    own = ["--template-file", f"{tmp_path}/other.jinja", "--template-arg", "word=y"]
    code, settings = judge(*own)
    assert (settings["template_file"], settings["template_args"]) == (own[1], ["word=y"])
    code, settings = judge("--template", "plain")
    assert (code, settings["template_file"], settings["template_args"]) == (0, None, None)
    assert [each for each in caplog.messages if each.startswith("note: ")] == [caplog.messages[0]]


def test_an_attack_takes_them_too(run, tmp_path):
    sources = ["--forget", f"{run}/forget.jsonl", "--data", f"{run}/retain.jsonl"]
    more = ["--steps", "1", "--at", "1", "--out", f"{tmp_path}/attack"]
    assert main(["attack", f"{run}/model", "--update", f"{run}/run", *sources, *more]) == 0
    data = json.loads((tmp_path / "attack" / "manifest.json").read_text())["config"]["run"]["data"]
    assert (data["template_file"], data["template_args"]) == (f"{run}/own.jinja", ["word=z"])


@pytest.mark.parametrize(("text", "what"), [(None, "is gone"), (WORD + " ", "has changed since")])
def test_a_template_file_that_is_not_what_it_was_is_told(run, judge, capsys, text, what):
    source = run / "own.jinja"
    try:
        source.unlink()
        if text is not None:
            source.write_text(text)
        code, _ = judge()
        assert code == 2
        told = " ".join(capsys.readouterr().err.split())
        assert f"the run that made --update used this template, and it {what}; restore" in told
        if text is not None:  # meant so
            assert judge("--template-file", str(source))[0] == 0
    finally:
        source.write_text(WORD)
