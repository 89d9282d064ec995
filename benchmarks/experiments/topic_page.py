"""Topic-small's tables, claims and figures on the results' page, subject by subject."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lab import figures
from lab.intervals import Texts, interval, mean
from lab.pieces import Results
from lab.records import NOT_RUN, Record, number, table
from lab.rows import (
    BASELINES,
    ESTIMATORS,
    MOST_OF_PAPER,
    Claim,
    Row,
    bounded,
    quotient,
    request_seconds,
    row_of,
    share_claim,
    variant_setting,
    variant_title,
    with_interval,
    yes,
)
from lab.tuning import DEFAULT, VARIANTS, chosen
from topic_data import SUBJECTS
from topic_small import (
    BAND_STEPS,
    DAMPINGS,
    OURS_ON_BAND,
    PAPER_DAMPING,
    PAPER_ON_BAND,
    STEPPED,
    best_band,
)

TEXTS = {"retained": "other retain text", "completions": "Alpaca"}
MOST = {"retained": 0.2, "completions": 0.1}  # of the best baseline's KL
Subjects = Mapping[str, Results]
"""Results by the subject that is forgotten."""


def slots(subjects: Subjects) -> dict[str, Any]:
    """What the template says of Topic-small, by the names of its slots."""
    bases = (
        f"{subject} {results['base']['topic']['probability']:.2f}"
        for subject, results in subjects.items()
        if "base" in results
    )
    return {
        "topic_bases": ", ".join(bases) or NOT_RUN,
        "topic_dampings": ", ".join(f"{damping:g}" for damping in DAMPINGS),
        "topic_methods": by_subject(subjects, methods_and_figure),
        "topic_claims": table("claim | measured | holds?", claims(subjects)),
        "topic_tuning": by_subject(subjects, lambda _, results: tuning_table(results)),
    }


def by_subject(subjects: Subjects, write: Callable[[str, Results], str]) -> str:
    """A part of the page for each subject, under its name."""
    parts = (f"**{name.capitalize()}**\n\n{write(name, own)}" for name, own in subjects.items())
    return "\n\n".join(parts) or NOT_RUN


def draw(subjects: Subjects, images: Path) -> None:
    """The figure of each subject of which something was reported."""
    for subject, results in subjects.items():
        rows = [row for row in rows_of(results) if is_reported(row)]
        if rows:
            kls = {row.title: interval(row.told["completions"]) for row in rows}
            figures.draw_specificity(kls, images / figure_of(subject))


def figure_of(subject: str) -> str:
    return f"topic_small_{subject}.svg"


def methods_and_figure(subject: str, results: Results) -> str:
    """The table of a subject, and its figure if something was reported."""
    shown = methods_table(results)
    if any(map(is_reported, rows_of(results))):
        shown += f"\n\n![KL on benign completions](images/{figure_of(subject)})"
    return shown


def rows_of(results: Results) -> list[Row]:
    """All rows that were tuned."""
    rows = []
    ours = {method: f"K-FADE, {title}" for method, title in ESTIMATORS.items()}
    ours[DEFAULT] = variant_title(DEFAULT, VARIANTS[DEFAULT])
    kinds = {DEFAULT: "KL"} | dict.fromkeys(ESTIMATORS, "damping")
    for method, title in {**ours, **BASELINES}.items():
        best = chosen(results, method)
        if best is not None:
            setting = f"{kinds.get(method, 'learning rate')} {best:g}"
            rows.append(row_of(results, method, title, setting, f"{method} {best:g}"))
        rows += [row_of(results, row, *texts, row) for row, *texts in other_ways(results, method)]
    return [row for row in rows if row.tuned]


def other_ways(results: Results, estimator: str) -> Iterator[tuple[str, str, str]]:
    """(row, title, setting) of K-FADE by that estimator, other than one step on all blocks."""
    sampled = f"sampled labels, damping {PAPER_DAMPING:g} (absolute)"
    if estimator == "ekfac":
        yield "paper", "K-FADE, the paper's recipe", f"{sampled}, one step on all blocks"
    for row, options in STEPPED.items():
        if options["estimator"] == estimator:
            setting = variant_setting(options, results.get(f"tune {row}", {}))
            yield row, variant_title(row, options), setting
    best = best_band(results)
    if estimator == "kfac" and best is not None:
        setting = f"damping {chosen(results, 'kfac'):g}"
        steps = f"blocks {best}, {BAND_STEPS} steps, each with its fit"
        yield f"band {best}", f"K-FADE, K-FAC, blocks {best}", setting
        yield OURS_ON_BAND, f"K-FADE, K-FAC, {steps}", setting
        yield PAPER_ON_BAND, f"K-FADE, the paper's recipe, {steps}", sampled


def is_reported(row: Row) -> bool:
    """Whether the row was measured for the table, and reached the target there."""
    return bool(row.told) and "failure" not in row.told


def methods_table(results: Results) -> str:
    lines = []
    if "base" in results:
        figures_shown = accuracies(results["base"])
        lines.append(["base model", "", *figures_shown, "0", "0", "0", "", "`base`"])
    for row in rows_of(results):
        if is_reported(row):
            kls = [with_interval(interval(row.told[name])) for name in TEXTS]
            cells = [*accuracies(row.told), number(row.told["kl"]), *kls]
        else:
            failure = (row.told or row.tuned).get("failure", NOT_RUN)
            cells = [failure, "", "", NOT_RUN, "", ""]
        seconds = number(request_seconds(row.tuned), ".0f")
        only = f"`'tune {row.method}*' 'report {row.method}*'`"
        lines.append([row.title, row.setting, *cells, seconds, only])
    kls = " | ".join(f"KL, {title}" for title in TEXTS.values())
    heads = f"method | setting | subject, % | other subjects, % | general, % | KL, held out | {kls}"
    return table(f"{heads} | seconds | `--only`", lines)


def accuracies(told: Record) -> list[str]:
    return [
        f"{100 * told[name]['accuracy']:.0f} ± {100 * told[name]['standard_error']:.0f}"
        for name in ("topic", "sisters", "general")
    ]


def claims(subjects: Subjects) -> Iterator[Claim]:
    """All claims, of rows that were measured."""
    for subject in SUBJECTS:
        results = subjects.get(subject, {})
        by = {row.method: row for row in rows_of(results) if is_reported(row)}
        for claim, *found in subject_claims(by):
            yield [f"{subject}: {claim}", *found]


def subject_claims(by: Mapping[str, Row]) -> Iterator[Claim]:
    """The default against the best baseline and the best way of the paper's; and the estimators."""
    ours = by.get(DEFAULT)
    baselines = [row for name, row in by.items() if name in BASELINES]
    papers = [by[name] for name in ("paper", PAPER_ON_BAND) if name in by]
    for name, title in TEXTS.items():
        for named, others, most in (
            ("best baseline", baselines, MOST[name]),
            ("better of the paper's recipes", papers, MOST_OF_PAPER),
        ):
            rival = min(others, key=lambda row, name=name: mean(row.told[name]), default=None)
            claim = f"KL on {title} at most {most:g} × that of the {named}"
            if ours is None or rival is None:
                yield share_claim(claim, [None], most)
                continue
            share = interval(ours.told[name], rival.told[name])
            claim, measured, holds = share_claim(claim, [share], most)
            yield [claim, f"{measured} ({rival.title})", holds]
    yield kept_claim(baselines, ours)
    for name, bound in (("diagonal", 5.0), ("identity", 20.0)):
        claim = f"{name} needs at least {bound:g} × K-FAC's KL"
        kls = [kl_of(by.get(fit), "completions") for fit in (name, "kfac")]
        yield bounded(claim, quotient(*kls), least=bound)


def kept_claim(others: Sequence[Row], ours: Row | None) -> Claim:
    """No baseline answers more of the other questions, beyond what chance may do."""
    claim = "no baseline answers more of the other questions (paired, 95 %)"
    if ours is None or not others:
        return [claim, NOT_RUN, ""]
    leads = []
    for row in others:
        for kind in ("sisters", "general"):
            lead, half = paired(*(own.told[kind]["correct"] for own in (row, ours)))
            leads.append((lead - half, f"{row.title}, {kind}: {lead:+.0f} ± {half:.0f} %"))
    more = [text for surplus, text in leads if surplus > 0]
    return [claim, "; ".join(more) or f"at most {max(leads)[1]}", yes(not more)]


def paired(one: str, other: str) -> tuple[float, float]:
    """Lead of ``one`` over ``other`` in right answers to the same questions, in per cent, and half
    of its 95 % interval: 1.96 standard errors of the mean difference."""
    differences = [int(a) - int(b) for a, b in zip(one, other, strict=True)]
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return 100 * statistics.fmean(differences), 196 * error


def kl_of(row: Row | None, name: str) -> float | None:
    """Of a row that was measured."""
    own: Texts | None = row.told[name] if row is not None else None
    return mean(own) if own is not None else None


def tuning_table(results: Results) -> str:
    lines, single = [], (*STEPPED, "paper", OURS_ON_BAND, PAPER_ON_BAND)
    for name, told in results.items():
        if name.startswith("tune "):
            row, value, mark = name.removeprefix("tune "), "", ""
            if row not in single:
                row, _, value = row.rpartition(" ")
                best = best_band(results) if row == "band" else f"{chosen(results, row):g}"
                mark = "chosen" if value == best else ""
            kl = told.get("failure") or number(told["kl"])
            lines.append([row, value, kl, mark, f"`'{name}'`"])
    return table("method | value | KL | choice | `--only`", lines)
