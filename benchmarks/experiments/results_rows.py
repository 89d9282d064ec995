"""Rows of the results' tables: each method at the setting that was chosen for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pieces import Results
from tofu_small import PAPER, best_damping
from tuning import VARIANTS, chosen, lowest

from kfade import Direction
from kfade.evaluate.tofu_logs import TofuLog, aggregate
from kfade.evaluate.tofu_read import log_of

NOT_RUN = "not run"
ESTIMATORS = {"ekfac": "EK-FAC", "kfac": "K-FAC", "diagonal": "diagonal", "identity": "identity"}
BASELINES = {
    "gd": "gradient difference",
    "npo": "NPO",
    "simnpo": "SimNPO",
    "rmu": "RMU",
    "kl-min": "KL minimisation",
    "ga": "gradient ascent",
    "elm": "ELM",
    "soul": "SOUL",
}


@dataclass(frozen=True)
class Row:
    """One method at the setting that was chosen for it."""

    method: str
    """As the pieces call it: ``ekfac margin``, ``gd``, ``refine 3``, ``steps 3``."""
    title: str
    setting: str
    piece: str | None
    """The piece that reports it; None: nothing was chosen, since nothing was tuned."""
    told: dict[str, Any] | None
    """What that piece measured."""
    logs: dict[str, TofuLog]
    """TOFU's items by the factor that the update was multiplied with, as in ``×1.2``."""

    more_points: list[dict[str, float]]
    """Of its curve, measured for the figure."""

    @property
    def name(self) -> str:
        """Title and setting."""
        return ", ".join(filter(None, (self.title, self.setting)))

    @property
    def kl(self) -> float | None:
        """On the report slice, where the target was reached."""
        return (self.told or {}).get("report_kl")

    @property
    def seconds(self) -> float | None:
        """Of the whole request, without the fit of a curvature."""
        return request_seconds(self.told) if self.told is not None else None


def request_seconds(told: dict[str, Any]) -> float:
    """Of the request that ``told`` was measured of, without the fit of a curvature; on a faster
    machine as many as it would have taken on the first one."""
    parts = ("gradient_seconds", "solve_seconds", "search_seconds", "run_seconds")
    return told.get("pace", 1.0) * sum(told.get(part, 0.0) for part in parts)


def rows_of(results: Results) -> list[Row]:
    """All methods, K-FADE's first."""
    rows = []
    for objective in ("margin", "ce"):
        for estimator, name in ESTIMATORS.items():
            damping = best_damping(results, estimator)
            setting = f"{objective}, damping {damping:g}" if damping is not None else objective
            title = f"K-FADE, {name}"
            method = f"{estimator} {objective}"
            name = f"{method} {damping:g}" if damping is not None else None
            rows.append(row_of(results, method, title, setting, name))
    fixed = f"margin, sampled labels, damping {PAPER:g} (absolute)"
    rows.append(row_of(results, "paper", "K-FADE, the paper's recipe", fixed, "paper"))
    for name, options in VARIANTS.items():
        setting = variant_setting(options, results.get(f"report {name}", {}))
        rows.append(row_of(results, name, variant_title(options), setting, name))
    for name, title in BASELINES.items():
        rate = chosen(results, name)
        setting = f"learning rate {rate:g}" if rate is not None else ""
        row = f"{name} {rate:g}" if rate is not None else None
        rows.append(row_of(results, name, title, setting, row))
    return rows


def variant_title(options: dict[str, Any]) -> str:
    """Of one of ``VARIANTS``."""
    words = {
        "estimator": "{}",
        "steps": "{} steps, one fit",
        "later_objective": "cross-entropy after the first",
        "refine": "refined {}×",
    }
    direction = options.get("direction", Direction())
    told = {key: options[key] for key in ("estimator", "steps") if key in options}
    if direction.later_objective is not None:
        told["later_objective"] = direction.later_objective
    if direction.refine:
        told["refine"] = direction.refine
    told = {key: ESTIMATORS.get(value, value) for key, value in told.items()}
    return "K-FADE, " + ", ".join(words[key].format(value) for key, value in told.items())


def variant_setting(options: dict[str, Any], told: dict[str, Any]) -> str:
    """Damping, and which of the refined directions was the best: 0 is the plain step's."""
    setting = f"margin, damping {told['damping']:g}" if "damping" in told else "margin"
    is_refined = options.get("direction", Direction()).refine and "refined" in told
    return f"{setting}, iterate {told['refined']} kept" if is_refined else setting


def row_of(results: Results, method: str, title: str, setting: str, name: str | None) -> Row:
    """``name``: as its pieces call the row; None where nothing was chosen."""
    if name is None:
        return Row(method, title, setting, None, None, {}, [])
    prefix = f"tofu {name} x"
    logs = {
        f"×{piece.removeprefix(prefix)}": log_of(told["items"], piece)
        for piece, told in results.items()
        if piece.startswith(prefix)
    }
    told, points = results.get(f"report {name}"), results.get(f"curve {name}", {"curve": []})
    return Row(method, title, setting, f"report {name}", told, logs, points["curve"])


def retrained_log(results: Results) -> TofuLog | None:
    told = results.get("tofu retrained x1")
    return log_of(told["items"], "retrained") if told else None


def better_objective(results: Results) -> str:
    """The better of the two on the tuning authors; margin where that was not run."""
    tried = {}
    for objective in ("margin", "ce"):
        damping = chosen(results, f"ekfac {objective}")
        if damping is not None:
            tried[objective] = results[f"tune ekfac {objective} {damping:g}"]
    return lowest(tried.items()) or "margin"


def figures_of(row: Row, retrained: TofuLog | None) -> dict[str, tuple[float | None, float]]:
    """(forget quality, utility) by factor."""
    told = {name: aggregate(log, retrained) for name, log in row.logs.items()}
    return {name: (f["forget_quality"], f["model_utility"]) for name, f in told.items()}


def probability_of(told: dict[str, Any]) -> float | None:
    """Of the update that was kept: K-FADE's at the target, a baseline's at its last evaluation."""
    curve = told.get("curve") or [{}]
    return told.get("forget_probability", curve[-1].get("forget_probability"))


def number(value: float | None) -> str:
    return NOT_RUN if value is None else f"{value:.3g}"


def with_interval(figure: Mapping[str, float]) -> str:
    """``value``, ``low`` and ``high`` in words."""
    return f"{figure['value']:.3g} ({figure['low']:.3g} to {figure['high']:.3g})"


def seconds(value: float | None) -> str:
    return NOT_RUN if value is None else f"{value:.0f}"


def cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def table(heading: str, lines: Sequence[str]) -> str:
    count = heading.replace("\\|", "").count("|") + 1
    rows = "\n".join(lines) if lines else f"| {NOT_RUN} |{' |' * (count - 1)}"
    return f"| {heading} |\n|{' --- |' * count}\n{rows}"


def quotient(one: float | None, other: float | None) -> float | None:
    return one / other if one is not None and other else None
