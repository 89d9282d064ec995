"""A grid of one-step edits from one curvature and one gradient of each objective.

Damping and step size can be changed after everything costly is done (paper, Appendix E): a point
of the grid costs a pass over the forget and the held-out retain sequences that are measured, and a
combination of objective, blocks and damping one solve, which all its step sizes share. Refined
directions go on from one another.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

from torch import Tensor, nn

from kfade.curvature.curvature import Curvature, Matrices
from kfade.curvature.product import gauss_newton_product, quadratic_form
from kfade.data.batches import Batch, draw_without_replacement, make_batches
from kfade.data.sequences import TokenSequence
from kfade.errors import InputError
from kfade.method.gauge import Gauge, least_kl, parameter_changes, refuse_below
from kfade.method.gradient import forget_gradient
from kfade.method.grid import ALL, Outcome, Point
from kfade.method.objectives import Objective, cross_entropy
from kfade.method.preflight import preflight
from kfade.method.refine import Directions
from kfade.method.settings import Direction, Run
from kfade.method.step import Probe, Step, choose_alpha
from kfade.method.unlearn import MEASURED_SEQUENCES, check_sets
from kfade.method.update import Update
from kfade.models.interface import check_model, check_readable
from kfade.models.layers import Target, parse_layers
from kfade.models.lengths import length_class
from kfade.runtime.progress import track
from kfade.runtime.stages import stage


@dataclass(frozen=True)
class Shared:
    """What all points of a sweep have in common."""

    curvature: Curvature
    targets: Sequence[Target]
    """The weights that the curvature covers, in the order of the forward pass."""
    objectives: Mapping[str, Objective]
    """By the names that the points use."""
    forget_batch: int | None = None
    """Forget sequences of a gradient; all of them when None."""
    refine_sequences: int = Direction.refine_sequences
    """As :class:`~kfade.method.settings.Direction` has it, of all points that refine."""
    batch_tokens: int = Run.batch_tokens
    """Positions in one forward pass."""
    recompute: bool = Run.recompute
    """Of gradients and exact products, as :class:`~kfade.method.settings.Run` has it."""
    seed: int = Run.seed
    """Keys the draws of sequences."""
    gradient: Callable[..., Matrices] = forget_gradient
    """Computes, or has kept, the gradient of an objective."""
    seconds: float = 0.0
    """Spent before on what all points share, such as the fit."""


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
    """Measure every point of a :func:`~kfade.method.grid.grid`. The model is left bit for bit as it
    was.

    A point's update is what :func:`kfade.unlearn` makes in one step from the same curvature,
    forget set, damping and α. One that asks for a KL begins its search at what the point before it
    on the same direction has found.

    Args:
        held_out: retain sequences that the fit has not seen; KL is measured on them.
        retain: what exact products run on, where directions are refined.
        done: outcomes of before, not measured again.
        on_point: called with every new outcome.

    Raises:
        InputError: an empty set, blocks that the curvature does not cover, or no point at all that
            could be measured.
    """
    sets = {"forget set": forget, "held-out retain set": held_out}
    if any(point.refine for point in points):
        sets["retain set"] = retain
    check_sets(sets)
    targets = shared.targets
    check_model(model, targets)
    device = targets[0].weight.device
    check_readable(model, [*forget, *retain, *held_out])
    within = {point.layers: targets_within(targets, point.layers) for point in points}
    batches_of = partial(
        make_batches, budget=shared.batch_tokens, device=device, group=length_class(model)
    )

    def drawn(sequences: Sequence[TokenSequence], count: int | None) -> list[Batch]:
        chosen = draw_without_replacement(len(sequences), count, 0, shared.seed)
        return batches_of([sequences[i] for i in chosen])

    forget_batches = drawn(forget, shared.forget_batch)
    refining = drawn(retain, shared.refine_sequences)
    with stage("check"):
        preflight(model, targets, recompute=shared.recompute)
        least = min((least_kl(point.size) for point in points), default=math.inf)
        measured = drawn(forget, MEASURED_SEQUENCES)
        scale = _Scale(model, batches_of(held_out), measured, targets, least)
    outcomes = dict(done or {})

    def tell(outcome: Outcome) -> None:
        outcomes[outcome.point] = outcome
        if on_point is not None:
            on_point(outcome)

    for name, own in _grouped(points, lambda p: p.objective):
        if all(point in outcomes for point in own):
            continue
        start = time.perf_counter()
        with stage("gradient"):
            objective = shared.objectives[name]
            matrices = shared.gradient(
                model, forget_batches, targets, objective, recompute=shared.recompute
            )
        share = shared.seconds / len(points) + (time.perf_counter() - start) / len(own)
        for (layers, damping, relative), line in track(_grouped(own, lambda p: p.direction), name):
            missing = [point for point in line if point not in outcomes]
            if not missing:
                continue
            own_targets = within[layers]
            directions = Directions(
                cut(shared.curvature, own_targets),
                matrices,
                partial(
                    gauss_newton_product, model, refining, own_targets, recompute=shared.recompute
                ),
                damping=damping,
                relative=relative,
                iterations=max(point.refine for point in missing),
            )
            _measure_line(scale, line, directions, own_targets, share, outcomes, tell)
            del directions  # before those of the next line
    found = [outcomes[point] for point in points]
    if all(outcome.failure for outcome in found):
        raise InputError(f"no point of the sweep could be measured; the first: {found[0].failure}")
    return found


def targets_within(targets: Sequence[Target], layers: str) -> list[Target]:
    """The targets in blocks as in ``3-6``, or in all.

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
    return curvature.only([t.name for t in targets], targets[0].weight.device)


def _grouped(points: Sequence[Point], key: Callable[[Point], Any]) -> list[tuple[Any, list[Point]]]:
    return [(value, list(own)) for value, own in groupby(points, key)]


def _measure_line(
    scale: _Scale,
    line: Sequence[Point],
    directions: Directions,
    targets: Sequence[Target],
    share: float,
    known: Mapping[Point, Outcome],
    tell: Callable[[Outcome], None],
) -> None:
    """Measure the points of ``line``, which lie on one direction and on what it is refined to, as
    far as they are not ``known``; each outcome is told, and known, before the next is measured."""
    later = list(line)
    while any(point not in known for point in later):
        start = time.perf_counter()
        try:
            step = directions.next()
            failure = f"the exact system is solved after {directions.refined} iterations"
        except InputError as error:
            step, failure = None, str(error)
        if step is None:
            for point in later:
                if point not in known:
                    tell(Outcome(point, share, failure=failure))
            return
        changes = parameter_changes(targets, step.direction)
        share += (time.perf_counter() - start) / len(later)
        last: Outcome | None = None
        for point in later:
            if point.refine > directions.refined:
                break
            if point not in known:
                start = time.perf_counter()
                with stage("check"):
                    outcome = scale.weigh(point, targets, step, changes, last)
                tell(replace(outcome, seconds=share + time.perf_counter() - start))
            last = last if known[point].failure else known[point]
        later = [point for point in later if point.refine > directions.refined]


class _Scale:
    """Measures edits; of the forget sequences, one by one, in the same pass."""

    def __init__(
        self,
        model: nn.Module,
        held_out: list[Batch],
        forget: list[Batch],
        targets: Sequence[Target],
        least: float,
    ) -> None:
        """``least``: the least KL that a point asks for."""
        self._model = model
        self._gauge = Gauge(model, held_out, forget)
        self._floor = self._gauge.rounding_kl(targets, least)

    def weigh(
        self,
        point: Point,
        targets: Sequence[Target],
        step: Step,
        changes: Mapping[str, Tensor],
        last: Outcome | None,
    ) -> Outcome:
        """The outcome of a point; ``last`` is one on the same direction."""
        guess = 0.0  # not used where α is given
        if point.size.kl is not None:
            guess = self._guess(point.size.kl, targets, step, last)

        def probe(alpha: float) -> Probe:
            return self._gauge.measure(Update({}).plus(changes, alpha), cross_entropy, alpha)

        try:
            refuse_below(self._floor, point.size, targets)
            start = Probe(0.0, 0.0, 0.0, 1.0, 0.0)  # only a forgetting target would look at it
            best = choose_alpha(probe, point.size, share=1.0, start=start, guess=guess)[-1]
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

    def _guess(
        self, kl: float, targets: Sequence[Target], step: Step, last: Outcome | None
    ) -> float:
        """An α near the one that gives that KL, which grows about as α²."""
        if last is not None and last.alpha and last.retain_kl:
            return last.alpha * math.sqrt(kl / last.retain_kl)
        batches = self._gauge.base.batches
        return math.sqrt(2 * kl / quadratic_form(self._model, batches, targets, step.direction))
