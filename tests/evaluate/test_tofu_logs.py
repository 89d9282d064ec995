"""TOFU's figures from per-item values: against paper, against scipy, from logs of both formats."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import hmean, ks_2samp

from kfade.cli import main
from kfade.errors import InputError
from kfade.evaluate.item_log import ItemLog
from kfade.evaluate.tofu_logs import (
    SETS,
    TofuItem,
    TofuLog,
    aggregate,
    choose_row,
    forget_parts,
    forget_quality,
    model_utility,
    notes_on,
    utility_parts,
)
from kfade.evaluate.tofu_read import REFERENCE_TASKS, read_tofu_log

LN2 = math.log(2)

# Two questions a set, losses in multiples of ln 2 so that every probability is a power of two.
# (answer, base, wrong answers, ROUGE-L recall)
BY_HAND = {
    "retain": [(1, 1, (2, 4), 0.5), (2, 3, (1, 2), 1.0)],
    "real_authors": [(1, 1, (2, 2), 1.0), (1, 1, (1, 1), 0.5)],
    "world_facts": [(0, 0, (1, 1), 0.25), (0, 0, (2, 4), 0.25)],
    "forget": [(3, 2, (3, 5), 0.0), (2, 4, (3, 3), 0.5)],
}


def item(answer: float, base: float, false: tuple[float, ...], rouge: float) -> TofuItem:
    return TofuItem(answer * LN2, base * LN2, tuple(loss * LN2 for loss in false), rouge)


def by_hand() -> TofuLog:
    return TofuLog(
        "hand", {name: dict(enumerate(item(*v) for v in rows)) for name, rows in BY_HAND.items()}
    )


def random_log(seed: int, count: int = 60, shift: float = 0.0) -> TofuLog:
    """A model of the losses 1 to 3; ``shift`` makes it know the forget set's paraphrases."""
    draw = random.Random(seed)
    sets = {}
    for name in SETS:
        down = shift if name == "forget" else 0.0
        sets[name] = {
            i: TofuItem(
                draw.uniform(1, 3),
                draw.uniform(1, 3) - down,
                tuple(draw.uniform(1, 3) for _ in range(5)),
                draw.uniform(0.2, 1),
                f"question {i} of {name}?",
            )
            for i in range(count)
        }
    return TofuLog(f"log {seed}", sets)


def reference(log: TofuLog) -> dict:
    """The log as the reference code writes it: columns by string keys, and more than is needed."""
    tasks = {}
    for name, task in REFERENCE_TASKS.items():
        items = log.sets[name]
        tasks[task] = {
            "avg_gt_loss": {str(i): v.answer_loss for i, v in items.items()},
            "gt_loss": {str(i): 7 * v.answer_loss for i, v in items.items()},
            "num_token_gt": {str(i): 7 for i in items},
            "generated_text": {
                str(i): [f"[INST] {v.question} ", "g", "t"] for i, v in items.items()
            },
            "rouge1_recall": {str(i): 1.0 for i in items},
            "rougeL_recall": {str(i): v.rouge_l for i, v in items.items()},
            "average_perturb_loss": {str(i): list(v.false_losses) for i, v in items.items()},
            "avg_paraphrased_loss": {str(i): v.base_loss for i, v in items.items()},
            "truth_ratio": dict.fromkeys(map(str, items), 0.5),  # 1/TR; never read
        }
    return tasks


def write(path: Path, content) -> Path:
    path.write_text(json.dumps(content, indent=4), encoding="utf-8")
    return path


def write_ours(path: Path, log: TofuLog) -> Path:
    with ItemLog(path, {"benchmark": "tofu", "model": log.where}) as file:
        for name, items in log.sets.items():
            for i, value in items.items():
                file.add(
                    f"{name}/{i}",
                    question=value.question,
                    answer_loss=value.answer_loss,
                    base_loss=value.base_loss,
                    false_losses=value.false_losses,
                    rouge_l=value.rouge_l,
                )
        file.finish({})
    return path


def test_the_nine_parts_are_those_worked_out_on_paper():
    parts = utility_parts(by_hand())
    expected = {
        "retain_rouge_l": 3 / 4,  # (1/2 + 1)/2
        "retain_probability": 3 / 8,  # (2^-1 + 2^-2)/2
        # mean wrong 3 against 1: TR = 4, 1 - 1/4; mean 1.5 against 3: TR < 1, so 0
        "retain_truth_ratio": 3 / 8,
        "real_authors_rouge_l": 3 / 4,
        # (1/2)/(1/2 + 1/4 + 1/4) = 1/2, and one of three alike = 1/3
        "real_authors_probability": 5 / 12,
        "real_authors_truth_ratio": 1 / 4,  # TR = 2: 1 - 1/2; TR = 1: 0
        "world_facts_rouge_l": 1 / 4,
        # 1/(1 + 1/2 + 1/2) = 1/2, and 1/(1 + 1/4 + 1/16) = 16/21
        "world_facts_probability": (1 / 2 + 16 / 21) / 2,
        "world_facts_truth_ratio": 11 / 16,  # TR = 2: 1/2; TR = 8: 7/8
    }
    assert parts == pytest.approx(expected, rel=1e-12)
    # 9 over the sum of 4/3, 8/3, 8/3, 4/3, 12/5, 4, 4, 84/53, 16/11
    utility = 9 / (4 / 3 + 8 / 3 + 8 / 3 + 4 / 3 + 12 / 5 + 4 + 4 + 84 / 53 + 16 / 11)
    assert model_utility(parts) == pytest.approx(utility, rel=1e-12)
    assert model_utility(parts) == pytest.approx(hmean(list(expected.values())), rel=1e-12)


def test_the_forget_set_has_its_own_truth_ratio():
    # TR = 2^(4-2) = 4 and 2^(3-4) = 1/2: min(TR, 1/TR) = 1/4 and 1/2
    assert forget_parts(by_hand()) == pytest.approx(
        {"rouge_l": 1 / 4, "probability": 3 / 16, "truth_ratio": 3 / 8}, rel=1e-12
    )


def test_utility_is_zero_where_a_part_is():
    parts = {**utility_parts(by_hand()), "world_facts_rouge_l": 0.0}
    assert model_utility(parts) == 0.0


def test_forget_quality_by_hand():
    # Two against two values wholly apart: D = 1, and 2 of the 6 ways to mix them are as far apart.
    low = [item(0, 1, (1,), 0), item(0, 1, (2,), 0)]
    high = [item(0, 1, (5,), 0), item(0, 1, (6,), 0)]
    assert forget_quality(low, high) == pytest.approx((1 / 3, 1.0))
    assert forget_quality(low, low) == pytest.approx((1.0, 0.0))


@pytest.mark.parametrize("shift", [0.0, 0.3, 1.0])
def test_forget_quality_is_scipys_on_truth_ratios(shift):
    ours, retain = random_log(0, 200, shift), random_log(1, 200)
    ratios = [[math.exp(i.log_truth_ratio) for i in log.items("forget")] for log in (ours, retain)]
    result = ks_2samp(*ratios)
    assert aggregate(ours, retain)["forget_quality"] == pytest.approx(result.pvalue, rel=1e-12)
    assert aggregate(ours, retain)["ks_statistic"] == pytest.approx(result.statistic)


def test_a_model_like_the_retain_model_passes_and_one_that_knows_does_not():
    retain = random_log(1, 200)
    assert aggregate(retain, retain)["forget_quality"] == pytest.approx(1.0)
    assert aggregate(random_log(2, 200), retain)["forget_quality"] > 0.05
    assert aggregate(random_log(2, 200, shift=1.0), retain)["forget_quality"] < 1e-10


def test_extreme_losses_overflow_nothing():
    far = TofuItem(900.0, 900.0, (1.0, 2.0), 0.5)
    known = TofuItem(0.0, 0.0, (2000.0, 3000.0), 0.5)
    lost = TofuItem(2000.0, 0.0, (2000.0, 2000.0), 0.5)
    log = TofuLog("x", {name: {0: far, 1: known, 2: lost} for name in SETS})
    parts = aggregate(log, log)["parts"]
    assert parts["world_facts_probability"] == pytest.approx((0 + 1 + 1 / 3) / 3)
    assert parts["retain_truth_ratio"] == pytest.approx((0 + 1 + 1) / 3)


def by_definition(log: TofuLog, retain: TofuLog) -> dict:
    """The benchmark's figures by numpy, from the paper's formulas on probabilities and ratios."""

    def columns(name: str, of: TofuLog = log) -> tuple:
        items = of.items(name)
        answer, base = (np.array([getattr(i, key) for i in items]) for key in KEYS)
        return answer, base, np.array([i.false_losses for i in items])

    parts = {}
    with np.errstate(over="ignore", divide="ignore"):
        for name in ("retain", "real_authors", "world_facts"):
            answer, base, false = columns(name)
            p, ratio = np.exp(-answer), np.exp(false.mean(axis=1) - base)
            if name != "retain":
                p = p / (p + np.exp(-false).sum(axis=1))
            parts[f"{name}_probability"] = p.mean()
            parts[f"{name}_truth_ratio"] = np.maximum(0, 1 - 1 / ratio).mean()
            parts[f"{name}_rouge_l"] = np.mean([i.rouge_l for i in log.items(name)])
        ratios = []
        for of in (log, retain):
            answer, base, false = columns("forget", of)
            ratios.append(np.exp(false.mean(axis=1) - base))
        even = np.minimum(ratios[0], 1 / ratios[0]).mean()
    return {
        "parts": parts,
        "model_utility": hmean(list(parts.values())),
        "forget_quality": ks_2samp(*ratios).pvalue,
        "forget_truth_ratio": even,
    }


KEYS = ("answer_loss", "base_loss")
INF = float("inf")
# What an unlearned model may do to single questions: (answer, base, wrong answers, ROUGE-L).
ODD = {
    "ordinary": [],
    "huge losses": [(130.0, 120.0, (150.0, 90.0), 0.0), (400.0, 420.0, (600.0, 500.0), 0.0)],
    "ratios that overflow": [(3.0, 1.0, (900.0, 2500.0), 0.2), (3.0, 2000.0, (1.0, 2.0), 0.2)],
    "probability zero": [(INF, 2.0, (3.0, 1.0), 0.0), (1.0, 2.0, (INF, 1.0), 1.0)],
    "a paraphrase of probability zero": [(2.0, INF, (3.0, 1.0), 0.0)],
    "one sure": [(0.0, 0.0, (0.0, 0.0), 1.0)],
}


@pytest.mark.parametrize("odd", ODD)
def test_the_figures_are_the_benchmarks_own_also_in_odd_cases(tmp_path, odd):
    def with_odd(items: list[TofuItem]) -> dict[int, TofuItem]:
        plain = [replace(item, false_losses=item.false_losses[:2]) for item in items]
        return dict(enumerate([*plain, *(TofuItem(*values) for values in ODD[odd])]))

    plain, retain = random_log(0, 30, shift=0.2), random_log(1, 40)
    log = TofuLog("odd", {name: with_odd(plain.items(name)) for name in SETS})
    read = read_tofu_log(write(tmp_path / "eval_log_aggregated.json", reference(log)))
    figures, expected = aggregate(read, retain), by_definition(log, retain)
    assert figures["parts"] == pytest.approx(expected["parts"], rel=1e-12)
    assert figures["model_utility"] == pytest.approx(expected["model_utility"], rel=1e-12)
    assert figures["forget_quality"] == pytest.approx(expected["forget_quality"], rel=1e-12)
    assert figures["forget"]["truth_ratio"] == pytest.approx(
        expected["forget_truth_ratio"], rel=1e-12
    )


def test_a_set_without_a_right_word_has_no_utility(tmp_path):
    silent = {i: replace(v, rouge_l=0.0) for i, v in enumerate(random_log(0).items("retain"))}
    log = TofuLog("silent", {**random_log(0).sets, "retain": silent})
    assert aggregate(log)["model_utility"] == by_definition(log, log)["model_utility"] == 0.0


def test_reference_logs_may_differ_in_size(tmp_path):
    """The reference code's logs have 300 of forget10's 400 questions."""
    few = write(tmp_path / "few.json", reference(random_log(0, 30)))
    many = write(tmp_path / "many.json", reference(random_log(1, 40)))
    logs = [read_tofu_log(few), read_tofu_log(many)]
    expected = by_definition(random_log(0, 30), random_log(1, 40))["forget_quality"]
    assert aggregate(*logs)["forget_quality"] == pytest.approx(expected, rel=1e-12)
    assert "30 forget questions" in notes_on(*logs)[0]


def test_logs_of_both_formats_give_the_same(tmp_path):
    log = random_log(0)
    theirs = read_tofu_log(write(tmp_path / "eval_log_aggregated.json", reference(log)))
    ours = read_tofu_log(write_ours(tmp_path / "items.jsonl", log))
    assert aggregate(theirs) == aggregate(ours) == aggregate(log)
    assert theirs.sets["forget"][3].question == "[INST] question 3 of forget? "


# (generated, truth, what a tokenizer of ASCII words gave, what is right)
TEXTS = [
    ("Он ходил по саду", "Он ходил по саду", 0.0, 1.0),
    ("Он спал", "Он ходил по саду", 0.0, 0.25),
    ("彼は庭を", "彼は庭を歩いた", 0.0, 4 / 7),
    ("🙂", "🙂🙂", 0.0, 0.5),
    ("No idea", "Он ходил", 0.0, 0.0),
    ("Roman, автор", "Roman, автор", 1.0, 1.0),
    ("She left", "She left early", 0.1, 0.1),  # the log's value of ASCII words stands
    ("Zoë left", "Zoë left early", 0.5, 0.5),  # also where an accent divides one
    ("", "   ", 0.0, 0.0),  # an empty truth has no recall to compute
]


@pytest.mark.parametrize("form", ["ours", "reference"])
def test_a_recall_that_did_not_count_the_letters_is_computed_anew(tmp_path, form, capsys):
    pytest.importorskip("rouge_score", reason="the extra tofu is not installed")
    log = random_log(0, len(TEXTS))
    if form == "ours":
        path = tmp_path / "items.jsonl"
        with ItemLog(path, {"benchmark": "tofu"}) as file:
            for name, items in log.sets.items():
                for i, value in items.items():
                    generated, truth, stored, _ = TEXTS[i]
                    values = {**vars(value), "rouge_l": stored}
                    file.add(f"{name}/{i}", **values, answer=truth, generated=generated)
            file.finish({})
    else:
        tasks = reference(log)
        for columns in tasks.values():
            columns["generated_text"] = {str(i): ["p", t[0], t[1]] for i, t in enumerate(TEXTS)}
            columns["rougeL_recall"] = {str(i): t[2] for i, t in enumerate(TEXTS)}
        path = write(tmp_path / "eval_log_aggregated.json", tasks)
    read = read_tofu_log(path)
    for name in SETS:
        assert [item.rouge_l for item in read.items(name)] == [t[3] for t in TEXTS]
    assert len(read.notes) == 1
    assert f"{path}: the ROUGE-L recall of 16 of 36 items was computed again" in read.notes[0]
    assert notes_on(random_log(0, len(TEXTS)), read)[0] == read.notes[0]
    assert main(["eval", "tofu", "--from-log", str(path), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["notes"] == list(read.notes)
    mean = sum(t[3] for t in TEXTS) / len(TEXTS)
    assert printed["forget"]["rouge_l"] == pytest.approx(mean)
    assert printed["parts"]["retain_rouge_l"] == pytest.approx(mean)


def test_early_logs_have_lists(tmp_path):
    tasks = reference(by_hand())
    lists = {t: {k: list(v.values()) for k, v in columns.items()} for t, columns in tasks.items()}
    path = write(tmp_path / "eval_log_aggregated.json", lists)
    assert aggregate(read_tofu_log(path))["parts"] == utility_parts(by_hand())


def test_columns_in_another_order_are_joined_by_number(tmp_path):
    tasks = reference(by_hand())
    column = tasks["eval_log.json"]["average_perturb_loss"]
    tasks["eval_log.json"]["average_perturb_loss"] = dict(reversed(column.items()))
    path = write(tmp_path / "eval_log_aggregated.json", tasks)
    assert utility_parts(read_tofu_log(path)) == utility_parts(by_hand())


def test_the_command_line_aggregates_saved_logs(tmp_path, capsys):
    ours = write(tmp_path / "a.json", reference(random_log(0, shift=0.5)))
    (tmp_path / "retain").mkdir()
    write_ours(tmp_path / "retain" / "items.jsonl", random_log(1))
    code = main(
        [
            "eval",
            "tofu",
            "--from-log",
            str(ours),
            "--retain-log",
            str(tmp_path / "retain"),
            "--json",
        ]
    )
    assert code == 0
    printed = json.loads(capsys.readouterr().out)
    expected = aggregate(random_log(0, shift=0.5), random_log(1))
    assert {k: v for k, v in printed.items() if k != "notes"} == expected
    assert len(printed["parts"]) == 9
    assert printed["model_utility"] == pytest.approx(hmean(list(printed["parts"].values())))
    assert printed["retain_model"]["model_utility"] == model_utility(utility_parts(random_log(1)))
    assert printed["notes"] == []


def test_without_a_retain_model_there_is_no_forget_quality(tmp_path, capsys):
    log = write(tmp_path / "a.json", reference(by_hand()))
    assert main(["eval", "tofu", "--from-log", str(log), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["forget_quality"] is None
    assert printed["retain_model"] is None
    assert main(["eval", "tofu", "--from-log", str(log)]) == 0
    assert "not measured" in capsys.readouterr().err


def test_a_retain_log_may_hold_the_forget_set_alone():
    retain = TofuLog("r", {"forget": random_log(1).sets["forget"]})
    beside = aggregate(random_log(0), retain)["retain_model"]
    assert beside["model_utility"] is None
    assert beside["items"] == {"forget": 60}


def test_other_questions_are_told():
    log = random_log(0)
    assert notes_on(log, random_log(1)) == []
    assert "60 forget questions in log 0, 40 in log 1" in notes_on(log, random_log(1, 40))[0]
    moved = {i: TofuItem(1, 1, (1,), 1, f"of another split: {i}") for i in range(60)}
    assert (
        "60 forget questions of the same number differ"
        in (notes_on(log, TofuLog("moved", {"forget": moved}))[0])
    )


def test_a_row_is_chosen_by_both_rules():
    retain = random_log(1, 100)
    # "lucky" fits the retain model on the even questions only, "good" nearly so on all.
    logs = {"bad": random_log(5, 100, 2.0), "good": random_log(3, 100, 0.15)}
    logs["lucky"] = TofuLog(
        "lucky",
        {
            **retain.sets,
            "forget": {
                i: retain.sets["forget"][i] if i % 2 == 0 else logs["bad"].sets["forget"][i]
                for i in range(100)
            },
        },
    )
    choice = choose_row(logs, retain)
    assert choice.best == "good"
    assert choice.best_forget_quality == aggregate(logs["good"], retain)["forget_quality"]
    assert choice.held_out == "lucky"
    assert choice.held_out_forget_quality < 1e-6  # what the choice on the even half did not see
    assert choice.held_out_utility == aggregate(logs["lucky"])["model_utility"]
    with pytest.raises(InputError, match="at least one log"):
        choose_row({}, retain)


def test_utility_counts_in_the_choice():
    retain = random_log(1)
    poor = {i: TofuItem(9, 9, (1,), 0.01) for i in range(60)}
    broken = TofuLog("broken", {**dict.fromkeys(SETS, poor), "forget": retain.sets["forget"]})
    choice = choose_row({"broken": broken, "whole": random_log(2)}, retain)
    assert choice.best == choice.held_out == "whole"  # the broken one's forget quality is 1


def broken_logs():
    whole = reference(by_hand())
    yield [], "not an aggregated TOFU log"
    yield {"accuracy": 1}, "not an aggregated TOFU log"
    without = {k: v for k, v in whole.items() if k != "eval_log.json"}
    yield without, "holds no items of the set retain"
    yield {**whole, "eval_log.json": {}}, r"eval_log\.json: has no avg_gt_loss"
    yield {**whole, "eval_log.json": 3}, r"eval_log\.json: has no avg_gt_loss"
    for column, value, said in [
        ("avg_gt_loss", {"0": 1.0}, "item 1 is not in both"),
        ("avg_gt_loss", {"0": "much", "1": 1.0}, "item 0: needs a loss"),
        ("avg_gt_loss", {"0": float("nan"), "1": 1.0}, "item 0: NaN, or infinite"),
        ("avg_gt_loss", {"0": 1.0, "1": -1.0}, "item 1: a negative loss"),
        ("average_perturb_loss", {"0": [], "1": [1.0]}, "no wrong answers"),
        ("average_perturb_loss", {"0": [1.0, None], "1": [1.0, 1.0]}, "item 0: needs a loss"),
        ("average_perturb_loss", {"0": 1.0, "1": 1.0}, "item 0: needs a loss"),
        ("rougeL_recall", {"0": 1.5, "1": 1.0}, "a recall that is not within 0 and 1"),
        ("rougeL_recall", {"a": 1.0, "b": 1.0}, "has no rougeL_recall by item number"),
    ]:
        yield {**whole, "eval_log.json": {**whole["eval_log.json"], column: value}}, said


@pytest.mark.parametrize(("content", "said"), list(broken_logs()))
def test_a_malformed_reference_log_is_named(tmp_path, content, said):
    path = write(tmp_path / "eval_log_aggregated.json", content)
    with pytest.raises(InputError, match=said):
        aggregate(read_tofu_log(tmp_path))
    with pytest.raises(InputError, match=path.name):
        aggregate(read_tofu_log(path))


def test_a_byte_order_mark_is_no_content(tmp_path):
    path = write(tmp_path / "eval_log_aggregated.json", reference(by_hand()))
    whole = read_tofu_log(path)
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert read_tofu_log(path) == whole


@pytest.mark.parametrize("value", [True, "1.5", None, 10**400])
@pytest.mark.parametrize("column", ["avg_gt_loss", "average_perturb_loss", "rougeL_recall"])
def test_what_is_no_number_is_no_loss(tmp_path, column, value):
    tasks = reference(by_hand())
    tasks["eval_log.json"][column]["1"] = [value] if column.endswith("perturb_loss") else value
    path = write(tmp_path / "eval_log_aggregated.json", tasks)
    with pytest.raises(InputError, match=r"eval_log\.json, item 1: needs a loss .*, all numbers"):
        read_tofu_log(path)


def test_prompts_that_were_made_otherwise_are_told():
    chat = {"prompt_format": "chat", "template_sha256": None, "template_args": ["a=1"],
            "prompt_date": "2024-01-01 00:00:00", "data_sha256": "x"}  # fmt: skip

    def notes(ours, theirs):
        logs = (replace(by_hand(), where=name, about=about)
                for name, about in (("A", ours), ("B", theirs)))  # fmt: skip
        return notes_on(*logs)

    assert notes(chat, chat) == notes(chat, {}) == notes({}, {}) == []
    tail = "; evaluate the retain model as the other"
    assert notes(chat, {"prompt_format": "plain", "data_sha256": "x"}) == [
        f"other prompts: chat in A, plain in B{tail}",
        f"other template arguments: a=1 in A, none in B{tail}",
        f"other date in the prompts: 2024-01-01 00:00:00 in A, none in B{tail}",
    ]
    [told] = notes(chat, {**chat, "template_sha256": "f" * 64})
    assert told == f"other template file: none in A, {'f' * 40} in B{tail}"
    [told] = notes(chat, {**chat, "data_sha256": "y"})
    assert "not all the same (data_sha256)" in told


def test_infinite_losses_on_both_sides_are_refused(tmp_path):
    tasks = reference(by_hand())
    tasks["eval_log.json"]["avg_paraphrased_loss"]["1"] = INF
    tasks["eval_log.json"]["average_perturb_loss"]["1"] = [INF, 1.0]
    with pytest.raises(InputError, match="item 1: NaN, or infinite losses that have no ratio"):
        read_tofu_log(write(tmp_path / "eval_log_aggregated.json", tasks))


@pytest.mark.parametrize("lacking", ["ours", "theirs"])
def test_a_log_without_the_forget_set_is_named(tmp_path, capsys, lacking):
    tasks = reference(by_hand())
    whole = write(tmp_path / "whole.json", tasks)
    del tasks["eval_log_forget.json"]
    half = write(tmp_path / "half.json", tasks)
    logs = (half, whole) if lacking == "ours" else (whole, half)
    command = ["eval", "tofu", "--from-log", str(logs[0]), "--retain-log", str(logs[1])]
    assert main(command) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "half.json: holds no items of the set forget" in line


def test_what_is_no_log_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such TOFU log"):
        read_tofu_log(tmp_path / "none.json")
    with pytest.raises(InputError, match="holds neither items"):
        read_tofu_log(tmp_path)
    (tmp_path / "a.json").write_text('{"eval_log.json": {')
    with pytest.raises(InputError, match=r"a\.json: not JSON"):
        read_tofu_log(tmp_path / "a.json")
    with ItemLog(tmp_path / "items.jsonl", {"benchmark": "kl"}) as log:
        log.finish({})
    with pytest.raises(InputError, match="a log of another evaluation than TOFU"):
        read_tofu_log(tmp_path / "items.jsonl")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--from-log", "a.json", "model"], "--from-log only reads saved logs"),
        (["--from-log", "a.json", "--out", "x"], "--from-log only reads saved logs"),
        (["model"], "give MODEL and --out"),
        (["--out", "x"], "give MODEL and --out"),
        (["m", "--retain-log", "a", "--retain-model", "b", "--out", "x"], "not both"),
        (["--from-log", "none.json"], "no such TOFU log"),
    ],
)
def test_options_that_do_not_go_together(arguments, said, capsys):
    assert main(["eval", "tofu", *arguments]) == 2
    assert said in capsys.readouterr().err
