"""Read TOFU's per-item values: kfade's own log, or the reference code's.

The reference code (locuslab/tofu, ``evaluate_util.py``) writes ``eval_log_aggregated.json``: for
each of four tasks, named as below, columns of values by item number.

The reference's ROUGE-L counts words of ASCII letters and digits only, as kfade once did. A text in
another script then has a recall of 0 with itself, as if it were forgotten. A log holds the texts,
so :func:`read_tofu_log` computes the recall of such items again. It does not for texts with a few
accents, so that published figures do not change.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from kfade.data.rows import read_utf8
from kfade.errors import InputError
from kfade.evaluate.log import read_log
from kfade.evaluate.rouge import RougeLRecall, reference_reads
from kfade.evaluate.tofu_logs import SETS, TofuItem, TofuLog

LOG_NAME, REFERENCE_NAME = "items.jsonl", "eval_log_aggregated.json"
REFERENCE_TASKS = {
    "retain": "eval_log.json",
    "real_authors": "eval_real_author_wo_options.json",
    "world_facts": "eval_real_world_wo_options.json",
    "forget": "eval_log_forget.json",
}
Key = tuple[str, int]
"""Set and number of an item."""
Values = Mapping[str, Any]
"""The values of an item, by kfade's names."""
# kfade's name of a value -> the reference's.
REFERENCE_VALUES = {
    "answer_loss": "avg_gt_loss",
    "base_loss": "avg_paraphrased_loss",
    "false_losses": "average_perturb_loss",
    "rouge_l": "rougeL_recall",
}


def read_tofu_log(path: Path) -> TofuLog:
    """Read ``items.jsonl`` or ``eval_log_aggregated.json``, or the folder that holds one.

    The ROUGE-L recall of true answers that are mostly not ASCII is computed again.

    Raises:
        InputError: no such log, an incomplete one, or one of another format; or rouge-score is not
            installed and a recall has to be computed.
    """
    if path.is_dir():
        found = [path / n for n in (LOG_NAME, REFERENCE_NAME) if (path / n).is_file()]
        if not found:
            raise InputError(f"{path}: holds neither {LOG_NAME} nor {REFERENCE_NAME}")
        path = found[0]
    if not path.is_file():
        raise InputError(
            f"{path}: no such TOFU log; give the folder of a kfade eval tofu or the reference "
            f"code's {REFERENCE_NAME}"
        )
    if path.suffix == ".jsonl":
        evaluation = read_log(path)
        if evaluation.header.get("benchmark") != "tofu":
            raise InputError(f"{path}: a log of another evaluation than TOFU")
        items = _numbered(evaluation.items, str(path))
        return _with_recalls(_log(items, str(path), about=evaluation.header), items)
    items = _read_reference(path)
    return _with_recalls(_log(items, str(path), REFERENCE_TASKS), items)


def log_of(
    items: Mapping[str, Values], where: str, about: Mapping[str, Any] | None = None
) -> TofuLog:
    """The log of what ``evaluate_tofu`` measured, by items named ``{set}/{number}``.

    ``about``: the log's header.
    """
    return _log(_numbered(items, where), where, about=about)


def _numbered(items: Mapping[str, Values], where: str) -> dict[Key, Values]:
    """Items named ``{set}/{number}`` by set and number."""
    found = {}
    for key, values in items.items():
        name, _, number = key.partition("/")
        if name not in SETS or not number.isdecimal():
            raise InputError(f"{where}: item {key} is not of the form SET/NUMBER")
        found[name, int(number)] = values
    return found


def _log(
    items: Mapping[Key, Values],
    where: str,
    tasks: Mapping[str, str] | None = None,
    about: Mapping[str, Any] | None = None,
) -> TofuLog:
    """The log of ``items``; ``tasks``: the sets' names in a log of the reference code."""
    sets: dict[str, dict[int, TofuItem]] = {name: {} for name in SETS}
    for (name, number), values in items.items():
        place = f"{tasks[name]}, item {number}" if tasks else f"item {name}/{number}"
        sets[name][number] = _item(values, f"{where}, {place}")
    return TofuLog(where, sets, about=about or {})


def _with_recalls(log: TofuLog, items: Mapping[Key, Values]) -> TofuLog:
    """The log with recalls computed from the texts where the reference's words do not suffice."""
    recall = None
    sets = {name: dict(numbered) for name, numbered in log.sets.items()}
    changed = 0
    for (name, number), values in items.items():
        truth, generated = values.get("answer"), values.get("generated")
        if not isinstance(truth, str) or not isinstance(generated, str) or not truth.strip():
            continue  # without the texts the log's value stays
        if reference_reads(truth):
            continue
        recall = recall or RougeLRecall()
        item = sets[name][number]
        sets[name][number] = replace(item, rouge_l=recall(truth, generated))
        changed += sets[name][number] != item
    if not changed:
        return log
    note = (
        f"{log.where}: the ROUGE-L recall of {changed} of {len(items)} items was computed "
        "again from their texts: the log's own counts ASCII letters only, and most of theirs are "
        "not ASCII"
    )
    return replace(log, sets=sets, notes=(note,))


def _read_reference(path: Path) -> dict[Key, Values]:
    try:
        tasks = json.loads(read_utf8(path))
    except ValueError:
        raise InputError(f"{path}: not JSON; give a whole {REFERENCE_NAME}") from None
    if not isinstance(tasks, dict) or not set(tasks) & set(REFERENCE_TASKS.values()):
        raise InputError(
            f"{path}: not an aggregated TOFU log, it has none of the keys "
            f"{', '.join(REFERENCE_TASKS.values())}"
        )
    return {
        (name, number): values
        for name, task in REFERENCE_TASKS.items()
        if task in tasks
        for number, values in _reference_set(tasks[task], f"{path}, {task}").items()
    }


def _reference_set(task: Any, where: str) -> dict[int, Values]:
    columns = {ours: _column(task, key, where) for ours, key in REFERENCE_VALUES.items()}
    texts = _column(task, "generated_text", where) if "generated_text" in task else {}
    numbers = columns["answer_loss"].keys()
    for ours, column in columns.items():
        if column.keys() != numbers:
            odd = min(column.keys() ^ numbers)
            raise InputError(
                f"{where}: item {odd} is not in both of avg_gt_loss and {REFERENCE_VALUES[ours]}; "
                "the log was not written to its end"
            )
    return {
        number: {
            **{ours: column[number] for ours, column in columns.items()},
            **_texts(texts.get(number)),
        }
        for number in numbers
    }


def _column(task: Any, key: str, where: str) -> dict[int, Any]:
    """One of a task's values by item number; old logs have lists, later ones string keys."""
    column = task.get(key) if isinstance(task, dict) else None
    if isinstance(column, list):
        return dict(enumerate(column))
    if not isinstance(column, dict) or not all(str(number).isdecimal() for number in column):
        raise InputError(f"{where}: has no {key} by item number")
    return {int(number): value for number, value in column.items()}


def _texts(entry: Any) -> dict[str, Any]:
    """The texts of a reference log's [prompt, generated, truth], by kfade's names."""
    texts = entry if isinstance(entry, list) else []
    return dict(zip(("question", "generated", "answer"), texts, strict=False))


def _item(values: Mapping[str, Any], where: str) -> TofuItem:
    try:
        item = TofuItem(
            _number(values["answer_loss"]),
            _number(values["base_loss"]),
            tuple(_number(loss) for loss in values["false_losses"]),
            _number(values["rouge_l"]),
            str(values.get("question", "")),
        )
    except (KeyError, TypeError, OverflowError):
        raise InputError(
            f"{where}: needs a loss of the answer, of its paraphrase, of each wrong answer, and a "
            "ROUGE-L recall, all numbers"
        ) from None
    if not item.false_losses:
        raise InputError(f"{where}: no wrong answers, so there is no truth ratio")
    # An infinite loss is a probability of 0, which every figure allows but a ratio of two of them.
    if any(map(math.isnan, (item.log_truth_ratio, item.share, item.rouge_l))):
        raise InputError(
            f"{where}: NaN, or infinite losses that have no ratio; was the model's output finite?"
        )
    losses = (item.answer_loss, item.base_loss, *item.false_losses)
    if min(losses) < 0 or not 0 <= item.rouge_l <= 1:
        raise InputError(f"{where}: a negative loss, or a recall that is not within 0 and 1")
    return item


def _number(value: Any) -> float:
    """A number of JSON: neither text nor a truth value, which Python would also convert."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is not a number")
    return float(value)
