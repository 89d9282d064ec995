"""What is claimed of K-FADE, what was measured, and whether it holds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from pieces import Results
from results_questions import interval, measured, rival_of
from results_rows import (
    BASELINES,
    NOT_RUN,
    Row,
    better_objective,
    number,
    quotient,
    retrained_log,
    with_interval,
)
from tofu_small_lab import PART
from tuning import VARIANTS

from kfade.evaluate.tofu_logs import TofuLog, aggregate, choose_row

MOST_COST = 3.0  # of what may better the paper's recipe, in its own cost
Claim = tuple[str, str, str]
"""What is claimed, what was measured, whether it holds."""


def claims(results: Results, rows: Sequence[Row]) -> Iterator[Claim]:
    """All claims; KLs are of the report slice, at the retrained model's forget probability."""
    by = {row.method: row for row in rows}
    others = [row for row in rows if row.method in BASELINES]
    kfade = [row for row in rows if row.method not in BASELINES]
    ours, paper = by[f"ekfac {better_objective(results)}"], by["paper"]
    tried = ("paper", "ekfac margin", *VARIANTS)
    whole = {method: whole_seconds(results, method, by[method].seconds) for method in tried}
    costs = {method: quotient(whole[method], whole["paper"]) for method in tried[1:]}
    better = least_kl(by[method] for method in affordable(costs))
    best = least_kl(by[method] for method in tried)

    yield from quality_claims(kfade, others, retrained_log(results))
    rival = least_kl(others)
    named = f" ({rival.title})" if rival else ""
    again = results.get("targets", {}).get("retrained", {}).get("report_kl")
    for row in {row.method: row for row in (ours, better, best) if row is not None}.values():
        claim = f"{row.title}: KL at most 0.2 × the best baseline's{named}"
        yield ratio_claim(claim, row, rival, most=0.2)
        yield others_claim(results, rows, row)
        claim = f"{row.title}: KL at most the retrained model's own"
        yield bounded(claim, quotient(row.kl, again), most=1.0)
    for name, least in (("diagonal", 5.0), ("identity", 20.0)):
        claim = f"{name} needs at least {least:g} × K-FAC's KL"
        yield ratio_claim(claim, by[f"{name} margin"], by["kfac margin"], least=least)
    claim = against_paper(better.title, costs[better.method]) if better else against_paper()
    yield ratio_claim(f"{claim}: KL at most 0.5 × its", better, paper, most=0.5)
    claim = "that: KL against our plain step's"
    yield ratio_claim(claim, better, by["ekfac margin"], most=1.0)
    yield from time_claims(results, ours)


def others_claim(results: Results, rows: Sequence[Row], row: Row) -> Claim:
    """The same on authors that no method was shown; it holds if its whole interval does."""
    told = measured(results, rows, "others")
    rival = rival_of(told)
    claim = "that, on kept authors whom no method was shown"
    if row.method not in told or rival is None:
        return claim, NOT_RUN, ""
    found = interval(told[row.method], told[rival])
    return f"{claim} ({BASELINES[rival]})", f"{with_interval(found)} ×", yes(found["high"] <= 0.2)


def time_claims(results: Results, ours: Row) -> Iterator[Claim]:
    """Of requests, beside the time of retraining."""
    train = results.get("retrained", {}).get("train_seconds")
    claim = "a request with a kept curvature: at most 5 % of retraining"
    yield bounded(claim, quotient(ours.seconds, train), most=0.05)
    part = results.get("report part")
    if part and "report_kl" in part:
        ratio = quotient(part["request"]["seconds"], train)
        name = f"one that looks at every {PART}th question, at {number(part['report_kl'])} nats"
        yield bounded(f"{name}: the same", ratio, most=0.05)
    ratio = quotient(whole_seconds(results, ours.method, ours.seconds), train)
    yield bounded("with the fit: at most 50 % of retraining", ratio, most=0.5)


def whole_seconds(
    results: Results, method: str, request: float | None, estimator: str = "ekfac"
) -> float | None:
    """Of a request, with the fit."""
    fit = "fit ekfac sampled" if method == "paper" else f"fit {estimator}"
    return plus(request, results.get(fit, {}).get("fit_seconds"))


def affordable(costs: Mapping[str, float | None]) -> list[str]:
    """The methods that cost at most ``MOST_COST`` times what the paper's recipe does."""
    return [method for method, cost in costs.items() if cost is not None and cost <= MOST_COST]


def against_paper(title: str = "", cost: float | None = None) -> str:
    """What a claim against the paper's recipe is about: the best of ours that is affordable."""
    if cost is None:
        return f"a way of ours that costs at most {MOST_COST:g} × the paper's recipe"
    return f"{title}, at {cost:.2g} × the cost of the paper's recipe, both with the fit"


def least_kl(rows: Iterable[Row]) -> Row | None:
    """Of those that reached the target the one of the lowest KL held out, which no claim is about;
    where none has, one that was run."""
    run = [row for row in rows if row.told is not None]
    return min(run, key=lambda row: (row.told or {}).get("kl", math.inf), default=None)


def quality_claims(
    kfade: Sequence[Row], others: Sequence[Row], retrained: TofuLog | None
) -> Iterator[Claim]:
    """Of the best of all K-FADE's rows (estimators, objectives, one step and several, lengths)."""
    logs = {f"{row.name} {factor}": log for row in kfade for factor, log in row.logs.items()}
    claim = "forget quality ≥ 0.8 at utility ≥ 0.97 × the retrained model's"
    second = "ahead of every baseline in forget quality, at equal or better utility"
    if retrained is None or not logs:
        yield claim, NOT_RUN, ""
        yield second, NOT_RUN, ""
        return
    whole = aggregate(retrained)["model_utility"]
    best = choose_row(logs, retrained)
    pairs = {
        "paper's rule": (best.best, best.best_forget_quality, best.best_utility),
        "honest rule": (best.held_out, best.held_out_forget_quality, best.held_out_utility),
    }
    for rule, (name, quality, utility) in pairs.items():
        holds = quality >= 0.8 and utility >= 0.97 * whole
        share = utility / whole if whole else math.nan  # tiny models may have none
        measured = f"{quality:.2g} at {share:.3f} × ({name})"
        yield f"{claim} ({rule}, of {len(logs)} rows)", measured, yes(holds)
    chosen_rows = [choose_row(row.logs, retrained) for row in others if row.logs]
    if not chosen_rows:
        yield second, NOT_RUN, ""
        return
    behind = [
        row.best_forget_quality < best.best_forget_quality and row.best_utility <= best.best_utility
        for row in chosen_rows
    ]
    yield second, f"of {sum(behind)} of {len(behind)} (paper's rule)", yes(all(behind))


def ratio_claim(claim: str, ours: Row | None, other: Row | None, **bound: float) -> Claim:
    """``bound`` on the ratio of two rows' KLs."""
    for row in (ours, other):
        if row is not None and row.told is not None and "failure" in row.told:
            return claim, f"{row.title}: {row.told['failure']}", "not comparable"
    return bounded(claim, quotient(ours.kl if ours else None, other.kl if other else None), **bound)


def bounded(
    claim: str, value: float | None, *, most: float = math.inf, least: float = 0.0
) -> Claim:
    if value is None:
        return claim, NOT_RUN, ""
    return claim, f"{value:.3g} ×", yes(least <= value <= most)


def plus(one: float | None, other: float | None) -> float | None:
    return one + other if one is not None and other is not None else None


def yes(holds: bool) -> str:
    return "yes" if holds else "**no**"
