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
from kfade.report.data import Measured, MeasuredModel, Results
from kfade.report.metrics import (
    ACCURACIES,
    AUC,
    BENIGN_KL,
    FORGET_LOSS,
    FORGET_QUALITY,
    FORGET_WORDS,
    GROUPS,
    KL_TAIL,
    LM_EVAL,
    MEMORISATION,
    MODEL_UTILITY,
    MT_BENCH,
    PLAIN,
    RETAIN_KL,
    SCORINGS,
    SHARE,
    SURVIVING,
    TOFU_FORGET,
    Group,
    Metric,
)
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
    """One metric of every subject that has it, by the subject's name."""

    metric: Metric
    values: dict[str, Value] = field(default_factory=dict)


def headline(results: Results) -> list[Row]:
    """The rows of the headline table, in order of group, then as first met."""
    rows: dict[tuple[Group, str, str], Row] = {}
    for subject in sorted(results.subjects, key=lambda subject: subject.kind != "run"):
        for key, metric, value in subject_values(subject):
            row = rows.setdefault((metric.group, metric.name, key), Row(metric))
            row.values.setdefault(subject.name, value)
    for run in results.runs:
        base = results.base_of(run)
        loss = run.metrics.get("forget_loss")
        own = rows.get(("Forgetting", FORGET_LOSS.name, ""))
        if base and loss and own:
            own.values.setdefault(base.name, Value(loss["before"]))
    return sorted(rows.values(), key=lambda row: GROUPS.index(row.metric.group))


def subject_values(subject: MeasuredModel) -> Iterator[tuple[str, Metric, Value]]:
    """(what tells apart metrics of one name, metric, value) of one subject."""
    tokens = subject.metrics.get("tokens", {})
    loss = subject.metrics.get("forget_loss")
    if loss:
        yield "", FORGET_LOSS, Value(loss["after"], count=tokens.get("forget"))
    if "retain_kl" in subject.metrics:
        kl = subject.metrics["retain_kl"]
        yield "", RETAIN_KL, Value(kl, count=tokens.get("held_out"))
    for measured in subject.measured:
        for metric, value in measured_values(measured):
            yield measured.what, metric, value


def value_of(entry: Any, count: int | None = None) -> Value | None:
    """A figure as the logs write it; None where it is no number."""
    if isinstance(entry, Mapping):
        value, error = entry.get("value"), entry.get("standard_error")
        if not isinstance(value, int | float):
            return None
        if error:  # of none at all, nothing can be said: one item, or all alike
            return Value(value, value - SIGMAS * error, value + SIGMAS * error, count)
        return Value(value, entry.get("low"), entry.get("high"), count)
    if isinstance(entry, bool) or not isinstance(entry, int | float):
        return None
    return Value(entry, count=count)


def wilson(share: float, count: int) -> tuple[float, float]:
    """Ends of Wilson's 95 % interval of a share; not of no width where it is 0 or 1.

    (p + z²/2n ± z √(p(1 − p)/n + z²/4n²)) / (1 + z²/n)
    """
    square = SIGMAS**2 / count
    half = SIGMAS * math.sqrt(share * (1 - share) / count + square / (4 * count))
    middle = share + square / 2
    return (middle - half) / (1 + square), (middle + half) / (1 + square)


def measured_values(measured: Measured) -> Iterator[tuple[Metric, Value]]:
    """The figures of one evaluation that a person looks at first."""
    figures = measured.aggregate
    match measured.benchmark:
        case "kl":
            found = _kl(figures)
        case "tofu":
            found = _tofu(measured)
        case "choice":
            found = _choice(figures, set_name(measured))
        case "memorisation":
            found = _memorisation(figures, set_name(measured))
        case "mt-bench":
            found = _mt_bench(figures)
        case "quantisation":
            found = _quantisation(figures)
        case other:
            found = _any(figures, other, set_name(measured))
    rounding = measured.log.header.get("quantise")
    for metric, value in found:
        if value is not None:
            name = f"{metric.name}, in {rounding}" if rounding else metric.name
            yield replace(metric, name=name), value


Found = Iterator[tuple[Metric, Value | None]]


def _kl(figures: Mapping[str, Any]) -> Found:
    count = figures.get("completions")
    yield BENIGN_KL, value_of(figures.get("kl_per_token"), count)
    yield KL_TAIL, value_of(figures.get("quantiles", {}).get("95"), count)


def _tofu(measured: Measured) -> Found:
    figures = measured.aggregate
    count = figures.get("items", {}).get("forget")
    yield FORGET_QUALITY, value_of(figures.get("forget_quality"), count)
    own = log_of(measured.log.items, str(measured.path)).sets["forget"].values()
    for key, (name, formula, of_item) in TOFU_FORGET.items():
        metric = Metric("Forgetting", f"TOFU forget set: {name}", PLAIN, formula)
        error = standard_error([getattr(item, of_item) for item in own])
        value = {"value": figures.get("forget", {}).get(key), "standard_error": error}
        yield metric, value_of(value, count)
    yield MODEL_UTILITY, value_of(figures.get("model_utility"))


def _choice(figures: Mapping[str, Any], name: str) -> Found:
    for own_name, own in figures.get("sets", {}).items():
        yield from _choice(own, own_name)
    for scoring, (words, formula) in SCORINGS.items():
        entry = value_of(figures.get("accuracy", {}).get(scoring), figures.get("questions"))
        if entry is not None and entry.count:
            low, high = wilson(entry.value, entry.count)
            entry = replace(entry, low=low, high=high)
        chance = figures.get("chance")
        by_chance = f" By chance: {100 * chance:.0f} %." if chance is not None else ""
        yield _accuracy(f"{name}: accuracy by {words}", formula + by_chance), entry
    for task, own in figures.get("tasks", {}).items():
        for key, entry in own.items():
            if key in ACCURACIES:
                yield _accuracy(f"{task}: {key}", LM_EVAL), value_of(entry)
            else:
                yield Metric("Further", f"{task}: {key}", PLAIN, LM_EVAL), value_of(entry)


def _accuracy(name: str, formula: str) -> Metric:
    """Of questions on what is to be forgotten, or on anything else; the set's name decides."""
    forgotten = any(word in name.lower() for word in FORGET_WORDS)
    told = f" Counted as forgetting since its name has one of: {', '.join(FORGET_WORDS)}."
    return Metric(
        "Forgetting" if forgotten else "Utility",
        name,
        SHARE,
        formula + (told if forgotten else ""),
        "lower" if forgotten else "higher",
    )


def _memorisation(figures: Mapping[str, Any], name: str) -> Found:
    members = figures.get("members", {})
    for key, (words, formula) in MEMORISATION.items():
        metric = Metric("Forgetting", f"{name}: {words}", PLAIN, formula)
        yield metric, value_of(members.get(key), members.get("texts"))
    for score, entry in figures.get("auc", {}).items():
        words = score.replace("_plus_plus", "++").replace("min_k", "Min-K").replace("_", " ")
        metric = Metric("Forgetting", f"{name}: membership by {words}, AUC", PLAIN, AUC)
        yield metric, value_of(entry, members.get("texts"))


def _mt_bench(figures: Mapping[str, Any]) -> Found:
    error = figures.get("standard_error")  # over runs, where there were several
    if error is None:
        error = figures.get("standard_error_questions")
    score = {"value": figures.get("score"), "standard_error": error}
    yield MT_BENCH, value_of(score, figures.get("judged"))


def _quantisation(figures: Mapping[str, Any]) -> Found:
    for word, own in figures.get("rounding", {}).items():
        metric = Metric("Further", f"update left in {word}", SHARE, SURVIVING, "higher")
        yield metric, value_of(own.get("surviving"))


def _any(figures: Mapping[str, Any], benchmark: str, name: str) -> Found:
    """Every figure of an evaluation that has no rows of its own here."""
    front = benchmark if name == benchmark else f"{benchmark}, {name}"
    for path, value in _leaves(figures):
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
