"""Predicted and measured effects of a step, and the choice among several candidates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kfade.curvature.vectors import Vector
from kfade.method.search import Probe
from kfade.method.size import MIDWAY_TOLERANCE
from kfade.method.update import Update


@dataclass(frozen=True)
class StepRecord:
    """Predicted and measured effects of one step. KL and losses are in nats per loss token."""

    alpha: float
    predicted_kl: float
    """½α²‖r‖²_G̃ of this step alone."""
    exact_kl: float
    """½δᵀGδ of this step with the exact G of held-out retain data, of a part of them in a run of
    several steps."""
    measured_kl: float
    """KL(before ‖ after) of this step on held-out retain data."""
    retain_kl: float
    """KL(base ‖ after), all steps so far."""
    forget_loss_before: float
    forget_loss_after: float
    forget_probability_before: float
    """Mean over the forget texts of each one's probability per token (geometric)."""
    forget_probability_after: float
    predicted_objective_change: float
    """α gᵀr, on the step's own forget batch, whose texts may be weighed and have copies, and of the
    positions that the direction's gradient is of."""
    measured_objective_change: float
    """Of the mean per token, on the forget sequences that are measured."""
    relative_change: dict[str, float] = field(default_factory=dict)
    """‖ΔW‖ / ‖W‖ of this step by weight."""
    probes: list[dict[str, float]] = field(default_factory=list)
    """Trials of the step's size, the chosen one last."""
    measured_on: dict[str, int] = field(default_factory=dict)
    """Number of sequences that were measured in trials: ``forget`` and ``held_out``. Steps before
    the last are tried on a part, see :meth:`~kfade.method.gauge.Gauge.anchored`."""
    confirmed: bool = False
    """Whether ``retain_kl`` and what the forget set has ``after`` the step were then measured on
    all data, as before the next step; until then they are those of the last trial."""
    scaled_by: float = 1.0
    """Factor on all steps so far, by which a run that had gone too far came back. ``retain_kl``
    and what the forget set has ``after`` the step are with it, the rest is without."""
    ended: bool = False
    """Whether the run ended with this step, before it had done all."""
    ended_by: str = ""
    """Why, if its size was not reached."""
    refined: int = 0
    """Iterations beyond the K-FADE direction that this step's direction took."""
    refinements: list[dict[str, float]] = field(default_factory=list)
    """If directions were refined: the measurements of each, see :attr:`measured`."""
    corrections: list[dict[str, Any]] = field(default_factory=list)
    """The :class:`CorrectionRecord` of each correction. After those that were accepted,
    ``retain_kl`` and what the forget set has ``after`` the step are their result."""

    @property
    def measured(self) -> dict[str, float]:
        """The values that differ between candidate directions."""
        names = ("refined", "alpha", "exact_kl", "measured_kl", "retain_kl", "forget_loss_after")
        return {name: getattr(self, name) for name in names}

    def beats(
        self,
        other: StepRecord,
        first_loss: float,
        *,
        to_a_kl: bool = False,
        enough: float = math.inf,
    ) -> bool:
        """Whether (forget loss − first loss) / √(retain KL) is greater, over the run so far.

        Along one direction the rise of the loss grows about as α and the KL as α². So the ratio
        compares directions even though sizes are met within a tolerance only.

        Args:
            to_a_kl: the size is a KL. Where the KLs differ by more than the tolerance, one step
                ended where most is forgotten, and the loss alone is compared.
            enough: the forget loss at which a step to a KL ends, whatever its KL; the ratio
                compares two such steps.
        """
        rise, their_rise = (r.forget_loss_after - first_loss for r in (self, other))
        low, high = sorted((self.retain_kl, other.retain_kl))
        ended = min(self.forget_loss_after, other.forget_loss_after) >= enough
        if to_a_kl and not ended and high > (1 + MIDWAY_TOLERANCE) / (1 - MIDWAY_TOLERANCE) * low:
            return rise > their_rise
        return rise * math.sqrt(other.retain_kl) > their_rise * math.sqrt(self.retain_kl)


@dataclass(frozen=True)
class CorrectionRecord:
    """Predicted and measured effects of one correction. KL and losses are in nats per loss token.

    If it was not accepted, what is measured ``after`` it is that of the best trial.
    """

    accepted: bool
    length: float
    """t in t d⊥; 0 if no t was better than none."""
    forget_length: float
    """s in s r, the change along r that followed to meet the step's size again; else 0."""
    slope: float
    """g_Kᵀd⊥: predicted change of K per unit of t, on the retain data of the gradient."""
    held_out_slope: float
    """hᵀd⊥: the same on held-out retain data."""
    exact: float
    """d⊥ᵀGd⊥ with the exact G of held-out retain data."""
    retain_kl_before: float
    """KL(base ‖ before) on held-out retain data."""
    retain_kl_after: float
    forget_loss_before: float
    forget_loss_after: float
    forget_probability_before: float
    forget_probability_after: float
    seconds: float
    probes: list[dict[str, float]] = field(default_factory=list)
    """Trials of t, then of s, each as its ``alpha``."""


def ends_of(steps: Sequence[Mapping[str, Any]]) -> tuple[Probe, Probe]:
    """What the records of a run say of its start, where the KL is 0, and of its end so far."""
    last = steps[-1]
    return _probe(steps[0], "before", 0.0), _probe(last, "after", last["retain_kl"])


def amended(update: Update, **facts: Any) -> Update:
    """The update with ``facts`` in the record of its last step."""
    *steps, last = update.provenance["steps"]
    return Update(update.deltas, {**update.provenance, "steps": [*steps, {**last, **facts}]})


def _probe(step: Mapping[str, Any], when: str, kl: float) -> Probe:
    loss, probability = step[f"forget_loss_{when}"], step[f"forget_probability_{when}"]
    return Probe(0.0, kl, loss, probability, 0.0)


Candidate = tuple[StepRecord, Vector]
"""(record of a step, its direction by parameter); the change of weights is α times the
direction."""


class Best:
    """Keeps the best of the candidates added so far, see :meth:`StepRecord.beats`; the first of
    equal ones. Directions of the others are not kept.

    Args:
        first_loss: forget loss at the start of the run, in nats per token.
        to_a_kl: whether the size is a KL.
        enough: as for :meth:`StepRecord.beats`.
    """

    def __init__(
        self, first_loss: float, *, to_a_kl: bool = False, enough: float = math.inf
    ) -> None:
        self._first_loss, self._to_a_kl, self._enough = first_loss, to_a_kl, enough
        self._measured: list[dict[str, float]] = []
        self._best: Candidate | None = None

    def add(self, record: StepRecord, changes: Vector) -> None:
        """Add a candidate."""
        self._measured.append(record.measured)
        if self._best is None or record.beats(
            self._best[0], self._first_loss, to_a_kl=self._to_a_kl, enough=self._enough
        ):
            self._best = record, changes

    @property
    def is_empty(self) -> bool:
        """Whether none was added."""
        return self._best is None

    @property
    def result(self) -> Candidate:
        """The best candidate; if there were several, its record lists all in ``refinements``."""
        assert self._best is not None
        record, changes = self._best
        listed = self._measured if len(self._measured) > 1 else []
        return replace(record, refinements=listed), changes
