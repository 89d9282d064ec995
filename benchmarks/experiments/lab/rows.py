"""Rows of the results' tables, and the claims that are made of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kfade import Direction

from .pieces import Results
from .records import NOT_RUN, Record
from .tuning import DEFAULT, EARLY, NARROW, PROMPTS

ESTIMATORS = {"ekfac": "EK-FAC", "kfac": "K-FAC", "diagonal": "diagonal", "identity": "identity"}
BASELINES = {
    "gd": "gradient difference",
    "npo": "NPO",
    "npo-sam": "NPO, sharpness-aware",
    "simnpo": "SimNPO",
    "wga": "WGA",
    "satimp": "SatImp",
    "undial": "UNDIAL",
    "repselect": "RepSelect",
    "rmu": "RMU",
    "kl-min": "KL minimisation",
    "ga": "gradient ascent",
    "elm": "ELM",
    "soul": "SOUL",
}
MOST_OF_PAPER = 0.1  # of the KL of the paper's recipe
MOST_COST = 3.0  # of a variant that is compared with the paper's recipe, in the recipe's cost
Claim = list[str]
"""The claim, what was measured, and whether it holds."""
Share = Mapping[str, float]
"""The default's KL as a share of another method's: ``value``, ``low``, ``high``."""


@dataclass(frozen=True)
class Row:
    """A method at the setting that was chosen for it."""

    method: str
    """``ekfac margin``, ``gd``, ``refine 3``, ``steps 3``."""
    title: str
    setting: str
    name: str | None
    """What its pieces are called; None if no setting was chosen yet."""
    told: Record
    """What was measured for the tables; empty if it was not run."""
    tuned: Record = field(default_factory=dict)
    """What was measured where its setting was chosen."""

    @property
    def label(self) -> str:
        """Title and setting."""
        return ", ".join(filter(None, (self.title, self.setting)))


def row_of(results: Results, method: str, title: str, setting: str, name: str | None) -> Row:
    """The row with its results."""
    told, tuned = (results.get(f"{kind} {name}", {}) for kind in ("report", "tune"))
    return Row(method, title, setting, name, told, tuned)


def variant_title(name: str, options: Mapping[str, Any]) -> str:
    """The title of a variant of K-FADE, by its settings."""
    if name == DEFAULT:
        return f"K-FADE as it is by default, {options['steps']} steps"
    if name == NARROW:
        return "K-FADE, the default without its bound and noise"
    if name == PROMPTS:
        return "K-FADE, the default with gradients at the prompts"
    if name == EARLY:
        return f"K-FADE, the default on blocks {options['layers']}"
    direction = options.get("direction", Direction())
    words = [ESTIMATORS[options["estimator"]]] if "estimator" in options else []
    if "steps" in options:
        words.append(f"{options['steps']} steps, one fit")
    if direction.later_objective is not None:
        words.append("cross-entropy after the first")
    if direction.refine:
        words.append(f"refined {direction.refine}×")
    return ", ".join(["K-FADE", *words])


def variant_setting(options: Mapping[str, Any], told: Record) -> str:
    """Damping, and which of the refined directions was the best; 0 is the plain one."""
    setting = f"margin, damping {told['damping']:g}" if "damping" in told else "margin"
    is_refined = options.get("direction", Direction()).refine and "refined" in told
    return f"{setting}, iterate {told['refined']} kept" if is_refined else setting


def request_seconds(told: Record) -> float | None:
    """Seconds of a request without the fit; None if it was not run.

    A row of a faster machine counts the seconds that the first machine would have taken.
    """
    if not told:
        return None
    parts = ("gradient_seconds", "solve_seconds", "search_seconds", "run_seconds")
    return told.get("pace", 1.0) * sum(told.get(part, 0.0) for part in parts)


def with_fit(results: Results, seconds: float | None, fit: str) -> float | None:
    """Seconds of a request with that fit."""
    own = results.get(f"fit {fit}", {}).get("fit_seconds")
    return seconds + own if seconds is not None and own is not None else None


def quotient(one: float | None, other: float | None) -> float | None:
    return one / other if one is not None and other else None


def bounded(
    claim: str, value: float | None, *, most: float = math.inf, least: float = 0.0
) -> Claim:
    """The claim that a ratio lies between two bounds."""
    if value is None:
        return [claim, NOT_RUN, ""]
    return [claim, f"{value:.3g} ×", yes(least <= value <= most)]


def share_claim(claim: str, shares: Sequence[Share | None], most: float) -> Claim:
    """It holds if every share has its whole interval below ``most``."""
    found = [share for share in shares if share is not None]
    if len(found) < len(shares):
        return [claim, NOT_RUN, ""]
    said = "; ".join(with_interval(share) for share in found)
    return [claim, f"{said} ×", yes(all(share["high"] <= most for share in found))]


def affordable(costs: Mapping[str, float | None]) -> list[str]:
    """The methods that cost at most ``MOST_COST`` times what the paper's recipe does."""
    return [method for method, cost in costs.items() if cost is not None and cost <= MOST_COST]


def against_paper(best: Row | None, costs: Mapping[str, float | None]) -> str:
    """How a claim against the paper's recipe begins, for the best affordable row."""
    if best is None:
        return f"a way of ours that costs at most {MOST_COST:g} × the paper's recipe"
    cost = costs[best.method]
    return f"{best.title}, at {cost:.2g} × the cost of the paper's recipe, both with the fit"


def least(rows: Iterable[Row], record: str) -> Row | None:
    """The row that was run with the lowest held-out KL in its ``told`` or ``tuned`` record.

    No claim is about that KL.
    """
    run = [row for row in rows if getattr(row, record)]
    return min(run, key=lambda row: getattr(row, record).get("kl", math.inf), default=None)


def yes(holds: bool) -> str:
    return "yes" if holds else "**no**"


def with_interval(figure: Mapping[str, float]) -> str:
    """``value`` and its interval from ``low`` to ``high``."""
    return f"{figure['value']:.3g} ({figure['low']:.3g} to {figure['high']:.3g})"
