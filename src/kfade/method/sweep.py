"""A grid of one-step edits from one curvature and one gradient of each objective.

Fit and gradient do not depend on damping and step size (paper, Appendix E). So each combination of
objective, blocks and damping costs one solve, shared by all its step sizes, and each point costs a
pass over the forget and held-out retain sequences that are measured. Refined directions continue
from one another.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

from torch import nn

from kfade.curvature.curvature import Curvature
from kfade.curvature.product import gauss_newton_product
from kfade.curvature.vectors import Storage, Vector
from kfade.data.batches import Batch
from kfade.data.sequences import TokenSequence
from kfade.errors import InputError
from kfade.method.gauge import Gauge, least_kl, parameter_changes, refuse_below
from kfade.method.gauges import MEASURED_SEQUENCES
from kfade.method.gradient import forget_gradient
from kfade.method.grid import ALL, Outcome, Point
from kfade.method.objectives import Objective, cross_entropy
from kfade.method.preflight import preflight
from kfade.method.refine import Directions
from kfade.method.sampling import Sampler
from kfade.method.search import Probe
from kfade.method.settings import Direction, Run
from kfade.method.size import choose_alpha
from kfade.method.step import Step
from kfade.method.update import Update
from kfade.models.interface import check_model, check_sets
from kfade.models.layers import parse_layers
from kfade.models.targets import Target
from kfade.runtime.counts import counted
from kfade.runtime.progress import track
from kfade.runtime.stages import stage


@dataclass(frozen=True)
class Shared:
    """What all points of a sweep share."""

    curvature: Curvature
    targets: Sequence[Target]
    """The weights that the curvature covers, in the order of the forward pass."""
    objectives: Mapping[str, Objective]
    """Objectives by the names that the points use."""
    forget_batch: int | None = None
    """Forget sequences of a gradient; all when None."""
    refine_sequences: int = Direction.refine_sequences
    """See :class:`~kfade.method.settings.Direction`."""
    batch_tokens: int = Run.batch_tokens
    """Positions in one forward pass."""
    recompute: bool = Run.recompute
    """For gradients and exact products, see :class:`~kfade.method.settings.Run`."""
    storage: Storage = Run.storage
    """Where gradients, directions, and weights that an edit replaces are kept."""
    seed: int = Run.seed
    """Keys the draws of sequences."""
    gradient: Callable[..., Vector] = forget_gradient
    """Computes the gradient of an objective, or reads one that was kept."""
    seconds: float = 0.0
    """Seconds spent before on what all points share, such as the fit."""

    @property
    def passes(self) -> dict[str, Any]:
        """The settings of a gradient and of an exact product."""
        return {"recompute": self.recompute, "storage": self.storage}


def sweep(
    model: nn.Module,
    points: Sequence[Point],
    shared: Shared,
    *,
    forget: Sequence[TokenSequence],
    held_out: Sequence[TokenSequence],
    retain: Sequence[TokenSequence] = (),
    done: Mapping[Point, Outcome] | None = None,
    on_point: Callable[[Outcome], None] | None = None,
) -> list[Outcome]:
    """Measure every point of a :func:`~kfade.method.grid.grid`. The model is left bit-identical.

    The update of a point is that of one step of :func:`kfade.unlearn` with the same curvature,
    forget set, damping and α. A point with a target KL starts its search from the result of the
    point before it on the same direction.

    Args:
        held_out: retain sequences that the fit has not used; KL is measured on them.
        retain: sequences for exact products, if directions are refined.
        done: earlier outcomes, which are not measured again.
        on_point: called with every new outcome.

    Raises:
        InputError: an empty set, a sequence that the model cannot read, blocks that the curvature
            does not cover, or every point failed.
    """
    sets = {"forget set": forget, "held-out retain set": held_out}
    if any(point.refine for point in points):
        sets["retain set"] = retain
    targets = shared.targets
    check_model(model, targets)
    check_sets(model, sets)
    within = {point.layers: targets_within(targets, point.layers) for point in points}
    sampler = Sampler(model, targets, batch_tokens=shared.batch_tokens, seed=shared.seed)
    forget_batches = sampler.draw(forget, shared.forget_batch)
    refining = sampler.draw(retain, shared.refine_sequences)
    with stage("check"):
        head = preflight(model, targets, recompute=shared.recompute)
        least = min((least_kl(point.size) for point in points), default=math.inf)
        measured = sampler.draw(forget, MEASURED_SEQUENCES)
        gauge = Gauge(model, sampler.all(held_out), measured, storage=shared.storage, head=head)
        floor = gauge.rounding_kl(targets, least)
        begin = replace(gauge.forgetting(Update({}), cross_entropy), retain_kl=0.0)
    outcomes = dict(done or {})

    def record(outcome: Outcome) -> None:
        outcomes[outcome.point] = outcome
        if on_point is not None:
            on_point(outcome)

    for name, own in _grouped(points, lambda p: p.objective):
        if all(point in outcomes for point in own):
            continue
        start = time.perf_counter()
        with stage("gradient"):
            objective = shared.objectives[name]
            gradient = shared.gradient(
                model, forget_batches, targets, objective, **shared.passes, head=head
            )
        share = shared.seconds / len(points) + (time.perf_counter() - start) / len(own)
        for (layers, _), line in track(_grouped(own, lambda p: p.direction), name):
            missing = [point for point in line if point not in outcomes]
            if missing:
                directions = _directions(gauge, refining, shared, gradient, within[layers], missing)
                ruler = _Ruler(gauge, begin, floor, within[layers])
                _measure_points(ruler, line, directions, share, outcomes, record)
                del directions  # before the next ones are made
    found = [outcomes[point] for point in points]
    if all(outcome.failure for outcome in found):
        raise InputError(f"no point of the sweep could be measured; the first: {found[0].failure}")
    return found


def _directions(
    gauge: Gauge,
    refining: Sequence[Batch],
    shared: Shared,
    gradient: Vector,
    targets: Sequence[Target],
    points: Sequence[Point],
) -> Directions:
    """The directions of points that differ in step size and refinement only."""
    product = partial(
        gauss_newton_product, gauge.model, refining, targets, **shared.passes, head=gauge.head
    )
    return Directions(
        cut(shared.curvature, targets),
        gradient,
        product,
        damping=points[0].damping,
        iterations=max(point.refine for point in points),
        storage=shared.storage,
    )


def targets_within(targets: Sequence[Target], layers: str) -> list[Target]:
    """The targets in the given blocks, as in ``3-6``; all targets for ``all``.

    Raises:
        InputError: a block without a target.
    """
    if layers == ALL:
        return list(targets)
    covered = {target.block for target in targets}
    wanted = parse_layers(layers, 10**6)
    if not wanted <= covered:
        raise InputError(
            f"--layers {layers}: the curvature does not cover block {min(wanted - covered)}; fit "
            "it with those blocks, or leave them out"
        )
    return [target for target in targets if target.block in wanted]


def cut(curvature: Curvature, targets: Sequence[Target]) -> Curvature:
    """The part of a curvature that covers these targets."""
    return curvature.only([t.name for t in targets], targets[0].device)


def _grouped(points: Sequence[Point], key: Callable[[Point], Any]) -> list[tuple[Any, list[Point]]]:
    return [(value, list(own)) for value, own in groupby(points, key)]


def _measure_points(
    ruler: _Ruler,
    points: Sequence[Point],
    directions: Directions,
    share: float,
    known: Mapping[Point, Outcome],
    record: Callable[[Outcome], None],
) -> None:
    """Measure the points that are not ``known``; ``record`` is called with each outcome, and makes
    it known, before the next is measured.

    Args:
        points: differ in step size and refinement only, in increasing order of refinement.
        directions: K-FADE's direction, then its refinements.
        share: seconds spent on what these points have in common with others, for each of them.
    """
    later = list(points)
    while any(point not in known for point in later):
        start = time.perf_counter()
        try:
            step = directions.next()
            failure = f"the exact system is solved after {counted(directions.refined, 'iteration')}"
        except InputError as error:
            step, failure = None, str(error)
        if step is None:
            for point in later:
                if point not in known:
                    record(Outcome(point, share, failure=failure))
            return
        changes = parameter_changes(ruler.targets, step.direction)
        share += (time.perf_counter() - start) / len(later)
        last: Outcome | None = None
        for point in later:
            if point.refine > directions.refined:
                break
            if point not in known:
                start = time.perf_counter()
                with stage("check"):
                    outcome = ruler.measure(point, step, changes, last)
                record(replace(outcome, seconds=share + time.perf_counter() - start))
            last = last if known[point].failure else known[point]
        later = [point for point in later if point.refine > directions.refined]


@dataclass(frozen=True)
class _Ruler:
    """Measures points of a sweep that change the same targets."""

    gauge: Gauge
    start: Probe
    """The measurements before any step."""
    floor: float
    """KL of rounding; a point that asks for less fails."""
    targets: Sequence[Target]

    def measure(self, point: Point, step: Step, changes: Vector, last: Outcome | None) -> Outcome:
        """The outcome of a point, without its seconds.

        Args:
            changes: the step's direction by parameter.
            last: the outcome of another size on the same direction, if there is one.
        """
        guess = 0.0  # not used where α is given
        if point.size.kl is not None:
            guess = self._guess(point.size.kl, step, last)

        def probe(alpha: float) -> Probe:
            return self.gauge.measure(Update({}).plus(changes, alpha), cross_entropy, alpha)

        try:
            refuse_below(self.floor, point.size, self.targets)
            size = point.size.decided(self.gauge.head.vocabulary)
            best = choose_alpha(probe, size, share=1.0, start=self.start, guess=guess)[-1]
        except InputError as error:
            return Outcome(point, 0.0, failure=str(error))
        if not all(map(math.isfinite, (best.retain_kl, best.forget_loss, best.forget_probability))):
            return Outcome(point, 0.0, failure="the edited model's outputs are not finite")
        return Outcome(
            point,
            0.0,
            alpha=best.alpha,
            predicted_kl=step.predicted_kl(best.alpha),
            retain_kl=best.retain_kl,
            forget_loss=best.forget_loss,
            forget_probability=best.forget_probability,
        )

    def _guess(self, kl: float, step: Step, last: Outcome | None) -> float:
        """An α near the one that gives that KL, which grows about as α²."""
        if last is not None and last.alpha and last.retain_kl:
            return last.alpha * math.sqrt(kl / last.retain_kl)
        exact = self.gauge.exact_form(step.direction, self.targets)
        return math.sqrt(2 * kl / exact)
