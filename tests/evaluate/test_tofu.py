"""TOFU measured on tiny models: prompts, losses against a plain loop, resuming, the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import zoo
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

pytest.importorskip("rouge_score", reason="the extra tofu is not installed")

from kfade.cli import main
from kfade.errors import InputError
from kfade.evaluate import tofu
from kfade.evaluate.generation import Decoding
from kfade.evaluate.item_log import ItemLog
from kfade.evaluate.log import digest, read_log
from kfade.evaluate.rouge import RougeLRecall
from kfade.evaluate.tofu import (
    TofuQuestion,
    evaluate_tofu,
    read_tofu,
    template_for,
)
from kfade.evaluate.tofu_logs import SETS, aggregate
from kfade.evaluate.tofu_read import log_of, read_tofu_log
from kfade.method.update import Update

EOS = 2


def rows(name: str, count: int = 3) -> list[dict]:
    made = []
    for i in range(count):
        word = "abcdefgh"[i]
        row = {
            "question": f"{word} k l {name[0]}",
            "answer": f"m n {word}",
            "perturbed_answer": [f"o p {word}", f"q {word} r s", "t"],
        }
        if name in ("forget", "retain"):
            row["paraphrased_answer"] = f"{word} m"
        made.append(row)
    return made


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "data"
    path.mkdir()
    for name in SETS:
        file = path / f"{'forget01' if name == 'forget' else name}_perturbed.json"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows(name)), encoding="utf-8")
    return path


def characters() -> PreTrainedTokenizerFast:
    """One token a character, BOS in front: shows where a prompt ends and an answer begins."""
    alphabet = ["<unk>", "<s>", "</s>", *map(chr, range(32, 127)), "\n"]
    made = Tokenizer(WordLevel({c: i for i, c in enumerate(alphabet)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def scored_text(tokenizer, sequence) -> tuple[str, str]:
    """(prompt, scored) of a sequence in words."""
    pairs = list(zip(sequence.tokens, sequence.scored, strict=True))
    parts = [[t for t, s in pairs if s is wanted] for wanted in (False, True)]
    prompt, scored = ("".join(tokenizer.convert_ids_to_tokens(part)) for part in parts)
    return prompt, scored


QUESTION = TofuQuestion("forget", 0, "Who?", "Ann Bo.", "Bo, Ann.", ("Cy.", "Di Ed."))


@pytest.mark.parametrize(
    ("template", "legacy", "prompt", "scored"),
    [
        ("llama2", False, "[INST] Who? [/INST]", "Ann Bo.</s>"),
        ("phi", False, "Question: Who?\nAnswer:", " Ann Bo.</s>"),
        ("phi", True, "Question: Who?\n", "Answer: Ann Bo.</s>"),
        ("plain", False, "Question: Who?\nAnswer:", " Ann Bo.</s>"),
    ],
)
def test_prompts_and_what_of_them_is_scored(template, legacy, prompt, scored):
    tokenizer = characters()
    [encoded] = tofu._encode([QUESTION], tokenizer, template, legacy=legacy)
    assert scored_text(tokenizer, encoded.answers[0]) == (prompt, scored)
    assert "".join(tokenizer.convert_ids_to_tokens(encoded.prompt)) == prompt
    ends = [scored_text(tokenizer, sequence)[1][-9:] for sequence in encoded.answers]
    assert ends == ["n Bo.</s>", " Ann.</s>", ends[2], "i Ed.</s>"]
    assert ends[2].endswith("Cy.</s>")


def test_a_chat_template_is_used_without_a_system_prompt():
    tokenizer = zoo.tokenizer(chat=True)
    question = TofuQuestion("forget", 0, "a b", "c d", "d c", ("e",))
    [encoded] = tofu._encode([question], tokenizer, "chat", legacy=False)
    assert scored_text(tokenizer, encoded.answers[0]) == ("<s><user>ab<assistant>", "cd</s>")
    assert tokenizer.convert_ids_to_tokens(encoded.prompt) == ["<s>", "<user>", "a", "b",
                                                              "<assistant>"]  # fmt: skip


def test_an_eos_of_the_tokenizers_own_is_not_doubled():
    tokenizer = zoo.tokenizer()
    [plain] = tofu._encode([QUESTION], tokenizer, "plain", legacy=False)

    class WithEos:
        eos_token_id = tokenizer.eos_token_id

        def __call__(self, text, add_special_tokens=True):
            made = tokenizer(text)
            made.input_ids = [*made.input_ids, *([EOS] if add_special_tokens else [])]
            return made

    assert tofu._encode([QUESTION], WithEos(), "plain", legacy=False) == [plain]
    assert plain.answers[0].tokens.count(EOS) == 1


def test_the_template_is_found_by_the_model():
    llama, phi, words = zoo.tiny("llama"), zoo.tiny("phi"), zoo.tokenizer()
    assert template_for("auto", phi, words) == "phi"
    assert template_for("auto", llama, words) == "plain"
    assert template_for("auto", llama, zoo.tokenizer(chat=True)) == "chat"
    words.chat_template = "{{ '[INST] <<SYS>>' }}"
    assert template_for("auto", llama, words) == "llama2"
    assert template_for("plain", phi, words) == "plain"
    with pytest.raises(InputError, match="--template alpaca: give one of auto, chat, llama2"):
        template_for("alpaca", llama, words)


def slow_loss(model, tokenizer, prompt: str, answer: str) -> float:
    """Mean −log p of the answer's tokens and EOS, in one plain forward pass."""
    start = tokenizer(prompt).input_ids
    tokens = [*start, *tokenizer(answer).input_ids, EOS]
    with torch.no_grad():
        log_p = model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
    losses = [-log_p[t - 1, tokens[t]].item() for t in range(len(start), len(tokens))]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("batch_tokens", [1, 50, 4096])
def test_values_are_those_of_a_plain_loop(folder, tmp_path, batch_tokens):
    model, tokenizer = zoo.tiny("llama"), zoo.tokenizer()
    questions = read_tofu("forget01", folder=folder)
    with zoo.Double(), ItemLog(tmp_path / "items.jsonl", {"benchmark": "tofu"}) as log:
        evaluate_tofu(model, tokenizer, questions, log, Decoding(6, batch_tokens))
        assert list(log.items) == [q.id for q in questions]
        for question in questions:
            values = log.items[question.id]
            prompt = f"Question: {question.question}\nAnswer:"

            def loss(answer, prompt=prompt):
                return pytest.approx(slow_loss(model, tokenizer, prompt, answer), rel=1e-6)

            assert values["answer_loss"] == loss(question.answer)
            assert values["base_loss"] == loss(question.base)
            assert values["false_losses"] == [loss(text) for text in question.false]
            assert values["answer_loss"] != values["base_loss"] or question.base == question.answer
            said = values["generated"]
            assert values["rouge_l"] == RougeLRecall()(question.answer, said)
    assert {q.base == q.answer for q in questions if q.set == "world_facts"} == {True}
    assert {q.base == q.answer for q in questions if q.set == "forget"} == {False}


def test_rouge_is_recall_of_stemmed_words_in_order():
    recall = RougeLRecall()
    # cat, sat, on, mat of the, cat, sat, on, mat
    assert recall("the cats sat on mats", "a cat sat on a mat") == pytest.approx(4 / 5)
    assert recall("one two", "two one and much more") == pytest.approx(1 / 2)
    assert recall("one two", "") == 0.0


def test_an_interrupted_evaluation_goes_on(folder, tmp_path, monkeypatch):
    model, tokenizer = zoo.tiny("llama"), zoo.tokenizer()
    questions = read_tofu("forget01", folder=folder)
    monkeypatch.setattr(tofu, "BLOCK", 5)
    whole = ItemLog(tmp_path / "whole.jsonl", {})
    with whole:
        evaluate_tofu(model, tokenizer, questions, whole, Decoding(4))
    generate, calls = tofu.generate_texts, []

    def trip(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(*args, **options)

    monkeypatch.setattr(tofu, "generate_texts", trip)
    with pytest.raises(KeyboardInterrupt), ItemLog(tmp_path / "cut.jsonl", {}) as log:
        evaluate_tofu(model, tokenizer, questions, log, Decoding(4))
    with ItemLog(tmp_path / "cut.jsonl", {}) as log:
        assert len(log.items) == 5
        evaluate_tofu(model, tokenizer, questions, log, Decoding(4))
        assert log.items.keys() == whole.items.keys()
        for key, values in log.items.items():
            assert values["generated"] == whole.items[key]["generated"]
            assert values["answer_loss"] == pytest.approx(whole.items[key]["answer_loss"])
    assert len(calls) == 4  # one before, the one that tripped, two blocks of what was left


def test_data_are_read_as_lines_and_as_a_list(folder):
    lines = read_tofu("forget01", folder=folder)
    assert [q.id for q in lines[:4]] == ["retain/0", "retain/1", "retain/2", "real_authors/0"]
    file = folder / "forget01_perturbed.json"
    file.write_text(json.dumps(rows("forget")))
    assert read_tofu("forget01", folder=folder) == lines
    assert len(read_tofu("forget01", folder=folder, limit=2)) == 8
    changed = [replace(lines[0], answer="x"), *lines[1:]]
    assert digest(changed) != digest(lines)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "forget01_perturbed: the set is empty"),
        ('{"question": "a", "answer": "b"}', "line 1: not a row of TOFU"),
        ('{"question": "a", "answer": "b", "perturbed_answer": []}', "not a row of TOFU"),
        ('{"question": "a", "answer": "b", "perturbed_answer": [1]}', "not a row of TOFU"),
        # Without the paraphrase there is no truth ratio: the answer itself would not do.
        ('{"question": "a", "answer": "b", "perturbed_answer": ["c"]}', "not a row of TOFU"),
        ('{"question": ', "line 1: not valid JSON"),
        ('[{"question": ', "not valid JSON"),
    ],
)
def test_malformed_data_are_named(folder, content, said):
    (folder / "forget01_perturbed.json").write_text(content)
    with pytest.raises(InputError, match=said):
        read_tofu("forget01", folder=folder)


def test_real_authors_are_compared_with_the_answer_itself(folder):
    file = folder / "real_authors_perturbed.json"
    file.write_text(json.dumps([{**rows("x")[0], "paraphrased_answer": "not this"}]))
    (question,) = [q for q in read_tofu("forget01", folder=folder) if q.set == "real_authors"]
    assert question.base == question.answer == "m n a"
    kept = next(q for q in read_tofu("forget01", folder=folder) if q.set == "retain")
    assert (kept.base, kept.answer) == ("a m", "m n a")


def test_missing_data_are_named(folder):
    with pytest.raises(InputError, match=r"has no forget05_perturbed\.json"):
        read_tofu("forget05", folder=folder)
    with pytest.raises(InputError, match="--split forget20: give one of forget01"):
        read_tofu("forget20", folder=folder)


def test_a_window_that_is_too_short_is_told_before_any_work(tmp_path):
    long = TofuQuestion("forget", 0, " ".join("a" * 40), "b", "b", ("c",))
    log = ItemLog(tmp_path / "items.jsonl", {})
    with log, pytest.raises(InputError, match="forget/0: 44 tokens with its answer"):
        evaluate_tofu(zoo.tiny("llama"), zoo.tokenizer(), [long], log)
    assert not log.items


def evaluate(model_dir: Path, folder: Path, out: Path, *more: str) -> int:
    return main(
        [
            *("eval", "tofu", str(model_dir), "--data", str(folder), "--split", "forget01"),
            *("--max-new-tokens", "4", "--out", str(out), *more),
        ]
    )


def test_the_command_measures_and_its_log_says_the_same(model_dir, folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert evaluate(model_dir, folder, out, "--retain-model", str(model_dir), "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    # The model is its own retain model here.
    assert printed["forget_quality"] == pytest.approx(1.0)
    assert printed["model_utility"] == printed["retain_model"]["model_utility"]
    assert printed["items"] == dict.fromkeys(SETS, 3)
    assert set(printed["parts"]) == {
        f"{name}_{metric}"
        for name in ("retain", "real_authors", "world_facts")
        for metric in ("rouge_l", "probability", "truth_ratio")
    }
    names = {path.name for path in out.iterdir()}
    assert names == {"items.jsonl", "retain.jsonl", "metrics.json", "manifest.json"}
    log = read_log(out / "items.jsonl")
    assert log.header["prompt_format"] == "plain"
    assert aggregate(log_of(log.items, "")) == aggregate(read_tofu_log(out / "retain.jsonl"))
    again = ["eval", "tofu", "--from-log", str(out), "--retain-log", str(out / "retain.jsonl")]
    assert main([*again, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["parts"] == printed["parts"]
    assert figures["forget_quality"] == printed["forget_quality"]


def test_a_retain_log_of_other_prompts_is_told(model_dir, folder, tmp_path, capsys):
    file = tmp_path / "dated.jinja"
    file.write_text("{{ strftime_now('%Y') }} {{ word }} " + zoo.CHAT_TEMPLATE)
    chat = ["--template", "chat", "--template-file", str(file), "--template-date"]
    for name, how in (
        ("plain", ["--template", "plain"]),
        ("old", [*chat, "2024-01-01", "--template-arg", "word=a"]),
        ("new", [*chat, "2025-01-01", "--template-arg", "word=a"]),
    ):
        assert evaluate(model_dir, folder, tmp_path / name, *how) == 0
    capsys.readouterr()

    def notes(log, retain):
        arguments = ["--from-log", f"{tmp_path}/{log}", "--retain-log", f"{tmp_path}/{retain}"]
        assert main(["eval", "tofu", *arguments, "--json"]) == 0
        return [note.partition(" in ")[0] for note in json.loads(capsys.readouterr().out)["notes"]]

    assert notes("old", "old") == notes("plain", "plain") == []
    assert notes("old", "new") == ["other date"]
    others = ["other prompts: chat", "other template file: ", "other template arguments: word=a"]
    found = notes("old", "plain")
    assert [note.startswith(own) for note, own in zip(found, others, strict=False)] == [True] * 3
    assert len(found) == 4
    # of the retain model itself, measured beside
    both = ["--retain-model", str(model_dir), *chat, "2024-01-01"]
    assert evaluate(model_dir, folder, tmp_path / "both", *both, "--json") == 0
    assert json.loads(capsys.readouterr().out)["notes"] == []
    theirs = read_log(tmp_path / "both" / "retain.jsonl").header
    ours = read_log(tmp_path / "both" / "items.jsonl").header
    for key in ("prompt_format", "template_sha256", "template_args", "prompt_date", "data_sha256"):
        assert theirs[key] == ours[key]


@pytest.mark.parametrize("what", ["model", "log", "half a log", "log of something else"])
def test_a_missing_retain_model_is_told_before_any_work(
    model_dir, folder, tmp_path, monkeypatch, capsys, what
):
    monkeypatch.setattr("kfade.runs.eval_tofu.measure_tofu", None)  # calling it would fail
    path = tmp_path / "retain"
    if what == "half a log":
        values = {"answer_loss": 1, "base_loss": 1, "false_losses": [1], "rouge_l": 0}
        path.mkdir()
        with ItemLog(path / "items.jsonl", {"benchmark": "tofu"}) as log:
            log.add("retain/0", **values)
            log.finish({})
    if what == "log of something else":
        path.mkdir()
        (path / "items.jsonl").write_text('{"epoch": 1, "loss": 2.5}\n')
    option = "--retain-model" if what == "model" else "--retain-log"
    assert evaluate(model_dir, folder, tmp_path / "out", option, str(path)) == 2
    said = {
        "model": "no such folder",
        "log": "no such TOFU log",
        "half a log": "holds no items of the set forget",
        "log of something else": "not an evaluation log of this version",
    }
    err = capsys.readouterr().err.strip()
    assert said[what] in err
    assert str(path) in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out.part").exists()


def test_an_update_is_judged_in_memory(model_dir, folder, tmp_path, capsys):
    model = zoo.tiny("llama", dtype=torch.float32)
    name = "model.layers.0.mlp.down_proj.weight"
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(model.get_parameter(name).shape, generator=generator)
    (tmp_path / "update").mkdir()
    Update({name: delta}, {}).save(tmp_path / "update" / "update.safetensors")
    assert evaluate(model_dir, folder, tmp_path / "base", "--json") == 0
    base = json.loads(capsys.readouterr().out)
    arguments = ["--update", str(tmp_path / "update"), "--retain-log", str(tmp_path / "base")]
    assert evaluate(model_dir, folder, tmp_path / "edited", "--json", *arguments) == 0
    edited = json.loads(capsys.readouterr().out)
    assert edited["parts"] != base["parts"]
    assert edited["retain_model"]["parts"] == base["parts"]
    assert edited["forget"] != base["forget"]
    Update({name: delta}, {}).apply(model)
    values = read_log(tmp_path / "edited" / "items.jsonl").items["forget/0"]
    row = rows("forget")[0]
    prompt = f"Question: {row['question']}\nAnswer:"
    loss = slow_loss(model, zoo.tokenizer(), prompt, row["answer"])
    assert values["answer_loss"] == pytest.approx(loss, rel=1e-4)


def test_the_command_resumes(model_dir, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tofu, "BLOCK", 5)
    generate, calls = tofu.generate_texts, []

    def trip(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(*args, **options)

    monkeypatch.setattr(tofu, "generate_texts", trip)
    out = tmp_path / "out"
    assert evaluate(model_dir, folder, out) == 130
    assert evaluate(model_dir, folder, out) == 2
    assert "--resume" in capsys.readouterr().err
    assert evaluate(model_dir, folder, out, "--resume", "--limit", "2") == 2
    assert "asked for --limit None (here 2);" in capsys.readouterr().err
    assert evaluate(model_dir, folder, out, "--resume", "--json") == 0
    assert json.loads(capsys.readouterr().out)["items"] == dict.fromkeys(SETS, 3)
    assert len(calls) == 4


def test_legacy_takes_the_first_items(model_dir, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("kfade.runs.eval_tofu.LEGACY_ITEMS", 2)
    assert evaluate(model_dir, folder, tmp_path / "out", "--tofu-legacy", "--json") == 0
    assert json.loads(capsys.readouterr().out)["items"] == dict.fromkeys(SETS, 2)
