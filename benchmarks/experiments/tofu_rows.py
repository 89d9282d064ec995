"""The rows of TOFU-small's tables, and how their KL is spread over questions."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from lab.intervals import Texts, interval, mean
from lab.pieces import Results
from lab.records import number, table
from lab.rows import (
    BASELINES,
    ESTIMATORS,
    Row,
    row_of,
    variant_setting,
    variant_title,
    with_interval,
)
from lab.tuning import VARIANTS, chosen, lowest
from tofu_small import PAPER_DAMPING, best_damping, named

from kfade.evaluate.memorisation import MEMORISED
from kfade.evaluate.tofu_logs import TofuLog, aggregate
from kfade.evaluate.tofu_read import log_of

SLICES = {"report": "report slice", "others": "kept but not shown"}
MOST = {"report": 0.2, "others": 0.1}  # of the best baseline's KL, as claimed


def rows_of(results: Results) -> list[Row]:
    """All methods, K-FADE's first."""
    rows = []
    for objective in ("margin", "ce"):
        for fit, title in ESTIMATORS.items():
            method, damping = f"{fit} {objective}", best_damping(results, fit)
            setting = f"{objective}, damping {damping:g}" if damping is not None else objective
            name = named(results, method)
            rows.append(row_of(results, method, f"K-FADE, {title}", setting, name))
    setting = f"margin, sampled labels, damping {PAPER_DAMPING:g} (absolute)"
    rows.append(row_of(results, "paper", "K-FADE, the paper's recipe", setting, "paper"))
    for name, options in VARIANTS.items():
        setting = variant_setting(options, results.get(f"report {name}", {}))
        rows.append(row_of(results, name, variant_title(name, options), setting, name))
    for method, title in BASELINES.items():
        rate = chosen(results, method)
        setting = f"learning rate {rate:g}" if rate is not None else ""
        rows.append(row_of(results, method, title, setting, named(results, method)))
    return rows


def logs_of(results: Results, row: Row) -> dict[str, TofuLog]:
    """TOFU's items of a row's update at several lengths, by the factor, as in ``×1.25``."""
    prefix = f"tofu {row.name} x"
    return {
        f"×{piece.removeprefix(prefix)}": log_of(told["items"], piece)
        for piece, told in results.items()
        if piece.startswith(prefix)
    }


def log_of_retrained(results: Results) -> TofuLog | None:
    told = results.get("tofu retrained x1")
    return log_of(told["items"], "retrained") if told else None


def figures_of(results: Results, row: Row) -> dict[str, tuple[float | None, float]]:
    """(forget quality, utility) by factor."""
    retrained = log_of_retrained(results)
    told = {name: aggregate(log, retrained) for name, log in logs_of(results, row).items()}
    return {name: (found["forget_quality"], found["model_utility"]) for name, found in told.items()}


def best_objective(results: Results) -> str:
    """The objective of the lower KL on the tuning authors; margin if neither was run."""
    best = {o: chosen(results, f"ekfac {o}") for o in ("margin", "ce")}
    tuned = ((o, results[f"tune ekfac {o} {d:g}"]) for o, d in best.items() if d is not None)
    return lowest(tuned) or "margin"


def questions_table(results: Results, rows: Sequence[Row]) -> str:
    """Mean, median and ratio to the best baseline, in both sets of questions."""
    titles = {row.method: row.label for row in rows} | {"retrained": "retrained"}
    told = {name: measured(results, rows, name) for name in SLICES}
    rivals = {name: rival_of(told[name]) for name in SLICES}
    if "by question retrained" in results:
        for name in SLICES:
            told[name]["retrained"] = results["by question retrained"][name]
    lines = []
    for method in told["report"]:
        cells = [titles[method]]
        for name, rival in rivals.items():
            own = told[name][method]
            median = number(statistics.median(kl for kl, _ in own))
            against = told[name][rival] if rival and method != rival else None
            ratio = with_interval(interval(own, against)) if against else ""
            cells += [with_interval(interval(own)), median, ratio]
        lines.append(cells)
    heads = (f"{title} | median | ratio to the best baseline" for title in SLICES.values())
    return table(f"method | {' | '.join(heads)}", lines)


def tokens_table(results: Results, rows: Sequence[Row]) -> str:
    """What is left of the forgotten answers, token by token."""
    titles = {row.name: row.label for row in rows if row.name}
    lines = []
    for name in ("full", "retrained", *titles):
        told = results.get(f"by token {name}", {})
        if "quantiles" in told:
            means = (statistics.fmean(told[key]) for key in MEMORISED)
            cells = [f"{value:.2f}" for value in (*means, *told["quantiles"], told["above"])]
            lines.append([titles.get(name, name), *cells, f"`'by token {name}'`"])
    return table(
        "method | tokens still predicted | extraction strength | loss: median | 75 % | 90 % | 97 % "
        "| share above 8 nats | `--only`",
        lines,
    )


def memorisation_table(results: Results, rows: Sequence[Row]) -> str:
    """Both sets of questions with as many tokens still predicted as by the retrained model."""
    told = {name: measured(results, rows, name, "by memorisation") for name in SLICES}
    lines = []
    for row in rows:
        found = results.get(f"by memorisation {row.name}", {})
        if "failure" in found:
            blank = [""] * (3 + 2 * len(SLICES))
            lines.append([row.label, found["failure"], *blank, f"`'by memorisation {row.name}'`"])
        if row.method not in told["report"]:
            continue
        keys = ("exact_memorisation", "forget_probability", "extraction_strength", "forget_loss")
        cells = [number(found["left"][key]) for key in keys]
        for name in SLICES:
            own, rival = told[name][row.method], rival_of(told[name])
            against = told[name][rival] if rival not in (None, row.method) else None
            cells.append(with_interval(interval(own)))
            cells.append(with_interval(interval(own, against)) if against else "")
        lines.append([row.label, *cells, f"`'by memorisation {row.name}'`"])
    heads = (f"KL, {title} | ratio to the best baseline" for title in SLICES.values())
    return table(
        "method | tokens still predicted | forget probability | extraction strength | forget loss "
        f"| {' | '.join(heads)} | `--only`",
        lines,
    )


def measured(
    results: Results, rows: Sequence[Row], slice_name: str, piece: str = "by question"
) -> dict[str, Texts]:
    """The questions' KLs of the rows that were measured so, by method."""
    told = {row.method: results.get(f"{piece} {row.name}", {}) for row in rows}
    return {method: own[slice_name] for method, own in told.items() if slice_name in own}


def rival_of(told: Mapping[str, Texts]) -> str | None:
    """The baseline of the lowest mean."""
    return min((m for m in told if m in BASELINES), key=lambda m: mean(told[m]), default=None)
