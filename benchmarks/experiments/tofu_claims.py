"""What is claimed of K-FADE on TOFU-small, what was measured, and whether it holds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from lab.intervals import Texts, interval
from lab.pieces import Results
from lab.records import NOT_RUN, number
from lab.rows import (
    BASELINES,
    Claim,
    Row,
    affordable,
    against_paper,
    bounded,
    least,
    quotient,
    request_seconds,
    with_fit,
    with_interval,
    yes,
)
from lab.tuning import ABLATIONS, DEFAULT, DEFAULT_FIT, NARROW, OWN_DAMPING, VARIANTS
from tofu_lab import PART
from tofu_rows import MOST, SLICES, best_objective, log_of_retrained, logs_of, measured, rival_of

from kfade.evaluate.tofu_logs import TofuLog, aggregate, choose_row

FITS = {"paper": "ekfac sampled", **dict.fromkeys(OWN_DAMPING, DEFAULT_FIT)}
"""The fit that a row pays for; EK-FAC if it is not named here."""


def claims(results: Results, rows: Sequence[Row]) -> Iterator[Claim]:
    """All claims. KLs are of the report slice, at the retrained model's forget probability."""
    by = {row.method: row for row in rows}
    ours = by[f"ekfac {best_objective(results)}"]
    yield from quality_claims(results, rows)

    seconds = {method: whole_seconds(results, row) for method, row in by.items()}
    single_and_variants = ("ekfac margin", *(name for name in VARIANTS if name not in ABLATIONS))
    costs = {m: quotient(seconds[m], seconds["paper"]) for m in single_and_variants}
    affordable_best = least((by[method] for method in affordable(costs)), "told")
    best = least((by[method] for method in ("paper", *single_and_variants)), "told")
    rival = least((row for row in rows if row.method in BASELINES), "told")
    named = f" ({rival.title})" if rival else ""
    retrained_kl = results.get("targets", {}).get("retrained", {}).get("report_kl")
    shown = (by[DEFAULT], best, affordable_best, ours)
    compared = {row.method: row for row in shown if row is not None}
    for row in compared.values():
        claim = f"{row.title}: KL at most {MOST['report']:g} × the best baseline's{named}"
        yield kl_claim(claim, row, rival, most=MOST["report"])
        yield others_claim(results, rows, row)
        claim = f"{row.title}: KL at most the retrained model's own"
        yield bounded(claim, quotient(row.told.get("report_kl"), retrained_kl), most=1.0)

    for method in (DEFAULT, NARROW):
        yield from memorisation_claims(results, rows, by[method])

    for name, bound in (("diagonal", 5.0), ("identity", 20.0)):
        claim = f"{name} needs at least {bound:g} × K-FAC's KL"
        yield kl_claim(claim, by[f"{name} margin"], by["kfac margin"], least=bound)
    claim = f"{against_paper(affordable_best, costs)}: KL at most 0.5 × its"
    yield kl_claim(claim, affordable_best, by["paper"], most=0.5)
    claim = "that: KL against our plain step's"
    yield kl_claim(claim, affordable_best, by["ekfac margin"], most=1.0)
    yield from time_claims(results, by[DEFAULT], ours)


def quality_claims(results: Results, rows: Sequence[Row]) -> Iterator[Claim]:
    """Forget quality and utility of the best row of K-FADE, over all estimators, objectives, steps
    and lengths."""
    retrained = log_of_retrained(results)
    logs: dict[str, TofuLog] = {}
    baselines: list[Mapping[str, TofuLog]] = []
    for row in rows:
        own = logs_of(results, row)
        if row.method not in BASELINES:
            logs |= {f"{row.label} {factor}": log for factor, log in own.items()}
        elif own:
            baselines.append(own)
    first = "forget quality ≥ 0.8 at utility ≥ 0.97 × the retrained model's"
    second = "ahead of every baseline in forget quality, at equal or better utility"
    if retrained is None or not logs:
        yield [first, NOT_RUN, ""]
        yield [second, NOT_RUN, ""]
        return
    whole = aggregate(retrained)["model_utility"]
    best = choose_row(logs, retrained)
    by_rule = {
        "paper's rule": (best.best, best.best_forget_quality, best.best_utility),
        "honest rule": (best.held_out, best.held_out_forget_quality, best.held_out_utility),
    }
    for rule, (name, quality, utility) in by_rule.items():
        share = utility / whole if whole else math.nan  # the utility of tiny models may be zero
        found = f"{quality:.2g} at {share:.3f} × ({name})"
        holds = quality >= 0.8 and utility >= 0.97 * whole
        yield [f"{first} ({rule}, of {len(logs)} rows)", found, yes(holds)]
    others = [choose_row(own, retrained) for own in baselines]
    if not others:
        yield [second, NOT_RUN, ""]
        return
    behind = [
        row.best_forget_quality < best.best_forget_quality and row.best_utility <= best.best_utility
        for row in others
    ]
    yield [second, f"of {sum(behind)} of {len(behind)} (paper's rule)", yes(all(behind))]


def kl_claim(claim: str, ours: Row | None, other: Row | None, **bound: float) -> Claim:
    """A bound on the ratio of two rows' KLs."""
    for row in (ours, other):
        if row is not None and "failure" in row.told:
            return [claim, f"{row.title}: {row.told['failure']}", "not comparable"]
    kls = [row.told.get("report_kl") if row else None for row in (ours, other)]
    return bounded(claim, quotient(*kls), **bound)


def others_claim(results: Results, rows: Sequence[Row], row: Row) -> Claim:
    """The same on authors that no method was shown."""
    told = measured(results, rows, "others")
    return questions_claim("that, on kept authors whom no method was shown", told, row, "others")


def memorisation_claims(results: Results, rows: Sequence[Row], row: Row) -> Iterator[Claim]:
    """KL at equal exact memorisation, in both sets of questions."""
    for name, title in SLICES.items():
        told = measured(results, rows, name, "by memorisation")
        claim = f"{row.title}, at equal exact memorisation, {title}"
        yield questions_claim(claim, told, row, name)


def questions_claim(subject: str, told: Mapping[str, Texts], row: Row, name: str) -> Claim:
    """A bound on the ratio to the best baseline in the set of questions ``name``. It holds if the
    whole interval does."""
    rival = rival_of(told)
    claim = f"{subject}: KL at most {MOST[name]:g} × the best baseline's"
    if row.method not in told or rival is None:
        return [claim, NOT_RUN, ""]
    found = interval(told[row.method], told[rival])
    holds = yes(found["high"] <= MOST[name])
    return [f"{claim} ({BASELINES[rival]})", f"{with_interval(found)} ×", holds]


def time_claims(results: Results, *rows: Row) -> Iterator[Claim]:
    """Seconds of requests over those of retraining."""
    train = results.get("retrained", {}).get("train_seconds")
    for row in rows:
        claim = f"{row.title}: a request with a kept curvature takes at most 5 % of retraining"
        yield bounded(claim, quotient(request_seconds(row.told), train), most=0.05)
        ratio = quotient(whole_seconds(results, row), train)
        yield bounded("that with the fit: at most 50 % of retraining", ratio, most=0.5)
    part = results.get("report part", {})
    if "report_kl" in part:
        claim = f"one that looks at every {PART}th question, at {number(part['report_kl'])} nats"
        ratio = quotient(part["request"]["seconds"], train)
        yield bounded(f"{claim}: a request takes at most 5 % of retraining", ratio, most=0.05)


def whole_seconds(results: Results, row: Row) -> float | None:
    """Seconds of a request of K-FADE with its fit."""
    return with_fit(results, request_seconds(row.told), FITS.get(row.method, "ekfac"))
