"""What a run is measured on: all data between its steps, a part of them in most trials."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from kfade.data.sequences import TokenSequence
from kfade.errors import InputError
from kfade.method.gauge import Gauge, least_kl, refuse_below
from kfade.method.objectives import Objective
from kfade.method.preflight import preflight
from kfade.method.record import amended, ends_of
from kfade.method.sampling import Sampler
from kfade.method.search import Probe, shortened
from kfade.method.settings import Run
from kfade.method.size import StepSize, aim_of
from kfade.method.update import Update
from kfade.models.targets import Target
from kfade.runtime.progress import say
from kfade.runtime.stages import stage

MEASURED_SEQUENCES = 256  # forget sequences whose loss is measured at each trial of a step's size
PART, LEAST_PART = 4, 8  # on the way: one in so many of all that is measured, but at least so many
LEAST_TOKENS = 1000  # scored tokens of a part, at least; with 300 the KL came out at 0.4 of itself


def part_of(count: int, tokens: int) -> int:
    """Number of sequences, of ``count`` with ``tokens`` in all that are measured, in the trials of
    steps on the way."""
    enough = math.ceil(LEAST_TOKENS * count / tokens)
    return min(count, max(LEAST_PART, count // PART, enough))


@dataclass(frozen=True)
class Gauges:
    """The gauges of a run. A step on the way is met within ``MIDWAY_TOLERANCE``, which trials on a
    part of the data decide; the last step, what a step begins from, and what a run reports are
    measured on all.
    """

    whole: Gauge
    part: Gauge
    begin: Probe
    """The measurements of all data before the first step."""
    steps: int
    """Number of steps of the run."""

    def of(self, step: int) -> Gauge:
        """The gauge of the trials of a step, counted from 0."""
        return self.part if step + 1 < self.steps else self.whole

    def confirmed(self, update: Update, objective: Objective) -> Update:
        """The update with what its last step ended with measured on all data."""
        if self._is_confirmed(update):
            return update
        with stage("check"):
            return self.noted(update, self.whole.measure(update, objective))

    def noted(self, update: Update, now: Probe) -> Update:
        """What :meth:`confirmed` gives, where ``now`` has been measured on all data."""
        return update if self._is_confirmed(update) else _after(update, now, confirmed=True)

    def _is_confirmed(self, update: Update) -> bool:
        last = update.provenance["steps"][-1]
        return bool(last.get("confirmed")) or last.get("measured_on") == self.whole.sequences

    def settled(self, update: Update, objective: Objective, size: StepSize) -> Update:
        """The update that :meth:`confirmed` gives; if that is beyond the size or the cap, a part of
        it.

        Steps on the way are met within a tolerance, on a part of the data. So they may have gone
        beyond the size of the whole run. The KL and the forgetting are continuous in the factor,
        and at 0 there is none: some factor meets each size, unless tokens change their experts.
        Then the farthest factor that was tried and is not beyond is taken.
        """
        update = self.confirmed(update, objective)
        first, _ = ends_of(update.provenance["steps"])
        for limit in size.limits(first):
            update = self._within(update, objective, limit)
        return update

    def _within(self, update: Update, objective: Objective, limit: StepSize) -> Update:
        first, now = ends_of(update.provenance["steps"])
        aim = aim_of(limit, 1.0, first, first)
        if not aim.is_beyond(now):
            return update
        probes: list[Probe] = []

        def probe(factor: float) -> Probe:
            part = update.plus(update.deltas, factor - 1)
            probes.append(self.whole.measure(part, objective, factor))
            return probes[-1]

        # From nothing on: near there the KL is a power of the factor, which a search takes it for.
        power = 2 if limit.kl is not None else 1
        with stage("check"):
            met = shortened(probe, probes, replace(now, alpha=1.0), aim, power)
        factor = met.alpha
        say(
            f"the steps went too far, so the update is scaled by {factor:.4g}: retain KL "
            f"{now.retain_kl:.2e} -> {met.retain_kl:.2e} nats/token, forget loss "
            f"{now.forget_loss:.3f} -> {met.forget_loss:.3f}"
        )
        scaled_by = update.provenance["steps"][-1].get("scaled_by", 1.0) * factor
        return _after(update.plus(update.deltas, factor - 1), met, scaled_by=scaled_by)


def _after(update: Update, now: Probe, **facts: Any) -> Update:
    """The update with ``now`` and ``facts`` in the record of its last step."""
    return amended(
        update,
        retain_kl=now.retain_kl,
        forget_loss_after=now.forget_loss,
        forget_probability_after=now.forget_probability,
        **facts,
    )


def gauges_of(
    model: nn.Module,
    targets: Sequence[Target],
    sampler: Sampler,
    forget: Sequence[TokenSequence],
    held_out: Sequence[TokenSequence],
    objective: Objective,
    size: StepSize,
    run: Run,
) -> Gauges:
    """The gauges on the forget set and the held-out retain set.

    Args:
        objective: that of the first step.

    Raises:
        InputError: the model cannot be run as it has to be, rounding hides the KL asked for, or the
            forgetting target is reached before the first step.
    """
    with stage("check"):
        head = preflight(model, targets, recompute=run.recompute)
        drawn = sampler.draw(forget, MEASURED_SEQUENCES)
        whole = Gauge(model, sampler.all(held_out), drawn, storage=run.storage, head=head)
        begin = whole.measure(Update({}), objective)
        share = run.decided(begin.forget_loss).share(0)
        floor = whole.rounding_kl(targets, least_kl(size, share))
        refuse_below(floor, size, targets, run.steps, share)
        if size.is_reached(begin, begin):
            raise InputError(_known_already(size, begin))
        tokens = whole.tokens
        counts = {name: part_of(count, tokens[name]) for name, count in whole.sequences.items()}
        if run.steps == 1 or counts == whole.sequences:
            return Gauges(whole, whole, begin, run.steps)
        few_held_out = sampler.draw(held_out, counts["held_out"])
        few = sampler.draw(forget, counts["forget"])
        part = Gauge(model, few_held_out, few, storage=run.storage, head=head)
    return Gauges(whole, part, begin, run.steps)


def _known_already(size: StepSize, probe: Probe) -> str:
    known = f"loss is {probe.forget_loss:.4g}"
    if size.until_probability is not None:
        known = f"probability is {probe.forget_probability:.4g}"
    return f"{size.target}: the {known} already; ask for more"
