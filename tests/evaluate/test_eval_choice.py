"""Multiple choice: prompts to the character, scores against logits, the command, lm-eval."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
import zoo
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from kfade.cli import main
from kfade.data.sequences import continuation
from kfade.errors import InputError
from kfade.evaluate.choice import (
    SCORINGS,
    ChoiceResult,
    answer_by_likelihood,
    answer_questions,
    summarise_choice,
    verdict,
)
from kfade.evaluate.lm_eval import run_tasks
from kfade.evaluate.log import read_log
from kfade.evaluate.questions import (
    Question,
    letter_prompt,
    read_questions,
    read_sets,
    text_prompt,
)
from kfade.evaluate.tokens import log_likelihoods
from kfade.models.head import hidden_states

QUESTIONS = [
    Question("a b c", ("d", "e f", "g", "h i j"), 1, "some subject"),
    Question("k l ", ("m n", "o", "p", "q"), 0),
    Question("r s t u", ("v", "w"), 1, "some subject"),
    Question("x", ("y", "z", "a b c"), 2, "another"),
]


def letters() -> PreTrainedTokenizerFast:
    """One token a word; the letters of choices and the marks of the prompts are words too."""
    words = ["<unk>", "<s>", "</s>", "Answer:", "Question:", "A.", "B.", "C.", "D."]
    words += [*"ABCD", *"abcdefghijklmnopqrstuvwx"]
    tokens = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    assert len(words) == zoo.VOCABULARY
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def characters() -> PreTrainedTokenizerFast:
    """One token a character, so that a letter after its space is two."""
    kept = [" ", "\n", ".", ":", *"ABCDQanswerbcdfghij"]
    tokens = Tokenizer(
        WordLevel({w: i for i, w in enumerate(["<unk>", *dict.fromkeys(kept)])}, unk_token="<unk>")
    )
    tokens.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="<unk>")


def log_p(model, tokenizer, start: str, end: str) -> float:
    """log p(end | start) from the model's logits, one token at a time."""
    before, tokens = tokenizer(start).input_ids, tokenizer(start + end).input_ids
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    return sum(logits[t - 1, tokens[t]].item() for t in range(len(before), len(tokens)))


def test_the_letter_prompt_is_lm_evals_to_the_character():
    question = Question(" Find the degree of x. ", ("0", "4", "2", "6"), 1, "abstract algebra")
    assert letter_prompt(question) == (
        "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
        "Find the degree of x.\nA. 0\nB. 4\nC. 2\nD. 6\nAnswer:"
    )
    plain = Question("Which?", ("this", "that"), 0)
    assert letter_prompt(plain) == (
        "The following are multiple choice questions (with answers).\n\n"
        "Which?\nA. this\nB. that\nAnswer:"
    )
    assert text_prompt(question) == "Question: Find the degree of x.\nAnswer:"


@pytest.mark.parametrize("make", [letters, characters])
def test_scores_against_logits(make):
    model, tokenizer = zoo.tiny("gpt_neox", dtype=torch.float64), make()
    model.config.max_position_embeddings = 512
    questions = [q for q in QUESTIONS if make is letters or q.question != "k l "]
    if make is characters:
        model = long_model()
    found = dict(answer_questions(model, tokenizer, questions, batch_tokens=100))
    assert set(found) == set(range(len(questions)))
    for index, question in enumerate(questions):
        prompt = letter_prompt(question)
        by_letter = [
            log_p(model, tokenizer, prompt, f" {'ABCD'[i]}") for i in range(len(question.choices))
        ]
        by_text = [
            log_p(model, tokenizer, text_prompt(question), f" {c}") for c in question.choices
        ]
        assert found[index]["letters"] == pytest.approx(by_letter, rel=1e-5)
        assert found[index]["text"] == pytest.approx(by_text, rel=1e-5)
        assert found[index]["text_per_character"] == pytest.approx(
            [s / len(c) for s, c in zip(by_text, question.choices, strict=True)], rel=1e-5
        )
        if make is letters:
            assert found[index]["text_per_token"] == pytest.approx(
                [s / len(c.split()) for s, c in zip(by_text, question.choices, strict=True)],
                rel=1e-5,
            )


def long_model() -> torch.nn.Module:
    """A tiny model with room for prompts of a few hundred characters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(**{**zoo.GROUPED, "max_position_embeddings": 512})
        return LlamaForCausalLM(config).double().eval()


def test_choices_are_read_from_as_few_passes_as_their_tokens_allow(monkeypatch):
    """``c`` and ``d`` from that of ``d e``, ``e f`` and ``e g`` from that of ``e f g``."""
    model, tokenizer = zoo.tiny("llama", dtype=torch.float64), letters()
    question = "a b"
    choices = {"c": 2, "d": 2, "d e": 3, "e f": 3, "e g": 3, "e f g": 4}  # and their inputs
    texts = [continuation(tokenizer, question, f" {choice}") for choice in choices]
    assert [text.live for text in texts] == [*choices.values()]
    computed: list[tuple[int, ...]] = []

    def counted(model, input_BT):
        computed.append(tuple(input_BT.shape))
        return hidden_states(model, input_BT)

    monkeypatch.setattr("kfade.evaluate.tokens.hidden_states", counted)
    alone, together = (log_likelihoods(model, texts, share=share) for share in (False, True))
    assert computed == [(6, 4), (2, 4)]
    assert together == pytest.approx(alone, rel=1e-12)
    assert len(set(together)) == len(texts)
    computed.clear()
    answer_by_likelihood(model, tokenizer, [Question(question, tuple(choices), 0)])
    assert computed == [(2, 4)]


def test_cloze_questions_stand_as_they_are():
    model, tokenizer = zoo.tiny("llama", dtype=torch.float32), letters()
    question = QUESTIONS[0]
    found = dict(answer_questions(model, tokenizer, [question], cloze=True))
    plain = [log_p(model, tokenizer, question.question, f" {c}") for c in question.choices]
    assert found[0]["text"] == pytest.approx(plain, rel=1e-5)
    results = answer_by_likelihood(model, tokenizer, [question])
    assert results["total"].correct == (plain.index(max(plain)) == 1,)


def test_a_prompt_over_the_window_keeps_its_end():
    model, tokenizer = zoo.tiny("llama", dtype=torch.float32), letters()
    long = Question("a b c d e " * 8, ("f", "g"), 0)
    found = dict(answer_questions(model, tokenizer, [long], window=12))
    tokens = tokenizer(letter_prompt(long)).input_ids[-12:]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokens])).logits[0, -1].double().log_softmax(-1)
    expected = logits[tokenizer.convert_tokens_to_ids(["A", "B"])].tolist()
    assert found[0]["letters"] == pytest.approx(expected, rel=1e-4)


def test_a_tokenizer_that_ends_texts_itself_changes_no_score():
    """An EOS at the end of all that it reads stands for no choice, and after no prompt."""
    model, words = zoo.tiny("llama", dtype=torch.float32), letters()

    class Ending:
        eos_token_id = words.eos_token_id

        def __call__(self, text, add_special_tokens=True):
            made = words(text)
            if add_special_tokens:
                made.input_ids = [*made.input_ids, words.eos_token_id]
            return made

    plain = dict(answer_questions(model, words, QUESTIONS))
    ended = dict(answer_questions(model, Ending(), QUESTIONS))
    assert ended == plain
    assert len(set(plain[0]["letters"])) == 4  # with the EOS scored in their place all are alike


def test_a_space_at_the_end_of_a_cloze_question_is_not_doubled():
    model, tokenizer = long_model(), characters()
    questions = [Question(f"a b{end}", ("c", "d"), 0) for end in ("", " ")]
    found = dict(answer_questions(model, tokenizer, questions, cloze=True))
    assert found[1]["text"] == pytest.approx(found[0]["text"])
    other = log_p(model, tokenizer, "a b ", " c")  # what two spaces would give
    assert abs(found[0]["text"][0] - other) > 0.01


def test_verdict_and_summary_by_hand():
    scores = {
        "letters": [0.0, -1.0], "text": [-2.0, -1.0],
        "text_per_token": [-1.0, -1.0], "text_per_character": [-3.0, -1.0],
    }  # fmt: skip
    said = verdict(scores, 1)
    assert said == {
        "letters": False, "text": True, "text_per_token": False, "text_per_character": True,
    }  # fmt: skip
    right = dict.fromkeys(SCORINGS, True)
    items = [
        {"correct": said, "subject": "x", "choices": 2},
        {"correct": right, "subject": "x", "choices": 2},
        {"correct": right, "subject": "y", "choices": 4},
    ]
    result = summarise_choice(items)
    assert result["chance"] == pytest.approx((0.5 + 0.5 + 0.25) / 3)
    assert result["accuracy"]["letters"] == {
        "value": pytest.approx(2 / 3),
        "standard_error": pytest.approx(math.sqrt(2 / 9 / 3)),
    }
    assert result["accuracy"]["text"]["value"] == 1.0
    assert result["subjects"]["x"]["letters"]["value"] == 0.5
    assert result["subjects"]["y"]["questions"] == 1
    assert "subjects" not in summarise_choice(items[:2])
    assert ChoiceResult((True, False)).standard_error == pytest.approx(math.sqrt(1 / 8))


def test_csv_and_folders(tmp_path):
    test = tmp_path / "test"
    test.mkdir()
    (test / "world_facts_test.csv").write_text(
        '"One, ""two""?\nthree",a,b,"c, d",e,C\nq,1,2,3,4,A\n'
    )
    (test / "other_test.csv").write_text("r,5,6,7,8,D\n\n")
    questions = read_questions(test)
    assert questions == read_questions(tmp_path)
    assert questions[0] == Question("r", ("5", "6", "7", "8"), 3, "other")
    assert questions[1] == Question('One, "two"?\nthree', ("a", "b", "c, d", "e"), 2, "world facts")
    assert len(questions) == 3
    assert read_questions(tmp_path, 1) == questions[:2]  # the first of each file
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no csv files"):
        read_questions(tmp_path / "empty")


def test_forms_as_they_are_handed_out(tmp_path):
    """Keys of ARC's and of the textbooks' files beside ours; three to five choices."""
    rows = [
        {"id": "M1", "question": "q", "choices": ["a", "b", "c"], "answer": 2},
        {"id": "M2", "question": "q", "choices": [*"abcde"], "answer": 4, "meta_option": False},
        {"module": "m8", "chapter": "On x", "question": "q", "choices": ["a", "b"], "answer": 0},
    ]
    path = tmp_path / "arc_easy_test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [(len(q.choices), q.answer) for q in read_questions(path)] == [(3, 2), (5, 4), (2, 0)]
    assert letter_prompt(read_questions(path)[1]).endswith("\nE. e\nAnswer:")


def test_sets_are_called_by_their_files(tmp_path):
    line = json.dumps({"question": "q", "choices": ["a", "b"], "answer": 0}) + "\n"
    for name in (
        "one/review_mcq.jsonl",
        "two/review_mcq.jsonl",
        "arc_easy.jsonl",
        "mmlu/test/x.csv",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(line * 3 if "jsonl" in name else "q,a,b,A\n")
    paths = [tmp_path / name for name in ("one/review_mcq.jsonl", "two/review_mcq.jsonl")]
    paths += [tmp_path / "arc_easy.jsonl", tmp_path / "mmlu/test"]
    sets = read_sets(paths, 2)
    assert {name: len(own) for name, own in sets.items()} == {
        "one review mcq": 2, "two review mcq": 2, "arc easy": 2, "mmlu": 1,
    }  # fmt: skip
    assert list(read_sets(paths[:1])) == ["review mcq"]
    with pytest.raises(InputError, match="one review mcq is given twice"):
        read_sets([paths[0], paths[0]])


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("q.csv", "q,1,2,3,4,AB\n", "q.csv, line 1: write a question"),
        ("q.csv", "q,1,2,3,4,\n", "q.csv, line 1: write a question"),
        ("q.csv", "q" * 200_000, "q.csv, line 1: not csv"),
        ("q.csv", "question,A,B,C,D,answer\n", "q.csv, line 1: write a question"),
        ("q.csv", "q,1,2,3,4,A\nq,1,2,3,4,E\n", "line 2"),
        ("q.csv", "q,A\n", "line 1"),
        ("q.jsonl", '{"question": "q", "choices": ["a", "b"], "answer": 2}\n', "line 1: write"),
        ("q.jsonl", '{"question": "q", "choices": ["a", "b"], "answer": -1}\n', "line 1: write"),
        ("q.jsonl", '{"question": "q", "choices": ["a"], "answer": 0}\n', "line 1: write"),
        ("q.jsonl", "\n[]\n", "holds no questions"),
        ("q.jsonl", "", "holds no questions"),
    ],
)
def test_malformed_questions(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=said):
        read_questions(tmp_path / name)


# ---- the command


@pytest.fixture
def desk(tmp_path, monkeypatch) -> Path:
    model = long_model().float()
    model.save_pretrained(tmp_path / "model")
    letters().save_pretrained(tmp_path / "model")
    rows = [
        {"question": q.question, "choices": q.choices, "answer": q.answer, "subject": q.subject}
        for q in QUESTIONS
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "q.jsonl").write_text(lines)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def choice(*more: str, out: str = "out") -> int:
    return main(["eval", "choice", "model", "--out", out, *more])


def test_command(desk, capsys):
    assert choice("--questions", "q.jsonl", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    log = read_log(desk / "out/items.jsonl")
    right = [item["correct"]["letters"] for item in log.items.values()]
    assert printed["accuracy"]["letters"]["value"] == sum(right) / 4
    assert set(printed["subjects"]) == {"", "another", "some subject"}
    assert log.items["2"]["scores"]["letters"][1] < 0
    assert len(log.items["2"]["scores"]["letters"]) == 2
    assert choice("--questions", "q.jsonl", "--quantise", "int4", out="two") == 0
    other = read_log(desk / "two/items.jsonl")
    assert other.items["0"]["scores"] != log.items["0"]["scores"]
    assert other.header["weights_sha256"] != log.header["weights_sha256"]


def test_several_files_are_told_one_by_one(desk, capsys):
    lines = (desk / "q.jsonl").read_text().splitlines(keepends=True)
    (desk / "few.jsonl").write_text("".join(lines[1:3]))
    assert choice("--questions", "q.jsonl", "--json", out="alone") == 0
    alone = json.loads(capsys.readouterr().out)
    files = ("--questions", "q.jsonl", "--questions", "few.jsonl")
    assert choice(*files, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["questions"] == 6
    assert list(printed["sets"]) == ["q", "few"]
    for figure in ("questions", "chance", "accuracy", "subjects"):
        assert printed["sets"]["q"][figure] == alone[figure]
    items = read_log(desk / "out/items.jsonl").items
    assert list(items) == ["q/0", "q/1", "q/2", "q/3", "few/0", "few/1"]
    assert items["few/1"]["scores"]["text"] == pytest.approx(items["q/2"]["scores"]["text"])
    assert choice(*files, "--limit", "1", out="one") == 0
    rows = [line for line in capsys.readouterr().err.splitlines() if "±" in line]
    assert [row.split()[:2] for row in rows] == [["q", "1"], ["few", "1"]]
    assert all(len(row) <= 80 for row in rows)


def test_command_resumes(desk, monkeypatch):
    assert choice("--questions", "q.jsonl", out="whole") == 0
    calls = []

    def stop(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return verdict(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("kfade.runs.eval_choice.verdict", stop)
        assert choice("--questions", "q.jsonl", out="cut") == 130
    (desk / "q.jsonl").write_text((desk / "q.jsonl").read_text().replace("r s t u", "r s t v"))
    assert choice("--questions", "q.jsonl", "--resume", out="cut") == 2
    (desk / "q.jsonl").write_text((desk / "q.jsonl").read_text().replace("r s t v", "r s t u"))
    assert choice("--questions", "q.jsonl", "--resume", out="cut") == 0
    whole, cut = (read_log(desk / name / "items.jsonl") for name in ("whole", "cut"))
    assert cut.aggregate == whole.aggregate


def test_command_refuses(desk, capsys):
    for more, said in (
        ((), "give either --questions or --tasks"),
        (("--questions", "q.jsonl", "--tasks", "mmlu"), "give either --questions or --tasks"),
        (("--questions", "none"), "no such file of questions"),
        (("--questions", "q.jsonl", "--limit", "0"), "--limit."),
        (("--questions", "q.jsonl", "--batch-tokens", "0"), "--batch-tokens."),
    ):
        assert choice(*more) == 2
        assert said in " ".join(capsys.readouterr().err.split())
        assert not (desk / "out.part").exists()


def test_tasks_need_the_package(desk, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *a: None if name == "lm_eval" else find(name, *a)
    )
    assert choice("--tasks", "mmlu") == 2
    assert "pip install 'kfade[lm-eval]'" in capsys.readouterr().err


TASK = """
task: local_letters
dataset_path: json
dataset_kwargs:
  data_files: {file}
test_split: train
output_type: multiple_choice
num_fewshot: 0
description: "The following are multiple choice questions (with answers).\\n\\n"
doc_to_text: "{{{{question.strip()}}}}\\nA. {{{{choices[0]}}}}\\nB. {{{{choices[1]}}}}\\nAnswer:"
doc_to_choice: ["A", "B"]
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs the package lm-eval")
@pytest.mark.filterwarnings("ignore")
def test_lm_eval_agrees_with_our_letters(desk, capsys):
    rows = [
        {"question": f"{a} {b} ", "choices": [f"{c} x", f"{d}"], "answer": (i + j) % 2}
        for i, (a, b) in enumerate(("ab", "cd", "ef"))
        for j, (c, d) in enumerate(("gh", "ij", "kl", "mn"))
    ]
    (desk / "local.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (desk / "tasks").mkdir()
    (desk / "tasks/local.yaml").write_text(TASK.format(file=desk / "local.jsonl"))
    more = ("--tasks", "local_letters", "--task-folder", "tasks", "--json")
    assert choice(*more) == 0
    theirs = json.loads(capsys.readouterr().out)["tasks"]["local_letters"]["acc"]
    assert choice("--questions", "local.jsonl", "--json", out="ours") == 0
    ours = json.loads(capsys.readouterr().out)["accuracy"]["letters"]
    assert ours["value"] == theirs["value"]
    assert 0 < theirs["value"] < 1
    ratio = math.sqrt(len(rows) / (len(rows) - 1))  # theirs divides by n − 1
    assert theirs["standard_error"] == pytest.approx(ours["standard_error"] * ratio)
    per_item = read_log(desk / "out/items.jsonl").items
    right = read_log(desk / "ours/items.jsonl").items
    for i in range(len(rows)):
        assert bool(per_item[f"local_letters {i}"]["acc"]) == right[str(i)]["correct"]["letters"]
    with pytest.raises(InputError, match="could not be loaded"):
        run_tasks(None, None, ["no_such_task"])


def test_a_subject_that_is_null_is_none_and_one_that_is_no_text_is_refused(tmp_path):
    file = tmp_path / "q.jsonl"
    row = {"question": "a", "choices": ["b", "c"], "answer": 0}
    file.write_text(json.dumps({**row, "subject": None}) + "\n")
    assert read_questions(file) == [Question("a", ("b", "c"), 0)]
    file.write_text(json.dumps({**row, "subject": 3}) + "\n")
    with pytest.raises(InputError, match="line 1: write"):
        read_questions(file)
