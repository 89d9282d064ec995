"""What a step predicted and did, and which of several steps is the best."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from torch import Tensor


@dataclass(frozen=True)
class StepRecord:
    """What one step predicted and did. KL and losses are in nats per loss token."""

    alpha: float
    predicted_kl: float
    """½α²‖r‖²_G̃ of this step alone."""
    exact_kl: float
    """½δᵀGδ of this step with the exact G of held-out retain data."""
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
    """α gᵀr, of the step's own forget batch."""
    measured_objective_change: float
    """On the forget sequences that are measured (all, up to ``MEASURED_SEQUENCES``)."""
    relative_change: dict[str, float] = field(default_factory=dict)
    """‖ΔW‖ / ‖W‖ of this step by weight."""
    probes: list[dict[str, float]] = field(default_factory=list)
    """Trials of the step's size, the chosen one last."""
    refined: int = 0
    """Iterations beyond the K-FADE direction that this step's direction took."""
    refinements: list[dict[str, float]] = field(default_factory=list)
    """Where directions were refined: each one measured, by its ``refined``."""

    @property
    def measured(self) -> dict[str, float]:
        """What tells one direction from another."""
        names = ("refined", "alpha", "exact_kl", "measured_kl", "retain_kl", "forget_loss_after")
        return {name: getattr(self, name) for name in names}

    def beats(self, other: StepRecord, first_loss: float) -> bool:
        """Whether (forget loss − first loss) / √KL is greater, both of the run so far.

        Sizes are met within a tolerance only. Over it this ratio hardly changes along one
        direction, where the rise grows about as α and the KL as α².
        """
        rise, their_rise = (r.forget_loss_after - first_loss for r in (self, other))
        return rise * math.sqrt(other.retain_kl) > their_rise * math.sqrt(self.retain_kl)


Try = tuple[StepRecord, dict[str, Tensor]]
"""What a step along some direction did, and the direction by parameter: the change is α of it."""


def best_try(tries: Iterable[Try], first_loss: float) -> Try:
    """The one that no other :meth:`~StepRecord.beats`, the first of equals; holds two at a time.

    Args:
        first_loss: forget loss at the start of the run, in nats per token.
    """
    measured: list[dict[str, float]] = []
    best: Try | None = None
    for record, changes in tries:
        measured.append(record.measured)
        if best is None or record.beats(best[0], first_loss):
            best = record, changes
    assert best is not None
    record, changes = best
    return replace(record, refinements=measured if len(measured) > 1 else []), changes
