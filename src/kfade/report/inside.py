"""Charts of what happened within runs: predictions, change by block, seconds, memory."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from kfade.report.charts import Axis, Chart, Series
from kfade.report.data import MeasuredModel
from kfade.report.names import short
from kfade.report.origins import compare_results

Weight = tuple[int, str, int | None]
"""(block, kind as in ``down_proj``, number of the expert if it belongs to one)."""


def predicted_measured(runs: Sequence[MeasuredModel]) -> Chart | None:
    """Measured KL of each step against its two predictions, and the line where they agree.

    The trials of the first step's size are marks too: its predictions scale with α².
    """
    series: list[Series] = []
    for colour, run in enumerate(runs):
        for which, key, symbol in (("fitted", "predicted_kl", 0), ("exact", "exact_kl", 1)):
            points = []
            for number, step in enumerate(run.metrics.get("steps", []), start=1):
                points.append((step[key], step["measured_kl"], f"step {number}"))
                for trial in step.get("probes", [])[:-1] if number == 1 else []:
                    predicted = (trial["alpha"] / step["alpha"]) ** 2 * step[key]
                    label = f"trial, α {short(trial['alpha'])}"
                    points.append((predicted, trial["retain_kl"], label))
            if points:
                x, y, labels = zip(*sorted(points), strict=True)
                name = f"{run.name}, {which} quadratic"
                series.append(Series(name, x, y, "marks", colour, symbol, labels=labels))
    values = [v for s in series for v in (*s.x, *s.y) if isinstance(v, float | int) and v > 0]
    if not values:
        return None
    ends = (min(values), max(values))
    series.append(Series("prediction = measurement", ends, ends, "line", None, dashed=True))
    return Chart(
        "predicted-measured",
        "Predicted and measured KL",
        "Fitted quadratic: ½α²‖r‖² by the approximate curvature. Exact quadratic: ½δᵀGδ by exact "
        "Gauss-Newton products on held-out retain data. Above the line, more changed than was "
        "predicted. Trials are those of the first step's size.",
        Axis("predicted KL, nats per token", log=True),
        Axis("measured KL, nats per token", log=True),
        tuple(series),
        compare_results([run for run in runs if run.metrics.get("steps")]).note,
    )


def change_by_block(runs: Sequence[MeasuredModel]) -> Chart | None:
    """‖ΔW‖/‖W‖ by block: by kind of weight for one run, root mean square over kinds for several,
    and over the experts of a layer.

    The norms of several steps are summed: an upper bound of the norm of their total change.
    """
    tables = {run.name: changes(run.metrics.get("steps", [])) for run in runs}
    tables = {name: table for name, table in tables.items() if table}
    if not tables:
        return None
    several = len(tables) > 1
    lines: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for name, table in tables.items():
        for (block, kind, _), change in table.items():
            lines[name if several else kind][block].append(change)
    series = []
    for colour, (name, blocks) in enumerate(lines.items()):
        x = tuple(sorted(blocks))
        y = tuple(100 * _root_mean_square(blocks[block]) for block in x)
        series.append(Series(name, x, y, "line and marks", colour, colour))
    return Chart(
        "update-blocks",
        "Where in the network the update lies",
        "Norm of the change over the norm of the weight, by transformer block from the input on. "
        "Of several steps, the sum: their true total is at most that."
        + (" Root mean square over the weights of a block." if several else "")
        + (" Experts: root mean square over those that changed." if _experts(tables) else ""),
        Axis("block"),
        Axis("‖ΔW‖ / ‖W‖, %"),
        tuple(series),
        compare_results([run for run in runs if run.name in tables]).note,
    )


def change_by_expert(runs: Sequence[MeasuredModel]) -> Chart | None:
    """‖ΔW‖/‖W‖ of each expert's matrices, by block; a mark for each. None without experts."""
    tables = {run.name: changes(run.metrics.get("steps", [])) for run in runs}
    series: list[Series] = []
    for name, table in tables.items():
        marks: dict[str, list[tuple[int, float, str]]] = defaultdict(list)
        for (block, kind, expert), change in table.items():
            if expert is not None:
                marks[kind].append((block, 100 * change, f"expert {expert}"))
        for kind, found in marks.items():
            x, y, labels = zip(*sorted(found), strict=True)
            label = f"{name}, {kind}" if len(runs) > 1 else kind
            colour = len(series)
            series.append(Series(label, x, y, "marks", colour, colour, labels=labels))
    if not series:
        return None
    return Chart(
        "update-experts",
        "Which experts the update changes",
        "Norm of the change over the norm of the weight, one mark for each expert of a block. Of "
        "several steps, the sum: their true total is at most that.",
        Axis("block"),
        Axis("‖ΔW‖ / ‖W‖, %"),
        tuple(series),
        compare_results([run for run in runs if _experts({run.name: tables[run.name]})]).note,
    )


def _experts(tables: Mapping[str, Mapping[Weight, float]]) -> bool:
    """Whether any weight belongs to an expert."""
    return any(expert is not None for table in tables.values() for _, _, expert in table)


def _root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(sum(value * value for value in values) / len(values))


def changes(steps: Sequence[Mapping[str, Any]]) -> dict[Weight, float]:
    """Σ over steps of ‖ΔW‖/‖W‖ of each weight."""
    total: dict[Weight, float] = defaultdict(float)
    for step in steps:
        for name, value in step.get("relative_change", {}).items():
            total[place_of(name)] += value
    return dict(total)


def place_of(name: str) -> Weight:
    """(3, "down_proj", None) of ``model.layers.3.mlp.down_proj.weight``, and (3, "down_proj", 7) of
    ``model.layers.3.mlp.experts.down_proj[7]``; block 0 where none is named."""
    found = re.search(r"(?:^|\.)(\d+)\.", name)
    kind = name.removesuffix(".weight").replace(".bias", " bias").split(".")[-1]
    kind, _, expert = kind.removesuffix("]").partition("[")
    return (int(found.group(1)) if found else 0), kind, (int(expert) if expert else None)


def stage_seconds(runs: Sequence[MeasuredModel]) -> Chart | None:
    """Seconds by stage, a set of bars a run."""
    caption = "Wall-clock time. Check: measuring, and the search for each step's size."
    return _stages(runs, "seconds", 1.0, "seconds", "Time by stage", caption, Axis("seconds"))


def stage_memory(runs: Sequence[MeasuredModel]) -> Chart | None:
    """Peak memory by stage, a set of bars a run."""
    caption = "Peak memory while a stage ran: of the GPU where there was one, else of the process."
    unit = Axis("GB (10⁹ bytes)")
    return _stages(runs, "peak_bytes_by_stage", 1e-9, "memory", "Memory by stage", caption, unit)


def _stages(
    runs: Sequence[MeasuredModel],
    metric: str,
    scale: float,
    key: str,
    title: str,
    caption: str,
    y: Axis,
) -> Chart | None:
    """A bar chart of ``scale`` times what ``metrics[metric]`` holds for each stage."""
    series, shown = [], []
    for colour, run in enumerate(runs):
        stages = {k: v for k, v in run.metrics.get(metric, {}).items() if k != "total"}
        if stages:
            heights = tuple(scale * value for value in stages.values())
            series.append(Series(run.name, tuple(stages), heights, "bars", colour))
            shown.append(run)
    if not series:
        return None
    note = compare_results(shown).note
    return Chart(key, title, caption, Axis("stage"), y, tuple(series), note)
