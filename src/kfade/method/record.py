"""What a step predicted and did, and which of several steps is the best."""

from __future__ import annotations

import math
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


class Best:
    """Of tries seen one after another the one that no other :meth:`~StepRecord.beats`, the first of
    equals; the directions of the others are not kept.

    Args:
        first_loss: forget loss at the start of the run, in nats per token.
    """

    def __init__(self, first_loss: float) -> None:
        self._first_loss = first_loss
        self._measured: list[dict[str, float]] = []
        self._best: Try | None = None

    def see(self, record: StepRecord, changes: dict[str, Tensor]) -> None:
        """One more try."""
        self._measured.append(record.measured)
        if self._best is None or record.beats(self._best[0], self._first_loss):
            self._best = record, changes

    @property
    def taken(self) -> Try:
        """The best so far, its record listing all where there were several."""
        assert self._best is not None
        record, changes = self._best
        listed = self._measured if len(self._measured) > 1 else []
        return replace(record, refinements=listed), changes
