"""From results to the paper's charts: pure functions, each None where its data are missing."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from kfade.evaluate.uncertainty import bootstrap
from kfade.report.charts import Axis, Chart, Series
from kfade.report.data import Log, MeasuredModel, Results
from kfade.report.inside import change_by_block, predicted_measured, stage_memory, stage_seconds
from kfade.report.names import method_of, refinement, short
from kfade.report.values import value_of

RESAMPLES = 400
QUANTILES = np.linspace(0.01, 0.99, 99)
KL_AXIS = "KL(base ‖ edited), nats per token"


def all_charts(results: Results) -> tuple[list[Chart], list[str]]:
    """Every chart that the data allow, and a line for each one that they do not."""
    runs, sweeps = results.runs, results.sweeps
    charts: list[Chart] = []
    missing: list[str] = []
    for made, otherwise in (
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
        (
            change_by_block(runs),
            "Where the update lies: needs a run of kfade unlearn.",
        ),
        (stage_seconds(runs), "Seconds by stage: needs a run."),
        (stage_memory(runs), "Memory by stage: needs a run."),
    ):
        if made is None:
            missing.append(otherwise)
        else:
            charts.append(made)
    attacks = [chart for attack in results.attacks for chart in attack_curves(attack)]
    if not attacks:
        missing.append("Attack curves: need the folder of a kfade attack.")
    return charts + attacks, missing


def quality_utility(subjects: Sequence[MeasuredModel], sweeps: Sequence[Log]) -> Chart | None:
    """TOFU's forget quality against model utility, one mark a run or sweep point (paper, Fig. 1).

    Series by method; a model that is no run (the retain model, say) is grey.
    """
    marks: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
    grey = []
    for subject in subjects:
        for tofu in subject.of("tofu"):
            utility = value_of(tofu.aggregate.get("model_utility"))
            quality = value_of(tofu.aggregate.get("forget_quality"))
            if utility is None or quality is None:
                continue
            name = method_of(subject)
            marks[name].append((utility.value, quality.value, subject.name))
            if subject.kind != "run":
                grey.append(name)
    for sweep in sweeps:
        for label, point in sweep.log.items.items():
            if _has(point, "model_utility", "forget_quality"):
                told = point_label(label, point)
                mark = (point["model_utility"], point["forget_quality"], told)
                marks[series_name(point)].append(mark)
    if not marks:
        return None
    return Chart(
        "forget-quality",
        "Forget quality against model utility",
        "One mark for each method and step size. Forget quality: the p-value of a "
        "Kolmogorov–Smirnov test between the truth ratios of this model and of one that never saw "
        "the forget set; 0.05 and less is told apart from it. Up and to the right is better.",
        Axis("model utility"),
        Axis("forget quality (p-value)", log=True),
        _scatter(marks, grey),
    )


def _has(point: Mapping[str, Any], *names: str) -> bool:
    """Whether all of these were measured: null in a log is as good as not there."""
    return all(point.get(name) is not None for name in names)


def _scatter(
    marks: Mapping[str, Sequence[tuple[float, float, str]]], grey: Iterable[str] = ()
) -> tuple[Series, ...]:
    """Marks by series, in order of x."""
    made, grey = [], list(dict.fromkeys(grey))
    coloured = [name for name in marks if name not in grey]
    for name, points in marks.items():
        x, y, labels = zip(*sorted(points), strict=True)
        colour = None if name in grey else coloured.index(name)
        symbol = grey.index(name) if colour is None else colour
        made.append(Series(name, x, y, "marks", colour, symbol, labels=labels))
    return tuple(made)


def series_name(point: Mapping[str, Any]) -> str:
    """A sweep point's method, with estimator, objective and refinement where it has them."""
    refined = refinement((point.get("settings") or {}).get("refine"))
    parts = [*(point.get(part) for part in ("method", "estimator", "objective")), refined]
    return ", ".join(str(part) for part in parts if part)


def point_label(item: str, point: Mapping[str, Any]) -> str:
    """A sweep point in words: what was varied, or its id."""
    settings = point.get("settings") or {}
    return ", ".join(f"{k} {short(v)}" for k, v in settings.items()) or item


def kl_quantiles(runs: Sequence[MeasuredModel], *, seed: int = 0) -> Chart | None:
    """Quantiles of KL over completions, with 95 % bootstrap bands (paper, Fig. 2)."""
    series = []
    for colour, run in enumerate(runs):
        for number, kl in enumerate(run.of("kl")):
            values = np.array([item["kl"] for item in kl.log.items.values()])
            if not len(values):
                continue

            def quantiles(chosen: np.ndarray, values: np.ndarray = values) -> np.ndarray:
                return np.quantile(values[chosen], QUANTILES)

            band = bootstrap(quantiles, len(values), seed=seed, resamples=RESAMPLES)
            series.append(
                Series(
                    run.name if len(run.of("kl")) == 1 else f"{run.name}: {kl.path.name}",
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
        Axis(KL_AXIS, log=True),
        tuple(series),
    )


def kl_forgetting(runs: Sequence[MeasuredModel], sweeps: Sequence[Log]) -> Chart | None:
    """Retain KL against the loss on the forget set, a series an estimator (paper, Fig. 3 left).

    Of a run, its steps and what it tried on the way to each step's size; of a baseline, what was
    measured on the way.
    """
    marks: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
    for run in runs:
        marks[method_of(run)] += _way(run)
    for sweep in sweeps:
        for label, point in sweep.log.items.items():
            if _has(point, "forget_loss", "retain_kl"):
                told = point_label(label, point)
                marks[series_name(point)].append((point["forget_loss"], point["retain_kl"], told))
    marks = {name: points for name, points in marks.items() if points}
    if not marks:
        return None
    return Chart(
        "kl-forgetting",
        "What forgetting costs elsewhere",
        "KL on held-out retain data against the loss on the forget set: steps, trials of their "
        "sizes, a baseline's training, points of sweeps. At equal forgetting, lower is better.",
        Axis("loss on the forget set, nats per token"),
        Axis(KL_AXIS, log=True),
        _scatter(marks),
    )


def _way(run: MeasuredModel) -> list[tuple[float, float, str]]:
    """(forget loss, retain KL, label) of all that was measured while the run was made."""
    marks = []
    for number, step in enumerate(run.metrics.get("steps", []), start=1):
        told = f"{run.name}, step {number}"
        marks.append((step["forget_loss_after"], step["retain_kl"], told))
        for trial in step.get("probes", [])[:-1]:
            tried = f"{told}, trial α {short(trial['alpha'])}"
            marks.append((trial["forget_loss"], trial["retain_kl"], tried))
    for row in run.metrics.get("curve", []):
        if row["step"]:  # before the first, the model is the base model: a KL of 0
            marks.append((row["forget_loss"], row["retain_kl"], f"{run.name}, step {row['step']}"))
    return marks


def kl_seconds(runs: Sequence[MeasuredModel], sweeps: Sequence[Log]) -> Chart | None:
    """Retain KL against the time taken, a series an estimator (paper, Fig. 3 right).

    None with fewer than two marks.
    """
    marks: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
    for run in runs:
        seconds, kl = run.metrics.get("seconds", {}).get("total"), run.metrics.get("retain_kl")
        if seconds is not None and kl is not None:
            forgot = run.metrics.get("forget_loss", {}).get("after")
            told = run.name if forgot is None else f"{run.name}, forget loss {short(forgot)}"
            marks[method_of(run)].append((seconds, kl, told))
    for sweep in sweeps:
        for label, point in sweep.log.items.items():
            if _has(point, "seconds", "retain_kl"):
                told = point_label(label, point)
                marks[series_name(point)].append((point["seconds"], point["retain_kl"], told))
    if sum(map(len, marks.values())) < 2:
        return None
    return Chart(
        "kl-seconds",
        "What it costs in time",
        "KL on held-out retain data against all the time taken. Compare at equal forgetting: point "
        "at a mark to see how much it forgot.",
        Axis("seconds", log=True),
        Axis(KL_AXIS, log=True),
        _scatter(marks),
    )


def attack_curves(attack: Log) -> list[Chart]:
    """Each metric over the steps of fine-tuning, by data; dashed: re-applied (paper, Fig. 4)."""
    rows = list(attack.log.items.values())
    data = list(dict.fromkeys(row["data"] for row in rows))
    metrics = list(dict.fromkeys(name for row in rows for name in row["values"]))
    charts = []
    for metric in metrics:
        series = []
        for colour, one in enumerate(data):
            for state in ("attacked", "reapplied"):
                own = [
                    row
                    for row in rows
                    if (row["data"], row["state"]) == (one, state) and metric in row["values"]
                ]
                if own:
                    series.append(_attack_series(own, metric, colour, f"{one}, {state}"))
        base = attack.log.header.get("base", {}).get(metric)
        if base is not None:
            steps = sorted({row["step"] for row in rows})
            ends = (steps[0], steps[-1])
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


def _attack_series(
    rows: Sequence[Mapping[str, Any]], metric: str, colour: int, name: str
) -> Series:
    rows = sorted(rows, key=lambda row: row["step"])
    ends = [row.get("intervals", {}).get(metric) for row in rows]
    known = all(end is not None for end in ends)
    return Series(
        name,
        tuple(row["step"] for row in rows),
        tuple(row["values"][metric] for row in rows),
        "line and marks",
        colour,
        colour,
        dashed=name.endswith("reapplied"),
        low=tuple(end[0] for end in ends) if known else (),
        high=tuple(end[1] for end in ends) if known else (),
    )


def slug(text: str) -> str:
    """A name for files and anchors."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
