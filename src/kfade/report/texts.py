"""Texts for the page: answers before and after, and completions with the KL of each token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kfade.report.data import Measured, MeasuredModel, Results
from kfade.report.names import short

GENERATIONS, COMPLETIONS = 1200, 400  # shown in all; the logs have the others


def generations(results: Results) -> tuple[list[dict[str, Any]], int]:
    """What runs answer, the base's answer beside it; and how many are left out.

    ``part`` is what the page filters by, ``change`` what it orders by: how far the answer's score
    went.
    """
    made = []
    runs = results.runs
    for run in runs:
        base = results.base_of(run)
        for measured in (*run.of("tofu"), *run.of("mt-bench")):
            before = _counterpart(measured, base)
            answer = _tofu_answer if measured.benchmark == "tofu" else _bench_answer
            for item, values in measured.log.items.items():
                group = item.partition("/")[0] if measured.benchmark == "tofu" else "MT-Bench"
                part = _part(run, runs, group.replace("_", " "))
                made.append(answer(values, before.get(item), part))
    return _spread(made, GENERATIONS)


def _counterpart(measured: Measured, base: MeasuredModel | None) -> Mapping[str, Mapping[str, Any]]:
    """The base's items of the same evaluation, else of the same benchmark; none without it."""
    if base is None:
        return {}
    others = base.of(measured.benchmark)
    same = [other for other in others if other.what == measured.what]
    return (same or others)[0].log.items if others else {}


def _part(run: MeasuredModel, runs: tuple[MeasuredModel, ...], group: str) -> str:
    return group if len(runs) == 1 else f"{run.name}: {group}"


def _tofu_answer(
    values: Mapping[str, Any], before: Mapping[str, Any] | None, part: str
) -> dict[str, Any]:
    after = values["rouge_l"]
    if before is None or before["question"] != values["question"]:
        said, facts, change = None, f"ROUGE-L recall {short(after)}", None
    else:
        said, change = before["generated"], abs(after - before["rouge_l"])
        facts = f"ROUGE-L recall {short(before['rouge_l'])} → {short(after)}"
    return {
        "part": part,
        "prompt": values["question"],
        "expected": values["answer"],
        "before": said,
        "after": values["generated"],
        "facts": facts,
        "change": change,
    }


def _bench_answer(
    values: Mapping[str, Any], before: Mapping[str, Any] | None, part: str
) -> dict[str, Any]:
    if before is not None and before["question"] != values["question"]:
        before = None
    after, old = values["rating"], before["rating"] if before else None
    told = " → ".join(short(rating) for rating in (old, after) if rating is not None)
    return {
        "part": part,
        "prompt": values["question"],
        "expected": None,
        "before": before["answer"] if before else None,
        "after": values["answer"],
        "facts": f"rated {told}" if told else "not rated",
        "change": None if None in (old, after) else abs(after - old),
    }


def completions(results: Results) -> tuple[list[dict[str, Any]], int]:
    """The completions that each run changed most, with their tokens; and how many are left out."""
    measured = [(run, kl) for run in results.runs for kl in run.of("kl")]
    each = max(20, COMPLETIONS // max(1, len(measured)))
    made, left = [], 0
    for run, kl in measured:
        name = run.name if len(run.of("kl")) == 1 else f"{run.name}: {kl.path.name}"
        items = sorted(kl.log.items.values(), key=lambda item: -item["kl"])
        left += max(0, len(items) - each)
        for item in items[:each]:
            made.append(
                {
                    "part": name,
                    "prompt": item["prompt"],
                    "mean": item["kl"],
                    "tokens": item["strings"],
                    "values": item["token_kl"],
                }
            )
    return made, left


def _spread(made: list[dict[str, Any]], most: int) -> tuple[list[dict[str, Any]], int]:
    """At most so many, evenly spread over all."""
    if len(made) <= most:
        return made, 0
    return [made[i * len(made) // most] for i in range(most)], len(made) - most
