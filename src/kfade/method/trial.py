"""One step of a run: its size along each of its directions, and the best of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property

from torch import Tensor, nn

from kfade.curvature.vectors import Vector
from kfade.errors import InputError
from kfade.method.bands import in_bands
from kfade.method.gauge import Gauge, parameter_changes
from kfade.method.gauges import Gauges
from kfade.method.measure import mean_divergence
from kfade.method.objectives import Objective
from kfade.method.record import Best, Candidate, StepRecord, ends_of
from kfade.method.refine import Directions
from kfade.method.search import Probe, UnreachedError
from kfade.method.settings import Direction
from kfade.method.size import NoRiseError, StepSize, choose_alpha, rise_aim, where_most_is_forgotten
from kfade.method.step import Step
from kfade.method.update import Update
from kfade.models.targets import Target
from kfade.models.weights import Weights
from kfade.runtime import distributed
from kfade.runtime.progress import say
from kfade.runtime.stages import stage

Known = tuple[Objective, Probe]
"""Measurements, and the objective that they are of."""
LIKELY_KL = 0.001  # of a run to a forgetting target, before anything is measured


class Trial:
    """Tries one step along its directions. Measures the edited model before it when created, on all
    data.

    Args:
        update: the sum of all previous steps.
        direction: objective and bands of the step, and whether its length is exact.
        share: share of the way that is left of the run which this step goes.
        begin: an objective and the measurements before this step, of it, if they are known.
    """

    def __init__(
        self,
        gauges: Gauges,
        targets: Sequence[Target],
        update: Update,
        direction: Direction,
        size: StepSize,
        share: float,
        begin: Known | None = None,
    ) -> None:
        records = update.provenance["steps"]
        self._targets, self._direction, self._size = targets, direction, size
        self._last: Probe | None = None
        self._is_first, self._share = not records, share
        self._gauge = gauges.of(len(records))
        self._is_whole, self._part = self._gauge is gauges.whole, gauges.part
        with stage("check"):
            known, before = begin or self._measured_before(gauges.whole, update)
            self.objective = direction.objective_of(len(records), before.forget_loss)
            if not self._is_whole:
                self._gauge, before = self._gauge.anchored(update, before, self.objective)
                self._part = self._gauge
            elif self.objective != known:
                value = self._gauge.forgetting(update, self.objective).objective
                before = replace(before, objective=value)
        self.update = gauges.noted(update, before) if records else update
        """The sum of all previous steps, with what all data say of it."""
        self._before, self._hidden = before, self._gauge.latest
        # A search begins where the exact form has the value of the last step; the first one at the
        # KL of its share, or at a likely one.
        near = (size.kl or LIKELY_KL) * share**2
        self._near = near if self._is_first else records[-1]["exact_kl"]

    @property
    def is_beyond(self) -> bool:
        """Whether the size of the whole run is reached before this step, or passed."""
        return self._size.is_reached(self._first, self._before)

    @property
    def _first(self) -> Probe:
        """The measurements at the start of the run."""
        records = self.update.provenance["steps"]
        return ends_of(records)[0] if records else self._before

    def best(self, directions: Directions) -> Candidate:
        """Tries each direction at the size asked for and returns the best.

        If the size is α, only the last direction is tried: its length in each direction's own norm
        is no common scale for a comparison. Besides the vectors of ``directions``, two directions
        are held at a time: the current one and the best so far.

        Raises:
            NoRiseError, UnreachedError: no direction forgets more at any length, or has the size.
            InputError: a direction that changes nothing.
        """
        risen = rise_aim(self._size, self._share, self._first, self._before)
        enough = risen.accept[0] + self._before.forget_loss if risen is not None else math.inf
        best = Best(self._first.forget_loss, to_a_kl=self._size.kl is not None, enough=enough)
        failure: NoRiseError | UnreachedError | None = None
        step = directions.last() if self._size.alpha is not None else directions.next()
        while step is not None:
            step, exact = self._measured(step)
            try:
                best.add(*self._along(step, exact, directions.refined))
            except (NoRiseError, UnreachedError) as error:
                failure = error.with_traceback(None)  # which would keep the direction
                self._last = None  # what was measured last is not what was chosen
            del step  # free it before the next direction is computed
            step = directions.next()
        if failure is not None and best.is_empty:
            raise failure
        record, changes = best.result
        if self._last is not None and record.probes[-1] != asdict(self._last):
            self._last = None
        return record, changes

    @property
    def ended(self) -> Known | None:
        """The measurements after this step, if those were the last ones, and of all data."""
        if self._last is None or not self._is_whole:
            return None
        return self.objective, self._last

    def _measured_before(self, gauge: Gauge, update: Update) -> Known:
        """The measurements before this step, by its objective without a bound."""
        plain = self._direction.objective_of(len(update.provenance["steps"]), loss=0.0)
        return plain, gauge.measure(update, plain)

    def _measured(self, step: Step) -> tuple[Step, float]:
        """The step in bands, scaled to exact unit length if ``exact_norm``, and its squared length
        rᵀGr with the exact G of held-out retain data."""
        direction, bands = self._direction, self._direction.bands
        assert bands is not None, "the direction is decided"
        with stage("step"):
            predicted = self._is_first and not direction.at_prompts
            rise = None if predicted else self._rise
            step, exact = in_bands(step, self._targets, bands, self._forms, rise)
        if exact == 0:
            raise InputError(
                "the step does not change what the model says to the held-out retain data: are "
                "they one token over and over, or of unknown words only?"
            )
        return (step.scaled(exact**-0.5), 1.0) if direction.exact_norm else (step, exact)

    def _forms(self, parts: Sequence[Vector]) -> Tensor:
        """d_iᵀGd_j of each two parts of the direction."""
        with self._part.applied(self.update):
            return self._part.exact_forms(parts, self._targets)

    def _rise(self, part: Vector, form: float) -> float:
        """Rise of forgetting along a part of the direction, per unit of length; measured at the
        length where its exact form has the value of the last step."""
        if not form > 0:
            return 0.0
        length = math.sqrt(2 * self._near / form)
        changes = parameter_changes(self._targets, part)
        after = self._part.forgetting(self.update.plus(changes, length), self.objective)
        return (self._size.forgotten(after) - self._begin) / length

    @cached_property
    def _begin(self) -> float:
        """What is forgotten before this step, by the part of the data."""
        known = self._part is self._gauge
        before = self._before if known else self._part.forgetting(self.update, self.objective)
        return self._size.forgotten(before)

    def _along(self, step: Step, exact: float, refined: int) -> Candidate:
        """The record of the step at the size asked for, and its direction by parameter."""
        gauge, before = self._gauge, self._before
        changes = parameter_changes(self._targets, step.direction)

        def probe(alpha: float) -> Probe:
            return gauge.measure(self.update.plus(changes, alpha), self.objective, alpha)

        with stage("check"):
            probes = choose_alpha(
                probe,
                self._size,
                share=self._share,
                start=before,
                first=self._first,
                guess=math.sqrt(2 * self._near / exact),
            )
            reached = probes[-1]
            probes = where_most_is_forgotten(
                probe, probes, self._size, share=self._share, start=before, first=self._first
            )
            after = probes[-1]
            if after.alpha < reached.alpha:
                say(
                    f"the step ends at a retain KL of {after.retain_kl:.2e} nats/token: at "
                    f"{reached.retain_kl:.2e} it would forget less"
                )
            record = StepRecord(
                alpha=after.alpha,
                predicted_kl=step.predicted_kl(after.alpha),
                exact_kl=0.5 * exact * after.alpha**2,
                measured_kl=mean_divergence(gauge.head, self._hidden, gauge.latest),
                retain_kl=after.retain_kl,
                forget_loss_before=before.forget_loss,
                forget_loss_after=after.forget_loss,
                forget_probability_before=before.forget_probability,
                forget_probability_after=after.forget_probability,
                predicted_objective_change=step.slope * after.alpha,
                measured_objective_change=after.objective - before.objective,
                relative_change=_relative_change(gauge.model, changes, after.alpha),
                probes=[asdict(p) for p in probes],
                measured_on=gauge.sequences,
                refined=refined,
            )
        self._near, self._last = record.exact_kl, after
        return record, changes


def _relative_change(model: nn.Module, changes: Vector, alpha: float) -> dict[str, float]:
    parameters = Weights(model)
    relative = {}
    for name, change in changes.items():
        weight = distributed.gather_full(parameters[name].detach()).to(change.dtype)
        if weight.any():  # undefined for a weight of zeros
            relative[name] = (alpha * change.norm() / weight.norm()).item()
    return relative
