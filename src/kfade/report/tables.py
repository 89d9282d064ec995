"""Tables of the page as plain values, written as a person reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from kfade.report.charts import Chart, Series
from kfade.report.data import MeasuredModel, Results
from kfade.report.metrics import GROUPS, SHARE
from kfade.report.names import method_of, short
from kfade.report.values import Row, Value

NUMBER_ROWS = 40  # rows of the table below a chart, at most about so many a series
ROLES = {"base": "base", "run": "", "model": "as it came"}
DIGESTS = "_sha256"


def written(value: float, unit: str) -> str:
    """A number in its unit, without the unit's name but for %."""
    return f"{100 * value:.1f} %" if unit == SHARE else short(value)


def details(value: Value, unit: str) -> list[str]:
    """The ends of the interval and the sample's size: "0.024 to 0.035", "n 30 000"."""
    parts = []
    if value.low is not None and value.high is not None:
        parts.append(f"{written(value.low, unit)} to {written(value.high, unit)}")
    if value.count is not None:
        parts.append(f"n {short(value.count)}")
    return parts


def headline_table(
    rows: Sequence[Row], names: Sequence[str]
) -> list[tuple[str, list[dict[str, Any]]]]:
    """(group, rows with a cell for each name) of the groups that have rows."""
    groups: list[tuple[str, list[dict[str, Any]]]] = []
    for group in GROUPS:
        own: list[dict[str, Any]] = [
            {
                "name": row.metric.name,
                # The last word stays on one line with the button behind it.
                "start": row.metric.name.rpartition(" ")[0],
                "end": row.metric.name.rpartition(" ")[2],
                # Accuracies are written with their unit.
                "unit": "" if row.metric.unit == SHARE else row.metric.unit,
                "formula": row.metric.formula,
                "better": row.metric.better,
                "cells": [_cell(row.values.get(name), row.metric.unit) for name in names],
            }
            for row in rows
            if row.metric.group == group
        ]
        if own:
            groups.append((group, own))
    return groups


def _cell(value: Value | None, unit: str) -> dict[str, Any] | None:
    if value is None:
        return None
    return {"value": written(value.value, unit), "details": details(value, unit)}


def cards(rows: Sequence[Row], results: Results) -> list[dict[str, str]]:
    """One figure of each group, for a page of one run."""
    if len(results.runs) != 1:
        return []
    run = results.runs[0]
    base = results.base_of(run)
    made = []
    for group in GROUPS[:3]:
        own = [row for row in rows if row.metric.group == group and run.name in row.values]
        if not own:
            continue
        # A figure beside its base says most; of others an evaluation's, made apart from the run.
        row = max(own, key=lambda row: (_has(row, base), row.values[run.name].low is not None))
        unit, value = row.metric.unit, row.values[run.name]
        before = row.values.get(base.name) if base else None
        made.append(
            {
                "group": group,
                "name": row.metric.name,
                "unit": "" if unit == SHARE else unit,
                "value": written(value.value, unit),
                "before": written(before.value, unit) if before else "",
                "detail": ", ".join(details(value, unit)),
            }
        )
    return made


def _has(row: Row, subject: MeasuredModel | None) -> bool:
    return subject is not None and subject.name in row.values


def run_tables(results: Results) -> list[dict[str, Any]]:
    """A table of the runs, and one of their steps."""
    runs = [run for run in results.runs if run.metrics]
    tables = []
    if len(runs) > 1:
        tables.append(_table("Runs, one a row.", RUN_COLUMNS, [_run_row(run) for run in runs]))
    steps = [
        [run.name, number, *(step.get(key) for key in STEP_KEYS), _ratio(step)]
        for run in runs
        for number, step in enumerate(run.metrics.get("steps", []), start=1)
        if "predicted_kl" in step
    ]
    if steps:
        caption = "Steps: what each predicted and did. KL and losses in nats per token."
        tables.append(_table(caption, STEP_COLUMNS, steps))
    return tables


RUN_COLUMNS = (
    ("run", "", False),
    ("made by", "", False),
    ("size asked", "", False),
    ("forget loss before", "nats/token", True),
    ("forget loss after", "nats/token", True),
    ("retain KL", "nats/token", True),
    ("lost to rounding", "%", True),
    ("time", "s", True),
    ("peak memory", "GB", True),
)
STEP_KEYS = (
    "alpha", "predicted_kl", "exact_kl", "measured_kl", "retain_kl",
    "forget_loss_before", "forget_loss_after",
)  # fmt: skip
STEP_COLUMNS = (
    ("run", "", False),
    ("step", "", True),
    ("α", "", True),
    ("predicted KL", "fitted", True),
    ("predicted KL", "exact", True),
    ("measured KL", "", True),
    ("retain KL so far", "", True),
    ("forget loss before", "", True),
    ("forget loss after", "", True),
    ("measured / exact", "", True),
)


def _run_row(run: MeasuredModel) -> list[Any]:
    metrics = run.metrics
    loss, lost, peak = (metrics.get(k) for k in ("forget_loss", "lost_in_dtype", "peak_bytes"))
    return [
        run.name,
        method_of(run),
        _size(run.manifest.get("config", {}).get("size", {})),
        *((loss["before"], loss["after"]) if loss else (None, None)),
        metrics.get("retain_kl"),
        None if lost is None else 100 * lost,
        metrics.get("seconds", {}).get("total"),
        None if peak is None else peak / 1e9,
    ]


def _size(asked: Mapping[str, Any]) -> str:
    return ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in asked.items() if v is not None)


def _ratio(step: Mapping[str, Any]) -> float | None:
    return step["measured_kl"] / step["exact_kl"] if step.get("exact_kl") else None


def _table(
    caption: str, columns: Sequence[tuple[str, str, bool]], rows: Sequence[Sequence[Any]]
) -> dict[str, Any]:
    return {
        "caption": caption,
        "columns": [{"name": n, "unit": u, "number": number} for n, u, number in columns],
        "rows": [
            [{"text": "·", "sort": ""} if v is None else {"text": short(v), "sort": v} for v in row]
            for row in rows
        ],
    }


def chart_rows(chart: Chart) -> tuple[list[dict[str, str]], int]:
    """A chart's numbers as rows, and that only one in so many is among them."""
    longest = max((len(series.x) for series in chart.series), default=0)
    every = -(-longest // NUMBER_ROWS)
    rows = [_chart_row(s, i) for s in chart.series for i in range(0, len(s.x), every)]
    return rows, every


def _chart_row(series: Series, index: int) -> dict[str, str]:
    ends = (series.low[index], series.high[index]) if series.low else None
    return {
        "name": series.name,
        "label": series.labels[index] if series.labels else "",
        "x": short(series.x[index]),
        "y": short(series.y[index]),
        "interval": f"{short(ends[0])} to {short(ends[1])}" if ends else "",
    }


def provenance(results: Results) -> list[dict[str, Any]]:
    """Where each subject's numbers come from: facts, and longer texts to unfold."""
    return [
        {
            "name": subject.name,
            "role": ROLES[subject.kind],
            "facts": _facts(subject.manifest),
            "texts": [
                *_settings(subject),
                *(
                    (f"{m.path.name}: {m.benchmark}", _pretty(m.log.header))
                    for m in subject.measured
                ),
            ],
        }
        for subject in results.subjects
    ]


def _facts(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    facts = []
    for name, value in manifest.items():
        words = name.replace(DIGESTS, " SHA-256").replace("_", " ")
        if name == "versions":
            facts.append((words, ", ".join(f"{k} {v}" for k, v in value.items())))
        elif not isinstance(value, dict | list) and value is not None:
            facts.append((words, str(value)))
    return facts


def _settings(subject: MeasuredModel) -> list[tuple[str, str]]:
    config = subject.manifest.get("config")
    return [("settings", _pretty(config))] if config else []


def _pretty(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False)
