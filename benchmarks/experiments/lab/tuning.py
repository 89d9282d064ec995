"""Which settings are tried, and which one is chosen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from kfade import Correction, Direction, Run, cross_entropy
from kfade.runs.config import EstimatorConfig

from .pieces import Results

PLAIN = Direction(bands=1, weigh_texts=False, bound=0.0)
"""The direction (G̃ + λI)⁻¹g at each step, without anything more."""
DEFAULT = "default"
"""The variant that is ``kfade unlearn`` without options; it chooses its damping itself."""
DEFAULT_FIT = EstimatorConfig.estimator
START_RATES = {"rmu": 1e-3, "repselect": 0.1}
"""Learning rates that the tuning of some baselines begins with; RepSelect takes steps of plain
gradient descent."""
NARROW = "narrow"
"""The default without a bound of the margin and copies of the forget texts with noise."""
EARLY = "early"
"""The default on the first ten blocks, a third of SmolLM2-135M's."""
PROMPTS = "prompts"
"""The default with gradients at the positions before the answers only."""
ABLATIONS = (NARROW, EARLY, PROMPTS)
"""The default with a part of it changed: not among what may be claimed the best."""
AS_BY_DEFAULT = {"steps": Run.steps, "correction": Correction(), "direction": Direction()}
VARIANTS: dict[str, dict[str, Any]] = {
    DEFAULT: AS_BY_DEFAULT,
    NARROW: {**AS_BY_DEFAULT, "direction": Direction(bound=0.0)},
    EARLY: {**AS_BY_DEFAULT, "layers": "0-9"},
    PROMPTS: {**AS_BY_DEFAULT, "direction": Direction(at_prompts=True)},
    "steps 3": {"steps": 3},
    "steps 3 then ce": {"steps": 3, "direction": replace(PLAIN, later_objective=cross_entropy)},
    "refine 1": {"direction": replace(PLAIN, refine=1)},
    "refine 3": {"direction": replace(PLAIN, refine=3)},
    "steps 3 refine 1": {"steps": 3, "direction": replace(PLAIN, refine=1)},
}
"""Variants of K-FADE that may improve its single step; all use one fit."""
OWN_DAMPING = (DEFAULT, *ABLATIONS)
"""Those that choose their damping themselves, and use the default's fit."""


def chosen(results: Results, method: str) -> float | None:
    """The damping or learning rate, of those tried, that was best on the tuning data."""
    prefix = f"tune {method} "
    tried = {name: row for name, row in results.items() if name.startswith(prefix)}
    return lowest((float(name.removeprefix(prefix)), row) for name, row in tried.items())


def rates(results: Results, name: str, rate: float, most: int) -> Iterator[float]:
    """Learning rates to try, at most ``most``, the first one first.

    The rate is halved as long as the held-out KL at the target falls. If the first rate does not
    reach the target, the rate is doubled until one does.
    """
    double, least = False, math.inf
    for index in range(most):
        yield rate
        row = results.get(f"tune {name} {rate:g}")
        if row is None:
            return
        short = "failure" in row and bool(row["curve"])  # without a curve the rate was too high
        kl = row.get("kl", math.inf)
        if index == 0:
            double = short
        elif short != double or (not double and kl > least):
            return
        least = min(least, kl)
        rate *= 2 if double else 0.5


def lowest(rows: Iterable[tuple[Any, Mapping[str, Any]]]) -> Any | None:
    """Of (setting, row) pairs the setting with the lowest held-out KL at the target.

    If no row reached the target, the one that came nearest; None if there are no rows.
    """

    def order(row: Mapping[str, Any]) -> tuple[bool, float]:
        if "failure" in row:
            return True, min((point["forget_probability"] for point in row["curve"]), default=1.0)
        return False, row["kl"]

    return min(rows, key=lambda pair: order(pair[1]), default=(None, {}))[0]
