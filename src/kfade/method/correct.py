"""A correction after the last step: less KL on the retain data, with the forgetting as it is.

A run begins where ∇K = 0, K = KL(p_θ₀ ‖ p_θ), and ends where it is not. With the fit G̃ at hand,
M = G̃ + λ_K I, g_K = ∇K and g_F the gradient of the forget loss at the present weights,

    d = −M⁻¹g_K,   r = M⁻¹g_F,   d⊥ = d − (g_Fᵀd / g_Fᵀr) r

minimises ½δᵀMδ + g_Kᵀδ subject to g_Fᵀδ = 0 (docs/mathematics.md). The weights change by t d⊥. G̃ is
an estimate and g_K fits its own data, so held-out data decide t: a first t by Newton's method, from
their own slope hᵀd⊥ and exact form d⊥ᵀGd⊥, then halved or doubled while that lowers their KL.

The size that was asked for is then met again by a change s r: a ``kl`` that is left is spent on
forgetting, as far as it is worth that, and forgetting that a target lacks is restored. Where a
correction has gone beyond the size, s < 0.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from kfade.curvature.curvature import Curvature
from kfade.curvature.damping import Damping
from kfade.curvature.vectors import Divided, OnDevice, Storage, Vector
from kfade.data.batches import Batch
from kfade.data.sequences import TokenSequence
from kfade.errors import InputError
from kfade.method.gauge import Gauge, parameter_changes
from kfade.method.gradient import forget_gradient, kl_gradient
from kfade.method.measure import hidden_reference
from kfade.method.record import CorrectionRecord, amended, ends_of
from kfade.method.refine import inner
from kfade.method.sampling import Sampler
from kfade.method.search import Probe, best_length
from kfade.method.settings import Run
from kfade.method.size import (
    LOSS_TOLERANCE,
    NoRiseError,
    StepSize,
    choose_alpha,
    shortfall,
    where_most_is_forgotten,
)
from kfade.method.update import Update
from kfade.models.targets import Target
from kfade.runtime.stages import stage


@dataclass(frozen=True)
class Ascent:
    """The direction of more forgetting."""

    direction: Vector
    """r = M⁻¹g_F."""
    slope: float
    """g_Fᵀr: change of the forget loss per unit of s."""


@dataclass(frozen=True)
class Descent:
    """The direction of less KL that leaves the forgetting as it is to first order."""

    direction: Vector
    """d⊥."""
    slope: float
    """g_Kᵀd⊥ ≤ 0: change of K per unit of t."""
    ascent_slope: float
    """g_Kᵀr: change of K per unit of s."""


def ascent(
    curvature: Curvature, forget: Vector, damping: Damping, storage: Storage = OnDevice()
) -> Ascent:
    """r = (G̃ + λI)⁻¹ g_F, kept in ``storage``."""
    direction = curvature.solve(forget, damping, storage)
    return Ascent(direction, inner(direction, forget))


def descent(
    curvature: Curvature,
    kl: Vector,
    up: Ascent,
    damping: Damping,
    storage: Storage = OnDevice(),
) -> Descent:
    """d⊥ = −M⁻¹g_K + (g_Kᵀr / g_Fᵀr) r, kept in ``storage``.

    This is d − (g_Fᵀd / g_Fᵀr) r, since g_Fᵀd = −g_FᵀM⁻¹g_K = −g_Kᵀr. So g_F is needed no longer.
    """
    r, ascent_slope = up.direction, inner(up.direction, kl)
    along = ascent_slope / up.slope if up.slope else 0.0
    direction = curvature.solve(kl, damping, storage)
    for name in direction:
        direction[name] = along * r[name] - direction[name]
    return Descent(direction, inner(direction, kl), ascent_slope)


@dataclass(frozen=True)
class Merit:
    """The KL at equal forgetting: KL · (rise before / rise)², since along a step the KL grows about
    as the square of the rise of the forget loss. Infinite if a part of more than
    ``LOSS_TOLERANCE`` of the rise is lost, or if there was none."""

    size: StepSize
    first: Probe
    """The measurements at the start of the run."""
    before: Probe
    """The measurements before the correction."""

    def __call__(self, probe: Probe) -> float:
        """In nats per loss token; lower is better."""
        start = self.size.forgotten(self.first)
        had = self.size.forgotten(self.before) - start
        rise = self.size.forgotten(probe) - start
        if not rise >= (1 - LOSS_TOLERANCE) * had > 0:
            return float("inf")
        if self.size.max_kl is not None and not probe.retain_kl <= self.size.max_kl:
            return float("inf")
        return probe.retain_kl * (had / rise) ** 2


class Corrector:
    """Corrects an update after the last step of its run.

    Args:
        retain: the retain sequences of the fit.
        size: the size of the run's steps.
    """

    def __init__(
        self,
        gauge: Gauge,
        targets: Sequence[Target],
        sampler: Sampler,
        retain: Sequence[TokenSequence],
        size: StepSize,
        run: Run,
    ) -> None:
        self._gauge, self._targets, self._sampler = gauge, targets, sampler
        self._retain, self._size, self._run = retain, size, run

    def correct(self, update: Update, curvature: Curvature, forget: Sequence[Batch]) -> Update:
        """The update with ``Run.correction.count`` corrections, and a record of each in that of its
        last step. Only weights that the update changes already take part.

        Args:
            forget: data of g_F.
        """
        changed = [target for target in self._targets if target.name in update.deltas]
        one = _Correction(self._gauge, changed, self._size, self._run)
        for number in range(self._run.correction.count):
            count = self._run.retain_drawn(len(self._retain))
            draw = self._sampler.draw(self._retain, count, number)
            with stage("correct"):
                update = one.made(update, curvature, draw, forget)
            if not update.provenance["steps"][-1]["corrections"][-1]["accepted"]:
                break
        return update


@dataclass(frozen=True)
class _Correction:
    """One correction of the weights of ``targets``."""

    gauge: Gauge
    targets: Sequence[Target]
    size: StepSize
    run: Run

    def made(
        self,
        update: Update,
        curvature: Curvature,
        retain: Sequence[Batch],
        forget: Sequence[Batch],
    ) -> Update:
        """The update with the correction, if it is accepted, and its record."""
        began, steps = time.perf_counter(), update.provenance["steps"]
        up, down = self._directions(update, curvature, retain, forget)
        slope, exact = self._along(update, down)
        first, before = ends_of(steps)
        merit = Merit(self.size, first, before)
        enough = (1 - self.run.correction.least_gain) * merit(before)
        trials: list[Probe] = []
        after = before
        if slope < 0 < exact:
            measure = self._measure(update, down.direction, trials)
            after = best_length(measure, -slope / exact, before, merit)
        length, accepted = after.alpha, merit(after) < enough
        corrected, again = self._moved(update, down.direction, length), 0.0
        lacking = shortfall(self.size, first, after) if accepted else 0.0
        if lacking:
            measure = self._measure(corrected, up.direction, trials)
            met = self._met(measure, lacking, (first, after), (up, down))
            accepted = met is not None and merit(met) < enough
            if not accepted and lacking > 0 and self.size.kl is not None:
                accepted = True  # a KL is not to be spent for less than it is worth
            elif met is not None:
                after, again = met, met.alpha
        if accepted:
            moved = self._moved(corrected, up.direction, again) if again else corrected
            update = moved.kept(self.run.storage)
        record = CorrectionRecord(
            accepted=accepted,
            length=length,
            forget_length=again,
            slope=down.slope,
            held_out_slope=slope,
            exact=exact,
            retain_kl_before=before.retain_kl,
            retain_kl_after=after.retain_kl,
            forget_loss_before=before.forget_loss,
            forget_loss_after=after.forget_loss,
            forget_probability_before=before.forget_probability,
            forget_probability_after=after.forget_probability,
            seconds=time.perf_counter() - began,
            probes=[asdict(trial) for trial in trials],
        )
        return _with(update, record)

    def _directions(
        self,
        update: Update,
        curvature: Curvature,
        retain: Sequence[Batch],
        forget: Sequence[Batch],
    ) -> tuple[Ascent, Descent]:
        """r and d⊥ at the weights that ``update`` makes."""
        gauge, settings, storage = self.gauge, self.run.correction, self.run.storage
        damping, passes = settings.damping, self._passes
        weigh = self.size.until_probability is not None  # it is to stay as it is
        names = [target.name for target in self.targets]
        curvature = curvature.only(names, self.targets[0].weight.device)
        with gauge.applied(update) as model:
            g_F = forget_gradient(
                model, forget, self.targets, settings.objective, weigh=weigh, **passes
            )
        up = ascent(curvature, g_F, damping, storage)
        del g_F
        # Each process keeps the hidden states of its own batches.
        own = storage.storage if isinstance(storage, Divided) else storage
        base = hidden_reference(gauge.model, retain, "base of the gradient", own)
        with gauge.applied(update) as model:
            g_K = kl_gradient(model, base, self.targets, **passes)
        del base
        return up, descent(curvature, g_K, up, damping, storage)

    @property
    def _passes(self) -> dict[str, Any]:
        """The settings of a gradient."""
        return {**self.run.passes, "head": self.gauge.head}

    def _along(self, update: Update, down: Descent) -> tuple[float, float]:
        """(hᵀd⊥, d⊥ᵀGd⊥) with the gradient h of the KL and the exact G of held-out retain data.

        On the data of g_K both are larger in size, the form by orders of magnitude: d⊥ lies where
        these data have more curvature than others.
        """
        gauge, base = self.gauge, self.gauge.base
        with gauge.applied(update) as model:
            slope = inner(down.direction, kl_gradient(model, base, self.targets, **self._passes))
            exact = gauge.exact_form(down.direction, self.targets)
        return slope, exact

    def _moved(self, update: Update, direction: Vector, length: float) -> Update:
        return update.plus(parameter_changes(self.targets, direction), length)

    def _measure(
        self, update: Update, direction: Vector, trials: list[Probe]
    ) -> Callable[[float], Probe]:
        """Measures the update with ``length`` times the direction, and notes it in ``trials``."""

        def measure(length: float) -> Probe:
            moved = self._moved(update, direction, length)
            trials.append(self.gauge.measure(moved, self.run.correction.objective, length))
            return trials[-1]

        return measure

    def _met(
        self,
        measure: Callable[[float], Probe],
        lacking: float,
        probes: tuple[Probe, Probe],
        directions: tuple[Ascent, Descent],
    ) -> Probe | None:
        """The probe along r that meets the size again; None if there is none. Of a KL that is left,
        as much is spent as raises the forgetting: none of it if nothing does.

        Args:
            lacking: of the size; where it is below 0 the way is back.
            probes: the measurements at the start of the run, and those where r begins.
        """
        size, (first, origin), (up, down) = self.size, probes, directions
        slope = up.slope if size.kl is None else down.ascent_slope
        toward = math.copysign(1.0, lacking)

        def along(length: float) -> Probe:
            return measure(toward * length)

        try:
            found = choose_alpha(
                along,
                # Going back lowers the KL, and the merit knows the cap.
                size if lacking > 0 else replace(size, max_kl=None),
                share=1.0,
                start=origin,
                guess=abs(lacking / slope) if slope else 1.0,
                first=first,
            )
            if lacking > 0:
                found = where_most_is_forgotten(
                    along, found, size, share=1.0, start=origin, first=first
                )
            return found[-1]
        except NoRiseError:
            return replace(origin, alpha=0.0)
        except InputError:
            return None


def _with(update: Update, record: CorrectionRecord) -> Update:
    """The update with the record of one more correction."""
    made = update.provenance["steps"][-1]["corrections"]
    facts: dict[str, Any] = {"corrections": [*made, asdict(record)]}
    if record.accepted:
        facts |= {
            "retain_kl": record.retain_kl_after,
            "forget_loss_after": record.forget_loss_after,
            "forget_probability_after": record.forget_probability_after,
        }
    return amended(update, **facts)
