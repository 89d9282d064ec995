"""How the KL of a row lies on questions: means with intervals, medians, and ratios of rows."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from pieces import Results
from results_rows import BASELINES, Row, number, table

from kfade.evaluate.uncertainty import bootstrap

SLICES = {"report": "report slice", "others": "other kept authors"}


def by_question(results: Results, rows: Sequence[Row]) -> Iterator[str]:
    """The whole section; nothing where no row was measured so."""
    told = {
        row.method: found
        for row in rows
        if row.piece and "report" in (found := results.get(piece_of(row), {}))
    }
    if not told:
        return
    titles = {row.method: row.name for row in rows}
    others = [method for method in told if method in BASELINES]
    rival = min(others, key=lambda method: mean(told[method]["report"]), default=None)
    if "by question retrained" in results:
        told["retrained"], titles["retrained"] = results["by question retrained"], "retrained"
    counts = {name: len(next(iter(told.values()))[name]) for name in SLICES}
    yield "### Question by question"
    yield (
        "A few questions may make most of a mean: KL (nats per token) with its interval (95 %, "
        "resampling questions) and the median question's, of each update brought to the target by "
        f"its length, on the {counts['report']} questions of the report slice and on "
        f"{counts['others']} of the tuning authors, who are kept here and whom no method was "
        "shown. *Of the best baseline's*: mean by mean, both on the same resampled questions."
    )
    heads = " | ".join(f"{title} | median | of the best baseline's" for title in SLICES.values())
    lines = []
    for method, found in told.items():
        cells = []
        for name in SLICES:
            middle = statistics.median(kl for kl, _ in found[name])
            against = told[rival][name] if rival and method != rival else None
            cells += [interval(found[name]), number(middle)]
            cells.append(interval(found[name], against) if against else "")
        lines.append(f"| {titles[method]} | {' | '.join(cells)} |")
    yield table(f"method | {heads}", lines)


def piece_of(row: Row) -> str:
    return (row.piece or "").replace("report ", "by question ", 1)


def mean(questions: Sequence[Sequence[float]]) -> float:
    """Per token, of (KL per token, tokens)."""
    return sum(kl * tokens for kl, tokens in questions) / sum(tokens for _, tokens in questions)


def interval(
    questions: Sequence[Sequence[float]], against: Sequence[Sequence[float]] | None = None
) -> str:
    """The mean per token, or its ratio to that of ``against``, with its interval."""
    own, other = (np.asarray(pairs) for pairs in (questions, against or questions))

    def figure(chosen: NDArray[np.int64]) -> list[float]:
        sums = [(pairs[chosen, 0] * pairs[chosen, 1]).sum() for pairs in (own, other)]
        return [sums[0] / (sums[1] if against else own[chosen, 1].sum())]

    [found] = bootstrap(figure, len(questions), seed=0)
    return f"{found['value']:.2g} ({found['low']:.2g} to {found['high']:.2g})"
