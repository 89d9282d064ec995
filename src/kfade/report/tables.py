"""Tables of the page as plain values, written as a person reads them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kfade.report.before import before_columns
from kfade.report.charts import Chart
from kfade.report.data import MeasuredModel, Results
from kfade.report.metrics import GROUPS, SHARE
from kfade.report.names import method_of, short
from kfade.report.origins import compare_results
from kfade.report.values import Row, Value

NUMBER_ROWS = 40  # rows of the table below a chart: about so many a series, at most


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


def cards(rows: Sequence[Row], results: Results) -> list[tuple[Row, Value, Value | None]]:
    """(row, the run's value, the value before) of one row of each group, for a page of one run."""
    if len(results.runs) != 1:
        return []
    run = results.runs[0]
    column = before_columns(results).get(run.name, "")

    def before(row: Row) -> Value | None:
        return row.values.get(column)

    made = []
    for group in GROUPS[:3]:
        own = [row for row in rows if row.metric.group == group and run.name in row.values]
        if own:
            # The best figure has one of the base beside it; the next best has an interval: it
            # comes from an evaluation, not from the run itself.
            best = max(
                own, key=lambda r: (before(r) is not None, r.values[run.name].low is not None)
            )
            made.append((best, best.values[run.name], before(best)))
    return made


@dataclass(frozen=True)
class Column:
    """A column of a table: its head, and a row's value in it."""

    name: str
    value: Callable[[Any], Any]
    unit: str = ""
    number: bool = True


RUN_COLUMNS = (
    Column("run", lambda run: run.name, number=False),
    Column("made by", lambda run: method_of(run), number=False),
    Column("size asked", lambda run: _size(run.manifest.get("config", {})), number=False),
    Column("forget loss before", lambda run: _metric(run, "forget_loss", "before"), "nats/token"),
    Column("forget loss after", lambda run: _metric(run, "forget_loss", "after"), "nats/token"),
    Column("retain KL", lambda run: _metric(run, "retain_kl"), "nats/token"),
    Column("lost to rounding", lambda run: _metric(run, "lost_in_dtype", scale=100), "%"),
    Column("time", lambda run: _metric(run, "seconds", "total"), "s"),
    Column("peak memory", lambda run: _metric(run, "peak_bytes", scale=1e-9), "GB"),
)
STEP_COLUMNS = (
    Column("run", lambda step: step["run"], number=False),
    Column("step", lambda step: step["number"]),
    Column("α", lambda step: step.get("alpha")),
    Column("predicted KL", lambda step: step.get("predicted_kl"), "fitted"),
    Column("predicted KL", lambda step: step.get("exact_kl"), "exact"),
    Column("measured KL", lambda step: step.get("measured_kl")),
    Column("retain KL so far", lambda step: step.get("retain_kl")),
    Column("forget loss before", lambda step: step.get("forget_loss_before")),
    Column("forget loss after", lambda step: step.get("forget_loss_after")),
    Column("measured / exact", lambda step: _ratio(step)),
)


def run_tables(results: Results) -> list[dict[str, Any]]:
    """A table of the runs, if there are several, and one of their steps."""
    runs = [run for run in results.runs if run.metrics]
    steps = [
        {**step, "run": run.name, "number": number}
        for run in runs
        for number, step in enumerate(run.metrics.get("steps", []), start=1)
        if "predicted_kl" in step
    ]
    tables = []
    if len(runs) > 1:
        note = compare_results(runs).note
        tables.append(_table("Runs, one a row.", RUN_COLUMNS, runs, note))
    if steps:
        caption = "Steps: what each predicted and did. KL and losses in nats per token."
        stepped = {step["run"] for step in steps}
        note = compare_results([run for run in runs if run.name in stepped]).note
        tables.append(_table(caption, STEP_COLUMNS, steps, note))
    return tables


def _table(
    caption: str, columns: Sequence[Column], items: Sequence[Any], note: Sequence[str]
) -> dict[str, Any]:
    """The table, without the columns of which no row has a value."""
    columns = [c for c in columns if any(c.value(item) is not None for item in items)]
    rows = [[column.value(item) for column in columns] for item in items]
    return {
        "caption": caption,
        "note": note,
        "columns": columns,
        "rows": [
            [{"text": "·", "sort": ""} if v is None else {"text": short(v), "sort": v} for v in row]
            for row in rows
        ],
    }


def _metric(run: MeasuredModel, *keys: str, scale: float | None = None) -> float | None:
    """A number of a run's metrics, times ``scale``; None where it was not measured."""
    value: Any = run.metrics
    for key in keys:
        value = (value or {}).get(key)
    return value if value is None or scale is None else scale * value


def _size(config: Mapping[str, Any]) -> str:
    """The size of step that was asked for, as in ``kl 0.05``."""
    asked = config.get("size", {})
    return ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in asked.items() if v is not None)


def _ratio(step: Mapping[str, Any]) -> float | None:
    return step["measured_kl"] / step["exact_kl"] if step.get("exact_kl") else None


def chart_rows(chart: Chart) -> tuple[list[dict[str, str]], int]:
    """(a chart's numbers as rows, n): of each series only every n-th point has a row."""
    longest = max((len(series.x) for series in chart.series), default=0)
    every = -(-longest // NUMBER_ROWS)
    rows = []
    for series in chart.series:
        for i in range(0, len(series.x), every):
            ends = f"{short(series.low[i])} to {short(series.high[i])}" if series.low else ""
            rows.append(
                {
                    "name": series.name,
                    "label": series.labels[i] if series.labels else "",
                    "x": short(series.x[i]),
                    "y": short(series.y[i]),
                    "interval": ends,
                }
            )
    return rows, every


def facts(manifest: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, value) of what a manifest tells in one line each."""
    for name, value in manifest.items():
        words = name.replace("_sha256", " SHA-256").replace("_", " ")
        if name == "versions":
            yield words, ", ".join(f"{k} {v}" for k, v in value.items())
        elif not isinstance(value, dict | list) and value is not None:
            yield words, str(value)


def settings(subject: MeasuredModel) -> Iterator[tuple[str, str]]:
    """(name, JSON) of the settings of a run and of its evaluations."""
    if config := subject.manifest.get("config"):
        yield "settings", _pretty(config)
    for measured in subject.measured:
        yield f"{measured.path.name}: {measured.benchmark}", _pretty(measured.log.header)


def _pretty(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False)
