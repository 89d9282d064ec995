"""The points of a sweep: a grid of settings, the outcome of each, and which of them are best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from kfade.curvature.damping import Damping
from kfade.errors import InputError
from kfade.method.size import StepSize

ALL = "all"  # every block that the curvature covers
RULE = "highest forget loss among the points whose measured retain KL is at most max_kl"


@dataclass(frozen=True)
class Point:
    """One combination of the grid."""

    objective: str
    """Its name among the objectives."""
    layers: str
    """Blocks as in 3-6 or 0,2,8-11, or ``all``."""
    damping: Damping
    size: StepSize
    refine: int = 0
    """Iterations of conjugate gradients beyond the K-FADE direction."""

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that were varied, by their names on the command line."""
        damping = "relative_damping" if self.damping.relative else "damping"
        asked = {k: v for k, v in asdict(self.size).items() if v is not None}
        refine = {"refine": self.refine} if self.refine else {}
        return {"layers": self.layers, damping: self.damping.value, **refine, **asked}

    @property
    def id(self) -> str:
        """Name of the point in a log."""
        return ", ".join([self.objective, *(f"{k} {v}" for k, v in self.settings.items())])

    @property
    def direction(self) -> tuple[str, Damping]:
        """What its unrefined direction depends on, besides the objective."""
        return self.layers, self.damping


@dataclass(frozen=True)
class Outcome:
    """Measurements of a point; KL and losses in nats per loss token, None if it failed."""

    point: Point
    seconds: float
    """Seconds for this point, with its share of what it has in common with others."""
    alpha: float | None = None
    """‖ΔW‖ in the G̃-norm."""
    predicted_kl: float | None = None
    """½α²."""
    retain_kl: float | None = None
    """KL(base ‖ edited) on held-out retain data."""
    forget_loss: float | None = None
    forget_probability: float | None = None
    """Mean over the forget sequences of exp(−their loss per token)."""
    failure: str | None = None
    """Why there is no measurement."""

    @property
    def values(self) -> dict[str, Any]:
        """The values that a log keeps."""
        own = {k: v for k, v in vars(self).items() if k != "point" and v is not None}
        return {"objective": self.point.objective, "settings": self.point.settings, **own}


def grid(
    objectives: Sequence[str],
    layers: Sequence[str],
    dampings: Sequence[Damping],
    sizes: Sequence[StepSize],
    *,
    refine: Sequence[int] = (0,),
) -> list[Point]:
    """All combinations; those that share a gradient or a direction are consecutive.

    Args:
        refine: iterations of conjugate gradients; each is a direction of its own.

    Raises:
        InputError: nothing to combine, a value given twice, or a number out of range.
    """
    named: dict[str, Sequence[Any]] = {
        "objective": objectives,
        "layers": layers,
        "damping": dampings,
        "refinement": sorted(refine),
        "step size": sizes,
    }
    for name, values in named.items():
        if not values:
            raise InputError(f"the sweep has no {name}: give at least one")
        if len(set(values)) < len(values):
            raise InputError(f"the sweep has a {name} twice: leave one out")
    if min(refine) < 0:
        raise InputError(f"--refine {min(refine)}: give 0 or more")
    return [Point(o, b, d, s, n) for o, b, d, n, s in product(*named.values())]


def pareto(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The Pareto front: outcomes that no other dominates, in order of KL.

    One dominates another if it has less retain KL and no lower forget loss, or a higher forget loss
    and no more retain KL. Of equal outcomes all are kept.
    """
    front: list[Outcome] = []
    for outcome in sorted(_measured(outcomes), key=lambda o: (_values(o)[0], -_values(o)[1])):
        best = _values(front[-1]) if front else (0.0, -math.inf)
        if _values(outcome)[1] > best[1] or _values(outcome) == best:
            front.append(outcome)
    return front


def pick(outcomes: Sequence[Outcome], max_kl: float) -> Outcome | None:
    """The outcome with the highest forget loss within the KL budget (:data:`RULE`); of equal ones
    that with the least KL."""
    within = [o for o in _measured(outcomes) if _values(o)[0] <= max_kl]
    return max(within, key=lambda o: (_values(o)[1], -_values(o)[0]), default=None)


def _measured(outcomes: Sequence[Outcome]) -> list[Outcome]:
    return [outcome for outcome in outcomes if outcome.failure is None]


def _values(outcome: Outcome) -> tuple[float, float]:
    """(retain KL, forget loss)."""
    assert outcome.retain_kl is not None
    assert outcome.forget_loss is not None
    return outcome.retain_kl, outcome.forget_loss
