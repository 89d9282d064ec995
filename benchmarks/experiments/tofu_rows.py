"""The rows of TOFU-small's tables."""

from __future__ import annotations

from lab.pieces import Results
from lab.rows import BASELINES, ESTIMATORS, Row, row_of, variant_setting, variant_title
from lab.tuning import VARIANTS, chosen, lowest
from tofu_small import PAPER_DAMPING, best_damping, named

from kfade.evaluate.tofu_logs import TofuLog, aggregate
from kfade.evaluate.tofu_read import log_of


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
        rows.append(row_of(results, name, variant_title(options), setting, name))
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
