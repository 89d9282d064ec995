"""The numbers of results, named: what each is, its unit, its formula, and which way is better.

A figure in an aggregate is a number, or ``{"value"}`` with ``low`` and ``high``, the ends of a 95 %
interval, or with ``standard_error``, which makes one: value ± 1.96 standard errors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from kfade.evaluate.tofu_read import log_of
from kfade.evaluate.uncertainty import standard_error
from kfade.report import metrics
from kfade.report.before import before_columns
from kfade.report.data import Measured, MeasuredModel, Results
from kfade.report.metrics import GROUPS, PLAIN, SHARE, Group, Metric
from kfade.report.names import set_name

SIGMAS = 1.96  # a normal 95 % interval, in standard errors


@dataclass(frozen=True)
class Value:
    """A number, with the ends of its 95 % interval and the size of the sample where known."""

    value: float
    low: float | None = None
    high: float | None = None
    count: int | None = None


@dataclass(frozen=True)
class Row:
    """One metric; its values by the key of the column, see :mod:`kfade.report.before`."""

    metric: Metric
    values: dict[str, Value] = field(default_factory=dict)


def headline(results: Results) -> list[Row]:
    """The rows of the headline table by group, in a group in the order in which they are found."""
    rows: dict[tuple[Group, str, str], Row] = {}
    for subject in sorted(results.subjects, key=lambda subject: subject.kind != "run"):
        for key, metric, value in subject_values(subject):
            row = rows.setdefault((metric.group, metric.name, key), Row(metric))
            row.values.setdefault(subject.name, value)
    before = before_columns(results)
    for run in results.runs:
        if run.name not in before:
            continue
        for row in rows.values():
            known = row.metric.before
            if row.metric == metrics.FORGET_LOSS:
                known = run.metrics.get("forget_loss", {}).get("before")
            if known is not None and run.name in row.values:
                row.values.setdefault(before[run.name], Value(known))
    return sorted(rows.values(), key=lambda row: GROUPS.index(row.metric.group))


def subject_values(subject: MeasuredModel) -> Iterator[tuple[str, Metric, Value]]:
    """(key, metric, value) of one subject; the key tells metrics of one name apart."""
    own, tokens = subject.metrics, subject.metrics.get("tokens", {})
    if loss := own.get("forget_loss"):
        yield "", metrics.FORGET_LOSS, Value(loss["after"], count=tokens.get("forget"))
    if "retain_kl" in own:
        yield "", metrics.RETAIN_KL, Value(own["retain_kl"], count=tokens.get("held_out"))
    for measured in subject.measured:
        for metric, value in measured_values(measured):
            yield measured.what, metric, value


def value_of(entry: Any, count: int | None = None) -> Value | None:
    """A figure as the logs write it; None where it is not a number."""
    figure = entry if isinstance(entry, Mapping) else {"value": entry}
    value, error = figure.get("value"), figure.get("standard_error")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if error:  # 0 of a single item, or of items that are all alike, gives no interval
        return Value(value, value - SIGMAS * error, value + SIGMAS * error, count)
    return Value(value, figure.get("low"), figure.get("high"), count)


def wilson(share: float, count: int) -> tuple[float, float]:
    """Ends of Wilson's 95 % interval of a share p of n; it has a width at p = 0 and p = 1 too.

    (p + z²/2n ± z √(p(1 − p)/n + z²/4n²)) / (1 + z²/n)
    """
    square = SIGMAS**2 / count
    half = SIGMAS * math.sqrt(share * (1 - share) / count + square / (4 * count))
    middle = share + square / 2
    return (middle - half) / (1 + square), (middle + half) / (1 + square)


def measured_values(measured: Measured) -> Iterator[tuple[Metric, Value]]:
    """The figures of one evaluation for the headline table."""
    by_benchmark = {
        "kl": _kl,
        "tofu": _tofu,
        "choice": _choice,
        "memorisation": _memorisation,
        "mt-bench": _mt_bench,
        "quantisation": _quantisation,
    }
    read = by_benchmark.get(measured.benchmark, _unknown)
    rounding = measured.log.header.get("quantise")
    for metric, value in read(measured):
        if value is not None:
            name = f"{metric.name}, in {rounding}" if rounding else metric.name
            yield replace(metric, name=name), value


Found = Iterator[tuple[Metric, Value | None]]


def _kl(measured: Measured) -> Found:
    figures = measured.aggregate
    count = figures.get("completions")
    yield metrics.BENIGN_KL, value_of(figures.get("kl_per_token"), count)
    yield metrics.KL_TAIL, value_of(figures.get("quantiles", {}).get("95"), count)


def _tofu(measured: Measured) -> Found:
    figures = measured.aggregate
    count = figures.get("items", {}).get("forget")
    yield metrics.FORGET_QUALITY, value_of(figures.get("forget_quality"), count)
    items = log_of(measured.log.items, str(measured.path)).sets["forget"].values()
    for key, (name, formula, attribute) in metrics.TOFU_FORGET.items():
        metric = Metric("Forgetting", f"TOFU forget set: {name}", PLAIN, formula)
        error = standard_error([getattr(item, attribute) for item in items])
        value = {"value": figures.get("forget", {}).get(key), "standard_error": error}
        yield metric, value_of(value, count)
    yield metrics.MODEL_UTILITY, value_of(figures.get("model_utility"))


def _choice(measured: Measured) -> Found:
    figures = measured.aggregate
    for name, own in figures.get("sets", {}).items():
        yield from _accuracies(own, name)
    yield from _accuracies(figures, set_name(measured))
    for task, own in figures.get("tasks", {}).items():
        for key, entry in own.items():
            if key in metrics.ACCURACIES:
                yield _accuracy(f"{task}: {key}", metrics.LM_EVAL), value_of(entry)
            else:
                yield Metric("Further", f"{task}: {key}", PLAIN, metrics.LM_EVAL), value_of(entry)


def _accuracies(figures: Mapping[str, Any], name: str) -> Found:
    """Of one set of questions, by each way to score an answer."""
    for scoring, (words, formula) in metrics.SCORINGS.items():
        entry = value_of(figures.get("accuracy", {}).get(scoring), figures.get("questions"))
        if entry is not None and entry.count:
            low, high = wilson(entry.value, entry.count)
            entry = replace(entry, low=low, high=high)
        chance = figures.get("chance")
        by_chance = f" By chance: {100 * chance:.0f} %." if chance is not None else ""
        yield _accuracy(f"{name}: accuracy by {words}", formula + by_chance), entry


def _accuracy(name: str, formula: str) -> Metric:
    """The metric of an accuracy: of forgetting or of utility, as the name of the set tells."""
    if any(word in name.lower() for word in metrics.FORGET_WORDS):
        told = (
            f" Counted as forgetting since its name has one of: {', '.join(metrics.FORGET_WORDS)}."
        )
        return Metric("Forgetting", name, SHARE, formula + told, "lower")
    return Metric("Utility", name, SHARE, formula, "higher")


def _memorisation(measured: Measured) -> Found:
    figures, name = measured.aggregate, set_name(measured)
    members = figures.get("members", {})
    for key, (words, formula) in metrics.MEMORISATION.items():
        metric = Metric("Forgetting", f"{name}: {words}", PLAIN, formula)
        yield metric, value_of(members.get(key), members.get("texts"))
    for score, entry in figures.get("auc", {}).items():
        words = score.replace("_plus_plus", "++").replace("min_k", "Min-K").replace("_", " ")
        metric = Metric("Forgetting", f"{name}: membership by {words}, AUC", PLAIN, metrics.AUC)
        yield metric, value_of(entry, members.get("texts"))


def _mt_bench(measured: Measured) -> Found:
    figures = measured.aggregate
    error = figures.get("standard_error")  # over runs, where there were several
    if error is None:
        error = figures.get("standard_error_questions")
    score = {"value": figures.get("score"), "standard_error": error}
    yield metrics.MT_BENCH, value_of(score, figures.get("judged"))


def _quantisation(measured: Measured) -> Found:
    for word, own in measured.aggregate.get("rounding", {}).items():
        metric = Metric("Further", f"update left in {word}", SHARE, metrics.SURVIVING, "higher")
        yield metric, value_of(own.get("surviving"))


def _unknown(measured: Measured) -> Found:
    """Every figure of an evaluation by a benchmark that this file does not know."""
    benchmark, name = measured.benchmark, set_name(measured)
    front = benchmark if name == benchmark else f"{benchmark}, {name}"
    for path, value in _leaves(measured.aggregate):
        yield Metric("Further", f"{front}: {' '.join(path).replace('_', ' ')}", PLAIN, ""), value


def _leaves(
    figures: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Value]]:
    for key, entry in figures.items():
        value = value_of(entry)
        if value is not None:
            yield (*path, key), value
        elif isinstance(entry, Mapping):
            yield from _leaves(entry, (*path, key))
