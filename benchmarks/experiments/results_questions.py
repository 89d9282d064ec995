"""How the KL of a row lies on questions: means with intervals, medians, and ratios of rows."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from pieces import Results
from results_rows import BASELINES, Row, number, table, with_interval

from kfade.evaluate.uncertainty import bootstrap

SLICES = {"report": "report slice", "others": "other kept authors"}
Questions = Sequence[Sequence[float]]
"""(KL per token, tokens) of each."""


def by_question(results: Results, rows: Sequence[Row]) -> Iterator[str]:
    """The whole section; nothing where no row was measured so."""
    titles = {row.method: row.name for row in rows}
    told = {name: measured(results, rows, name) for name in SLICES}
    methods = list(told["report"])
    if not methods:
        return
    rivals = {name: rival_of(told[name]) for name in SLICES}
    if "by question retrained" in results:
        methods.append("retrained")
        titles["retrained"] = "retrained"
        for name in SLICES:
            told[name]["retrained"] = results["by question retrained"][name]
    counts = {name: len(told[name][methods[0]]) for name in SLICES}
    yield "### Question by question"
    yield (
        "A few questions may make most of a mean: KL (nats per token) with its interval (95 %, "
        "resampling questions) and the median question's, of each update brought to the target by "
        f"its length, on the {counts['report']} questions of the report slice, which are about the "
        f"authors of the retain data, and on {counts['others']} about the tuning authors, who are "
        "kept here and whom no method was shown. *Of the best baseline's*: mean by mean, of the "
        "baseline of the lowest mean there, both on the same resampled questions."
    )
    heads = " | ".join(f"{title} | median | of the best baseline's" for title in SLICES.values())
    lines = []
    for method in methods:
        cells = []
        for name, rival in rivals.items():
            own = told[name][method]
            middle = statistics.median(kl for kl, _ in own)
            cells += [with_interval(interval(own)), number(middle)]
            other = told[name][rival] if rival and method != rival else None
            cells.append(with_interval(interval(own, other)) if other else "")
        lines.append(f"| {titles[method]} | {' | '.join(cells)} |")
    yield table(f"method | {heads}", lines)


def measured(results: Results, rows: Sequence[Row], slice_name: str) -> dict[str, Questions]:
    """The questions' KLs of the rows that were measured so."""
    found = {}
    for row in rows:
        piece = (row.piece or "").replace("report ", "by question ", 1)
        if slice_name in results.get(piece, {}):
            found[row.method] = results[piece][slice_name]
    return found


def rival_of(told: Mapping[str, Questions]) -> str | None:
    """The baseline of the lowest mean."""
    return min((m for m in told if m in BASELINES), key=lambda m: mean(told[m]), default=None)


def mean(questions: Questions) -> float:
    """Per token."""
    return sum(kl * tokens for kl, tokens in questions) / sum(tokens for _, tokens in questions)


def interval(questions: Questions, against: Questions | None = None) -> dict[str, float]:
    """The mean per token, or its ratio to that of ``against``: ``value``, ``low``, ``high``."""
    kl, tokens = np.asarray(questions).T
    unit = tokens if against is None else np.asarray(against)[:, 0] * tokens

    def figure(chosen: NDArray[np.int64]) -> list[float]:
        return [(kl * tokens)[chosen].sum() / unit[chosen].sum()]

    [found] = bootstrap(figure, len(questions), seed=0)
    return found
