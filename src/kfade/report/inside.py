"""Charts of what happened inside runs: predictions, blocks, seconds, memory."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from kfade.report.charts import Axis, Chart, Place, Series
from kfade.report.data import MeasuredModel
from kfade.report.names import short


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
                    share = (trial["alpha"] / step["alpha"]) ** 2
                    told = f"trial, α {short(trial['alpha'])}"
                    points.append((share * step[key], trial["retain_kl"], told))
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
    )


def change_by_block(runs: Sequence[MeasuredModel]) -> Chart | None:
    """‖ΔW‖/‖W‖ by block: by kind of weight for one run, root mean square over kinds for several.

    The changes of several steps add up to at most what is shown, their sum.
    """
    tables = {run.name: changes(run.metrics.get("steps", [])) for run in runs}
    tables = {name: table for name, table in tables.items() if table}
    if not tables:
        return None
    series = []
    if len(tables) == 1:
        ((_, table),) = tables.items()
        kinds = list(dict.fromkeys(kind for _, kind in table))
        for colour, kind in enumerate(kinds):
            own = sorted((block, v) for (block, k), v in table.items() if k == kind)
            series.append(_blocks(kind, own, colour))
        several = ""
    else:
        for colour, (name, table) in enumerate(tables.items()):
            blocks: dict[int, list[float]] = defaultdict(list)
            for (block, _), value in table.items():
                blocks[block].append(value)
            own = sorted(
                (b, math.sqrt(sum(v * v for v in vs) / len(vs))) for b, vs in blocks.items()
            )
            series.append(_blocks(name, own, colour))
        several = " Root mean square over the weights of a block."
    return Chart(
        "update-blocks",
        "Where in the network the update lies",
        "Norm of the change over the norm of the weight, by transformer block from the input on. "
        f"Of several steps, the sum: their true total is at most that.{several}",
        Axis("block"),
        Axis("‖ΔW‖ / ‖W‖, %"),
        tuple(series),
    )


def _blocks(name: str, values: Sequence[tuple[int, float]], colour: int) -> Series:
    x: tuple[Place, ...] = tuple(block for block, _ in values)
    return Series(name, x, tuple(100 * v for _, v in values), "line and marks", colour, colour)


def changes(steps: Sequence[Mapping[str, Any]]) -> dict[tuple[int, str], float]:
    """Σ over steps of ‖ΔW‖/‖W‖ by (block, kind); kind as in ``down_proj``."""
    total: dict[tuple[int, str], float] = defaultdict(float)
    for step in steps:
        for name, value in step.get("relative_change", {}).items():
            total[block_and_kind(name)] += value
    return dict(total)


def block_and_kind(name: str) -> tuple[int, str]:
    """(3, "down_proj") of ``model.layers.3.mlp.down_proj.weight``; block 0 where none is named."""
    found = re.search(r"(?:^|\.)(\d+)\.", name)
    kind = name.removesuffix(".weight").replace(".bias", " bias").split(".")[-1]
    return (int(found.group(1)) if found else 0), kind


def stage_seconds(runs: Sequence[MeasuredModel]) -> Chart | None:
    """Seconds by stage, a set of bars a run."""
    series = _stages(runs, "seconds", 1.0)
    if not series:
        return None
    caption = "Wall-clock time. Check: measuring, and the search for each step's size."
    return Chart("seconds", "Time by stage", caption, Axis("stage"), Axis("seconds"), series)


def stage_memory(runs: Sequence[MeasuredModel]) -> Chart | None:
    """Peak memory by stage, a set of bars a run."""
    series = _stages(runs, "peak_bytes_by_stage", 1e-9)
    if not series:
        return None
    caption = "Peak memory while a stage ran: of the GPU where there was one, else of the process."
    return Chart(
        "memory", "Memory by stage", caption, Axis("stage"), Axis("GB (10⁹ bytes)"), series
    )


def _stages(runs: Sequence[MeasuredModel], key: str, unit: float) -> tuple[Series, ...]:
    made = []
    for colour, run in enumerate(runs):
        values = {k: v for k, v in run.metrics.get(key, {}).items() if k != "total"}
        if values:
            y = tuple(unit * v for v in values.values())
            made.append(Series(run.name, tuple(values), y, "bars", colour))
    return tuple(made)
