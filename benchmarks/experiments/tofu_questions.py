"""How the KL of a method is spread over questions: means with intervals, medians, ratios."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import numpy as np
from lab.pieces import Results
from lab.records import number, table
from lab.rows import BASELINES, Row, with_interval
from numpy.typing import NDArray

from kfade.evaluate.uncertainty import bootstrap

SLICES = {"report": "report slice", "others": "other kept authors"}
Questions = Sequence[Sequence[float]]
"""(KL per token, tokens) of each."""


def questions_table(results: Results, rows: Sequence[Row]) -> str:
    """Mean, median and ratio to the best baseline, in both sets of questions."""
    titles = {row.method: row.label for row in rows} | {"retrained": "retrained"}
    told = {name: measured(results, rows, name) for name in SLICES}
    rivals = {name: rival_of(told[name]) for name in SLICES}
    if "by question retrained" in results:
        for name in SLICES:
            told[name]["retrained"] = results["by question retrained"][name]
    lines = []
    for method in told["report"]:
        cells = [titles[method]]
        for name, rival in rivals.items():
            own = told[name][method]
            median = number(statistics.median(kl for kl, _ in own))
            against = told[name][rival] if rival and method != rival else None
            ratio = with_interval(interval(own, against)) if against else ""
            cells += [with_interval(interval(own)), median, ratio]
        lines.append(cells)
    heads = (f"{title} | median | ratio to the best baseline" for title in SLICES.values())
    return table(f"method | {' | '.join(heads)}", lines)


def measured(results: Results, rows: Sequence[Row], slice_name: str) -> dict[str, Questions]:
    """The questions' KLs of the rows that were measured so, by method."""
    told = {row.method: results.get(f"by question {row.name}", {}) for row in rows}
    return {method: own[slice_name] for method, own in told.items() if slice_name in own}


def rival_of(told: Mapping[str, Questions]) -> str | None:
    """The baseline of the lowest mean."""
    return min((m for m in told if m in BASELINES), key=lambda m: mean(told[m]), default=None)


def mean(questions: Questions) -> float:
    """KL per token."""
    return sum(kl * tokens for kl, tokens in questions) / sum(tokens for _, tokens in questions)


def interval(questions: Questions, against: Questions | None = None) -> dict[str, float]:
    """The mean per token, or its ratio to that of ``against``: ``value``, ``low``, ``high``."""
    kl, tokens = np.asarray(questions).T
    unit = tokens if against is None else np.asarray(against)[:, 0] * tokens

    def figure(chosen: NDArray[np.int64]) -> list[float]:
        return [(kl * tokens)[chosen].sum() / unit[chosen].sum()]

    [found] = bootstrap(figure, len(questions), seed=0)
    return found
