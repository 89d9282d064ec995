"""Texts for the page: answers before and after, and completions with the KL of each token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kfade.report.data import Measured, MeasuredModel, Results
from kfade.report.names import short

GENERATIONS, COMPLETIONS = 1200, 400  # the most that a page shows; the logs have the others


def generations(results: Results) -> tuple[list[dict[str, Any]], int]:
    """(answers of the runs beside those of their bases, how many answers are left out).

    The page filters by ``part`` and sorts by ``change``: by how much the answer's score changed.
    """
    made = []
    for run in results.runs:
        base = results.base_of(run)
        for measured in (*run.of("tofu"), *run.of("mt-bench")):
            before = _same_evaluation(measured, base)
            is_tofu = measured.benchmark == "tofu"
            answer = _tofu_answer if is_tofu else _bench_answer
            for item, after in measured.log.items.items():
                group = item.partition("/")[0].replace("_", " ") if is_tofu else "MT-Bench"
                old = before.get(item)
                if old is not None and old["question"] != after["question"]:
                    old = None
                part = group if len(results.runs) == 1 else f"{run.name}: {group}"
                made.append({"part": part, "prompt": after["question"], **answer(old, after)})
    count = min(len(made), GENERATIONS)  # evenly spread over all
    return [made[i * len(made) // count] for i in range(count)], len(made) - count


def _same_evaluation(
    measured: Measured, base: MeasuredModel | None
) -> Mapping[str, Mapping[str, Any]]:
    """The base's items of the same evaluation, else of the same benchmark; else none."""
    others = base.of(measured.benchmark) if base is not None else []
    same = [other for other in others if other.what == measured.what]
    return next((other.log.items for other in (*same, *others)), {})


def _tofu_answer(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> dict[str, Any]:
    scores = [answer["rouge_l"] for answer in (before, after) if answer is not None]
    return {
        "expected": after["answer"],
        "before": before["generated"] if before else None,
        "after": after["generated"],
        "facts": f"ROUGE-L recall {' → '.join(map(short, scores))}",
        "change": abs(scores[1] - scores[0]) if before else None,
    }


def _bench_answer(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> dict[str, Any]:
    ratings = [before["rating"] if before else None, after["rating"]]
    known = [rating for rating in ratings if rating is not None]
    return {
        "expected": None,
        "before": before["answer"] if before else None,
        "after": after["answer"],
        "facts": f"rated {' → '.join(map(short, known))}" if known else "not rated",
        "change": abs(known[1] - known[0]) if len(known) == 2 else None,
    }


def completions(results: Results) -> tuple[list[dict[str, Any]], int]:
    """(the completions that each run changed most, with their tokens; how many are left out)."""
    measured = [(run, kl) for run in results.runs for kl in run.of("kl")]
    most = max(20, COMPLETIONS // max(1, len(measured)))
    made, left = [], 0
    for run, kl in measured:
        items = sorted(kl.log.items.values(), key=lambda item: -item["kl"])
        left += max(0, len(items) - most)
        made += [
            {
                "part": run.name_of(kl),
                "prompt": item["prompt"],
                "mean": item["kl"],
                "tokens": item["strings"],
                "values": item["token_kl"],
            }
            for item in items[:most]
        ]
    return made, left
