"""Charts of results: pure functions, each None where the data that it needs are missing."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kfade.evaluate.uncertainty import bootstrap
from kfade.report.charts import Axis, Chart, Series
from kfade.report.data import Log, MeasuredModel, Results
from kfade.report.inside import (
    change_by_block,
    change_by_expert,
    predicted_measured,
    stage_memory,
    stage_seconds,
)
from kfade.report.names import method_of, refinement, short
from kfade.report.origins import Comparison, Origin, compare, evaluated_with, origin_of
from kfade.report.values import value_of

RESAMPLES = 400
QUANTILES = np.linspace(0.01, 0.99, 99)
KL_AXIS = Axis("KL(base ‖ edited), nats per token", log=True)


def all_charts(results: Results) -> tuple[list[Chart], list[str]]:
    """(charts that the data allow, for each other chart a line that says what it needs)."""
    runs, sweeps = results.runs, results.sweeps
    made = (
        (
            quality_utility(results.subjects, sweeps),
            "Forget quality against utility: needs kfade eval tofu with a retain model, or a sweep "
            "that measured both.",
        ),
        (
            kl_quantiles(runs),
            "Distribution of KL over completions: needs kfade eval kl of an edited model.",
        ),
        (
            kl_forgetting(runs, sweeps),
            "KL against forgetting: needs a run of kfade unlearn or baseline, or a sweep.",
        ),
        (kl_seconds(runs, sweeps), "KL against time: needs two runs, or a sweep."),
        (
            predicted_measured(runs),
            "Predicted against measured KL: needs a run of kfade unlearn.",
        ),
        (change_by_block(runs), "Where the update lies: needs a run of kfade unlearn."),
        (change_by_expert(runs), None),  # of mixtures only
        (stage_seconds(runs), "Seconds by stage: needs a run."),
        (stage_memory(runs), "Memory by stage: needs a run."),
    )
    charts = [chart for chart, _ in made if chart is not None]
    missing = [needs for chart, needs in made if chart is None and needs is not None]
    attacks = [chart for attack in results.attacks for chart in attack_curves(attack)]
    if not attacks:
        missing.append("Attack curves: need the folder of a kfade attack.")
    return charts + attacks, missing


class _Marks:
    """The points of a scatter chart, collected by their result and the name of their series."""

    def __init__(self) -> None:
        self.points: dict[tuple[str, str], list[tuple[float, float, str]]] = defaultdict(list)
        self.origins: dict[str, Origin] = {}
        """What each result that has points was made with."""
        self.references: list[str] = []
        """Names of the series that are drawn in grey."""

    def __len__(self) -> int:
        return sum(map(len, self.points.values()))

    def add(self, result: str, series: str, x: float | None, y: float | None, label: str) -> None:
        """Add one point of a result, unless a coordinate was not measured."""
        if x is not None and y is not None:
            self.points[result, series].append((x, y, label))

    def made_with(self, result: str, origin: Origin) -> None:
        """Record what a result was made with; one without is not compared with the others."""
        if any(name == result for name, _ in self.points):
            self.origins[result] = origin

    def add_sweeps(self, sweeps: Sequence[Log], x: str, y: str) -> None:
        """Add the points of sweeps, by the keys of their coordinates."""
        for sweep in sweeps:
            for item, point in sweep.log.items.items():
                label = point_label(item, point)
                self.add(sweep.name, series_name(point), point.get(x), point.get(y), label)
            self.made_with(sweep.name, origin_of(sweep))

    def chart(self, key: str, title: str, caption: str, x: Axis, y: Axis) -> Chart:
        """The chart, with a note if its results were not made with the same model and data."""
        comparison = compare(self.origins)
        return Chart(key, title, caption, x, y, self._series(comparison), comparison.note)

    def _series(self, comparison: Comparison) -> tuple[Series, ...]:
        """One series a name and group of results, its points in order of x."""
        merged: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
        for (result, name), points in self.points.items():
            group = comparison.groups.get(result)
            merged[f"{name}, {group}" if group else name] += points
        made = []
        coloured = [name for name in merged if name not in self.references]
        for name, points in merged.items():
            x, y, labels = zip(*sorted(points), strict=True)
            is_reference = name in self.references
            symbol = (self.references if is_reference else coloured).index(name)
            colour = None if is_reference else symbol
            made.append(Series(name, x, y, "marks", colour, symbol, labels=labels))
        return tuple(made)


def quality_utility(subjects: Sequence[MeasuredModel], sweeps: Sequence[Log]) -> Chart | None:
    """TOFU's forget quality against model utility, one mark a run or sweep point (paper, Fig. 1).

    Series by method; a model that is not a run, such as the retain model, is grey.
    """
    marks = _Marks()
    for subject in subjects:
        for tofu in subject.of("tofu"):
            utility = value_of(tofu.aggregate.get("model_utility"))
            quality = value_of(tofu.aggregate.get("forget_quality"))
            if utility is None or quality is None:
                continue
            name = method_of(subject)
            marks.add(subject.name, name, utility.value, quality.value, subject.name)
            if subject.kind == "run":
                origin = evaluated_with(subject, tofu, "questions", "data_sha256")
                marks.made_with(subject.name, origin)
            elif name not in marks.references:
                marks.references.append(name)
    marks.add_sweeps(sweeps, "model_utility", "forget_quality")
    if not len(marks):
        return None
    return marks.chart(
        "forget-quality",
        "Forget quality against model utility",
        "One mark for each method and step size. Forget quality: the p-value of a "
        "Kolmogorov–Smirnov test between the truth ratios of this model and of one that never saw "
        "the forget set; 0.05 and less is told apart from it. Up and to the right is better.",
        Axis("model utility"),
        Axis("forget quality (p-value)", log=True),
    )


def series_name(point: Mapping[str, Any]) -> str:
    """A sweep point's method, with estimator, objective and refinement where it has them."""
    refined = refinement((point.get("settings") or {}).get("refine"))
    parts = (point.get("method"), point.get("estimator"), point.get("objective"), refined)
    return ", ".join(str(part) for part in parts if part)


def point_label(item: str, point: Mapping[str, Any]) -> str:
    """The settings that a sweep varied, at one of its points; the point's id if it names none."""
    settings = point.get("settings") or {}
    return ", ".join(f"{k} {short(v)}" for k, v in settings.items()) or item


def kl_quantiles(runs: Sequence[MeasuredModel], *, seed: int = 0) -> Chart | None:
    """Quantiles of KL over completions, with 95 % bootstrap bands (paper, Fig. 2)."""
    series = []
    origins: dict[str, Origin] = {}
    for colour, run in enumerate(runs):
        for number, kl in enumerate(run.of("kl")):
            values = np.array([item["kl"] for item in kl.log.items.values()])
            if not len(values):
                continue

            def quantiles(chosen: np.ndarray, values: np.ndarray = values) -> np.ndarray:
                return np.quantile(values[chosen], QUANTILES)

            name = run.name_of(kl)
            origins[name] = evaluated_with(run, kl, "completions", "completions_sha256")
            band = bootstrap(quantiles, len(values), seed=seed, resamples=RESAMPLES)
            series.append(
                Series(
                    name,
                    tuple(100 * QUANTILES),
                    tuple(point["value"] for point in band),
                    "line",
                    colour,
                    dashed=number > 0,
                    low=tuple(point["low"] for point in band),
                    high=tuple(point["high"] for point in band),
                )
            )
    if not series:
        return None
    return Chart(
        "kl-quantiles",
        "How KL is distributed over completions",
        "A point (q, v): q % of the completions have a mean KL of at most v. Bands: 95 %, from "
        f"{RESAMPLES} resamples of the completions.",
        Axis("share of completions, %"),
        KL_AXIS,
        tuple(series),
        compare(origins).note,
    )


def kl_forgetting(runs: Sequence[MeasuredModel], sweeps: Sequence[Log]) -> Chart | None:
    """Retain KL against the loss on the forget set, a series an estimator (paper, Fig. 3 left).

    A run gives a mark for each step and each trial of a step's size; a baseline, for each
    measurement during its training.
    """
    marks = _Marks()
    for run in runs:
        name = method_of(run)
        for number, step in enumerate(run.metrics.get("steps", []), start=1):
            label = f"{run.name}, step {number}"
            marks.add(run.name, name, step["forget_loss_after"], step["retain_kl"], label)
            for trial in step.get("probes", [])[:-1]:  # the last one is the step itself
                tried = f"{label}, trial α {short(trial['alpha'])}"
                marks.add(run.name, name, trial["forget_loss"], trial["retain_kl"], tried)
        for row in run.metrics.get("curve", []):
            if row["step"]:  # before the first, the model is the base model: a KL of 0
                label = f"{run.name}, step {row['step']}"
                marks.add(run.name, name, row["forget_loss"], row["retain_kl"], label)
        marks.made_with(run.name, origin_of(run))
    marks.add_sweeps(sweeps, "forget_loss", "retain_kl")
    if not len(marks):
        return None
    return marks.chart(
        "kl-forgetting",
        "What forgetting costs elsewhere",
        "KL on held-out retain data against the loss on the forget set: steps, trials of their "
        "sizes, a baseline's training, points of sweeps. At equal forgetting, lower is better.",
        Axis("loss on the forget set, nats per token"),
        KL_AXIS,
    )


def kl_seconds(runs: Sequence[MeasuredModel], sweeps: Sequence[Log]) -> Chart | None:
    """Retain KL against the time taken, a series an estimator (paper, Fig. 3 right).

    None with fewer than two marks.
    """
    marks = _Marks()
    for run in runs:
        loss = run.metrics.get("forget_loss", {}).get("after")
        label = run.name if loss is None else f"{run.name}, forget loss {short(loss)}"
        seconds = run.metrics.get("seconds", {}).get("total")
        marks.add(run.name, method_of(run), seconds, run.metrics.get("retain_kl"), label)
        marks.made_with(run.name, origin_of(run))
    marks.add_sweeps(sweeps, "seconds", "retain_kl")
    if len(marks) < 2:
        return None
    return marks.chart(
        "kl-seconds",
        "What it costs in time",
        "KL on held-out retain data against all the time taken. Compare at equal forgetting: point "
        "at a mark to see how much it forgot.",
        Axis("seconds", log=True),
        KL_AXIS,
    )


def attack_curves(attack: Log) -> list[Chart]:
    """Each metric over the steps of fine-tuning, by data; dashed: re-applied (paper, Fig. 4)."""
    rows = sorted(attack.log.items.values(), key=lambda row: row["step"])
    data = dict.fromkeys(row["data"] for row in attack.log.items.values())
    metrics = dict.fromkeys(name for row in attack.log.items.values() for name in row["values"])
    charts = []
    for metric in metrics:
        measured = [row for row in rows if metric in row["values"]]
        series = []
        for colour, source in enumerate(data):
            for state in ("attacked", "reapplied"):
                own = [row for row in measured if (row["data"], row["state"]) == (source, state)]
                if own:
                    series.append(_attack_series(own, metric, colour))
        base = attack.log.header.get("base", {}).get(metric)
        if base is not None:
            ends = (rows[0]["step"], rows[-1]["step"])
            series.append(
                Series("before unlearning", ends, (base, base), "line", None, dashed=True)
            )
        title = metric.replace("_", " ")
        charts.append(
            Chart(
                f"attack-{slug(attack.name)}-{slug(metric)}",
                f"Attack by fine-tuning: {title}",
                "The unlearned model fine-tuned on three kinds of data; dashed: the update added "
                "again to what came out. Near the grey line, it knows again.",
                Axis("steps of fine-tuning"),
                Axis(title),
                tuple(series),
            )
        )
    return charts


def _attack_series(rows: Sequence[Mapping[str, Any]], metric: str, colour: int) -> Series:
    """The measurements of one kind of data in one state, with intervals if all rows have them."""
    source, state = rows[0]["data"], rows[0]["state"]
    intervals = [row.get("intervals", {}).get(metric) for row in rows]
    known = all(interval is not None for interval in intervals)
    return Series(
        f"{source}, {state}",
        tuple(row["step"] for row in rows),
        tuple(row["values"][metric] for row in rows),
        "line and marks",
        colour,
        colour,
        dashed=state == "reapplied",
        low=tuple(low for low, _ in intervals) if known else (),
        high=tuple(high for _, high in intervals) if known else (),
    )


def slug(text: str) -> str:
    """A name for files and anchors."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
