"""Topic-small's tables and figure on the results' page."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lab import figures
from lab.pieces import Results
from lab.records import NOT_RUN, Record, number, table
from lab.rows import (
    BASELINES,
    ESTIMATORS,
    Claim,
    Row,
    affordable,
    against_paper,
    bounded,
    least,
    quotient,
    request_seconds,
    row_of,
    variant_setting,
    variant_title,
    with_fit,
    with_interval,
    yes,
)
from lab.tuning import DEFAULT, DEFAULT_FIT, VARIANTS, chosen
from topic_small import (
    BAND_STEPS,
    DAMPINGS,
    OURS_ON_BAND,
    PAPER_DAMPING,
    PAPER_ON_BAND,
    STEPPED,
    best_band,
)

STEPS_3 = ("steps 3", "steps 3 kfac")  # TOFU-small's best variant, by either estimator
FITS = {"kfac": "kfac", **{row: options["estimator"] for row, options in STEPPED.items()}}
FITS |= {DEFAULT: DEFAULT_FIT, OURS_ON_BAND: "kfac", "paper": "ekfac sampled"}
"""The fit that a row pays for; EK-FAC if it is not named here."""


def slots(results: Results) -> dict[str, Any]:
    """What the template says of Topic-small, by the names of its slots."""
    sizes = results["settings"]
    return {
        "topic_passages": sizes["tune_questions"] + sizes["questions"],
        "topic_dampings": ", ".join(f"{damping:g}" for damping in DAMPINGS),
        "topic_methods": methods_table(results),
        "topic_claims": table("claim | measured | holds?", claims(results)),
        "topic_tuning": tuning_table(results),
    }


def draw(results: Results, images: Path) -> None:
    """The figure."""
    kls = {row.title: kl for row in rows_of(results) if (kl := on_completions(row))}
    figures.draw_specificity(kls, images / "topic_small_kl.svg")


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


def is_reported(row: Row | None) -> bool:
    """Whether the row was measured for the table, and reached the target there."""
    return row is not None and bool(row.told) and "failure" not in row.told


def on_completions(row: Row | None) -> dict[str, float] | None:
    """KL on benign completions with its interval."""
    return row.told["completions"]["kl_per_token"] if row and is_reported(row) else None


def methods_table(results: Results) -> str:
    lines = []
    if "base" in results:
        figures_shown = accuracies(results["base"])
        lines.append(["base model", "", *figures_shown, "0", "0", "0", "", "`base`"])
    for row in rows_of(results):
        kl = on_completions(row)
        if kl:
            kls = [number(row.told["kl"]), number(row.told["retain_kl"]), with_interval(kl)]
            cells = [*accuracies(row.told), *kls]
        else:
            failure = (row.told or row.tuned).get("failure", NOT_RUN)
            cells = [failure, "", "", NOT_RUN, "", ""]
        seconds = number(request_seconds(row.tuned), ".0f")
        only = f"`'tune {row.method}*' 'report {row.method}*'`"
        lines.append([row.title, row.setting, *cells, seconds, only])
    return table(
        "method | setting | astronomy, % | psychology and sociology, % | general, % | "
        "KL, held out | KL, other retain text | KL, Alpaca (95 %) | seconds | `--only`",
        lines,
    )


def accuracies(told: Record) -> list[str]:
    return [
        f"{100 * told[name]['accuracy']:.0f} ± {100 * told[name]['standard_error']:.0f}"
        for name in ("topic", "sisters", "general")
    ]


def claims(results: Results) -> Iterator[Claim]:
    """All claims, of rows that were measured."""
    by = {row.method: row for row in rows_of(results) if is_reported(row)}
    yield from specificity_claims(results, by)
    for name, bound in (("diagonal", 5.0), ("identity", 20.0)):
        claim = f"{name} needs at least {bound:g} × K-FAC's KL"
        yield bounded(claim, kl_ratio(by.get(name), by.get("kfac")), least=bound)
    yield from paper_claims(results, by)


def specificity_claims(results: Results, by: Mapping[str, Row]) -> Iterator[Claim]:
    """K-FADE's row with the lowest tuned KL against the best baseline."""
    names = (DEFAULT, "ekfac", "kfac", *STEPPED, f"band {best_band(results)}", OURS_ON_BAND)
    ours = least((by[name] for name in names if name in by), "tuned")
    others = [row for name, row in by.items() if name in BASELINES]
    rival = min(others, key=kl_of, default=None)
    claim = "KL on Alpaca below every baseline's, the intervals apart"
    own, theirs = on_completions(ours), on_completions(rival)
    if ours is None or rival is None or own is None or theirs is None:
        yield [claim, NOT_RUN, ""]
        return
    ratio = f"{own['value'] / theirs['value']:.3g} × {rival.title}'s"
    yield [f"{ours.title}: {claim}", ratio, yes(own["high"] < theirs["low"])]
    yield kept_claim(others, ours)


def kept_claim(others: Sequence[Row], ours: Row) -> Claim:
    """No baseline answers more of the other questions, beyond what chance may do."""
    leads = []
    for row in others:
        for kind in ("sisters", "general"):
            lead, half = paired(*(own.told[kind]["correct"] for own in (row, ours)))
            leads.append((lead - half, f"{row.title}, {kind}: {lead:+.0f} ± {half:.0f} %"))
    more = [text for surplus, text in leads if surplus > 0]
    claim = "no baseline answers more of the other questions (paired, 95 %)"
    return [claim, "; ".join(more) or f"at most {max(leads)[1]}", yes(not more)]


def paired(one: str, other: str) -> tuple[float, float]:
    """Lead of ``one`` over ``other`` in right answers to the same questions, in per cent, and half
    of its 95 % interval: 1.96 standard errors of the mean difference."""
    differences = [int(a) - int(b) for a, b in zip(one, other, strict=True)]
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return 100 * statistics.fmean(differences), 196 * error


def paper_claims(results: Results, by: Mapping[str, Row]) -> Iterator[Claim]:
    """Half the KL of the paper's recipe, in one step on all blocks and in several on a band."""
    seconds = {method: whole_seconds(results, row) for method, row in by.items()}
    ours = [name for name in (DEFAULT, *STEPPED, "ekfac", "kfac") if name in by]
    costs = {name: quotient(seconds[name], seconds.get("paper")) for name in ours}
    cheap = affordable(costs)
    stepped = [name for name in cheap if name in STEPS_3]
    for rule, names in {"": cheap, "the way that TOFU-small chooses: ": stepped}.items():
        best = least((by[name] for name in names), "tuned")
        yield from half_claims(rule + against_paper(best, costs), best, by.get("paper"))
    cost = quotient(seconds.get(OURS_ON_BAND), seconds.get(PAPER_ON_BAND))
    claim = "the same on one band, in several steps with refits"
    if cost:
        title = by[OURS_ON_BAND].title
        claim = f"{title}, at {cost:.2g} × the cost of the paper's recipe done likewise"
    yield from half_claims(claim, by.get(OURS_ON_BAND), by.get(PAPER_ON_BAND))


def half_claims(claim: str, ours: Row | None, paper: Row | None) -> Iterator[Claim]:
    """At most half of that row's KL, on both texts."""
    yield bounded(f"{claim}: KL on Alpaca at most 0.5 × its", kl_ratio(ours, paper), most=0.5)
    kept = [row.told.get("retain_kl") if row else None for row in (ours, paper)]
    yield bounded("that: KL on other retain text at most 0.5 × its", quotient(*kept), most=0.5)


def kl_of(row: Row | None) -> float:
    kl = on_completions(row)
    return kl["value"] if kl else math.inf


def kl_ratio(one: Row | None, other: Row | None) -> float | None:
    """Of the KLs on benign completions."""
    return quotient(kl_of(one), kl_of(other)) if is_reported(one) and is_reported(other) else None


def whole_seconds(results: Results, row: Row) -> float | None:
    """Seconds of a request and of the fit on all blocks."""
    return with_fit(results, request_seconds(row.tuned), FITS.get(row.method, "ekfac"))


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
