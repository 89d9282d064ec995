"""A grid of one-step edits from one curvature and one gradient of each objective.

Damping and step size can be changed after everything costly is done (paper, Appendix E): a point
of the grid costs a pass over the forget and the held-out retain sequences that are measured, and a
combination of objective, blocks and damping one solve, which all its step sizes share.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby, product
from typing import Any

from torch import Tensor, nn

from kfade.batches import Batch, draw_without_replacement, make_batches
from kfade.batches import Sequence as Tokens
from kfade.curvature.curvature import Curvature, Matrices
from kfade.curvature.product import quadratic_form
from kfade.errors import InputError
from kfade.gradient import forget_gradient
from kfade.layers import Target, parse_layers
from kfade.measure import TokenLosses
from kfade.objectives import Objective
from kfade.progress import track
from kfade.stages import stage
from kfade.step import Probe, Step, StepSize, choose_alpha, gauss_newton_step
from kfade.unlearn import MEASURED_SEQUENCES, Gauge, parameter_changes
from kfade.update import Update

ALL = "all"  # every block that the curvature covers
RULE = "highest forget loss among the points whose measured retain KL is at most max_kl"


@dataclass(frozen=True)
class Point:
    """One combination of the grid."""

    objective: str
    """Its name among the objectives."""
    layers: str
    """Blocks as in 3-6 or 0,2,8-11, or ``all``."""
    damping: float
    relative: bool
    """Damping in multiples of each layer's mean eigenvalue."""
    size: StepSize

    @property
    def settings(self) -> dict[str, Any]:
        """What was varied, by the command line's names."""
        damping = "relative_damping" if self.relative else "damping"
        asked = {k: v for k, v in asdict(self.size).items() if v is not None}
        return {"layers": self.layers, damping: self.damping, **asked}

    @property
    def id(self) -> str:
        """Its name in a log."""
        return ", ".join([self.objective, *(f"{k} {v}" for k, v in self.settings.items())])

    @property
    def direction(self) -> tuple[str, float, bool]:
        """What decides its direction, besides the objective."""
        return self.layers, self.damping, self.relative


@dataclass(frozen=True)
class Outcome:
    """What a point measured; KL and losses in nats per loss token, None where it failed."""

    point: Point
    seconds: float
    """Its own, with its share of what it has in common with others."""
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
        """What a log keeps of it."""
        own = {k: v for k, v in vars(self).items() if k != "point" and v is not None}
        return {"objective": self.point.objective, "settings": self.point.settings, **own}


def grid(
    objectives: Sequence[str],
    layers: Sequence[str],
    dampings: Sequence[float],
    sizes: Sequence[StepSize],
    *,
    relative: bool,
) -> list[Point]:
    """All combinations, those of one gradient and of one direction side by side.

    Raises:
        InputError: nothing to combine, a value given twice, or a damping that is none.
    """
    named: dict[str, Sequence[Any]] = {
        "objective": objectives, "layers": layers, "damping": dampings, "step size": sizes
    }  # fmt: skip
    for name, values in named.items():
        if not values:
            raise InputError(f"the sweep has no {name}: give at least one")
        if len(set(values)) < len(values):
            raise InputError(f"the sweep has a {name} twice: leave one out")
    for damping in dampings:
        if not (math.isfinite(damping) and damping >= 0):
            raise InputError(f"damping {damping}: give finite numbers, 0 or more")
    return [Point(o, b, d, relative, s) for o, b, d, s in product(*named.values())]


def sweep(
    model: nn.Module,
    points: Sequence[Point],
    *,
    forget: Sequence[Tokens],
    held_out: Sequence[Tokens],
    curvature: Curvature,
    targets: Sequence[Target],
    objectives: Mapping[str, Objective],
    gradient: Callable[..., Matrices] = forget_gradient,
    forget_batch: int | None = None,
    batch_tokens: int = 4096,
    seed: int = 0,
    shared_seconds: float = 0.0,
    done: Mapping[Point, Outcome] | None = None,
    on_point: Callable[[Outcome], None] | None = None,
) -> list[Outcome]:
    """Measure every point of a :func:`grid`; the model is left bit for bit as it was.

    A point's update is what :func:`kfade.unlearn` makes in one step from the same curvature,
    forget set, damping and α. One that asks for a KL begins its search at what the point before it
    on the same direction has found.

    Args:
        held_out: retain sequences that the fit has not seen; KL is measured on them.
        targets: the weights that the curvature covers, in the order of the forward pass.
        objectives: by the names that the points use.
        gradient: computes, or has kept, the gradient of an objective.
        forget_batch: forget sequences of the gradient; all of them when None.
        shared_seconds: spent before on what all points share, such as the fit.
        done: outcomes of before, not measured again.
        on_point: called with every new outcome.

    Raises:
        InputError: an empty set, blocks that the curvature does not cover, or no point at all that
            could be measured.
    """
    for name, sequences in {"forget set": forget, "held-out retain set": held_out}.items():
        if not sequences:
            raise InputError(f"the {name} is empty: give at least one sequence")
    device = targets[0].weight.device
    chosen = {point.layers: targets_within(targets, point.layers) for point in points}
    drawn = [
        [forget[i] for i in draw_without_replacement(len(forget), size, 0, seed)]
        for size in (forget_batch, MEASURED_SEQUENCES)
    ]
    forget_batches, measured, held = (
        make_batches(s, budget=batch_tokens, device=device) for s in (*drawn, held_out)
    )
    with stage("check"):
        scale = _Scale(model, held, measured)
    outcomes = dict(done or {})
    for name, own in _grouped(points, lambda p: p.objective):
        missing = [point for point in own if point not in outcomes]
        if not missing:
            continue
        start = time.perf_counter()
        with stage("gradient"):
            matrices = gradient(model, forget_batches, targets, objectives[name])
        share = shared_seconds / len(points) + (time.perf_counter() - start) / len(own)
        for (layers, _, _), line in track(list(_grouped(own, lambda p: p.direction)), name):
            if all(point in outcomes for point in line):
                continue
            for outcome in _along(
                scale, line, chosen[layers], curvature, matrices, outcomes, share
            ):
                outcomes[outcome.point] = outcome
                if on_point is not None:
                    on_point(outcome)
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


def pareto(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Those that no other beats, in order of KL.

    One beats another by less retain KL and no lower a forget loss, or by a higher forget loss and
    no more retain KL; of equally good ones all are kept.
    """
    front: list[Outcome] = []
    for outcome in sorted(_measured(outcomes), key=lambda o: (_values(o)[0], -_values(o)[1])):
        best = _values(front[-1]) if front else (0.0, -math.inf)
        if _values(outcome)[1] > best[1] or _values(outcome) == best:
            front.append(outcome)
    return front


def pick(outcomes: Sequence[Outcome], max_kl: float) -> Outcome | None:
    """The highest forget loss within the KL budget (:data:`RULE`), the least KL of equal ones."""
    within = [o for o in _measured(outcomes) if _values(o)[0] <= max_kl]
    return max(within, key=lambda o: (_values(o)[1], -_values(o)[0]), default=None)


def cut(curvature: Curvature, targets: Sequence[Target]) -> Curvature:
    """The part of a curvature that covers these targets."""
    return curvature.only([t.name for t in targets], targets[0].weight.device)


def _measured(outcomes: Sequence[Outcome]) -> list[Outcome]:
    return [outcome for outcome in outcomes if outcome.failure is None]


def _values(outcome: Outcome) -> tuple[float, float]:
    """(retain KL, forget loss)."""
    assert outcome.retain_kl is not None
    assert outcome.forget_loss is not None
    return outcome.retain_kl, outcome.forget_loss


def _grouped(points: Sequence[Point], key: Callable[[Point], Any]) -> Iterator[tuple[Any, list]]:
    return ((value, list(own)) for value, own in groupby(points, key))


def _along(
    scale: _Scale,
    line: Sequence[Point],
    targets: Sequence[Target],
    curvature: Curvature,
    gradient: Matrices,
    known: Mapping[Point, Outcome],
    share: float,
) -> Iterator[Outcome]:
    """Outcomes of the points on one direction that are not known yet."""
    start = time.perf_counter()
    part = cut(curvature, targets)
    damping, relative = line[0].damping, line[0].relative
    try:
        with stage("step"):
            step = gauss_newton_step(part, gradient, damping=damping, relative=relative)
    except InputError as error:
        failed = [point for point in line if point not in known]
        yield from (Outcome(point, share, failure=str(error)) for point in failed)
        return
    changes = parameter_changes(targets, step.direction)
    share += (time.perf_counter() - start) / len(line)
    last: Outcome | None = None
    for point in line:
        outcome = known.get(point)
        if outcome is None:
            start = time.perf_counter()
            with stage("check"):
                outcome = scale.weigh(point, targets, step, changes, last)
            own = time.perf_counter() - start
            outcome = replace(outcome, seconds=share + own)
            yield outcome
        last = last if outcome.failure else outcome


class _Scale:
    """Measures edits; of the forget sequences, one by one, in the same pass."""

    def __init__(self, model: nn.Module, held_out: list[Batch], forget: list[Batch]) -> None:
        self._model, self._forget = model, forget
        self._losses = TokenLosses()
        self._gauge = Gauge(model, held_out, forget, self._losses)

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
        probability = math.nan

        def probe(alpha: float) -> Probe:
            nonlocal probability
            found = self._gauge.measure(Update({}).plus(changes, alpha), alpha)
            probability = self._losses.mean_probability(self._forget)
            return found

        try:
            start = Probe(0.0, 0.0, 0.0, 0.0)  # only a forgetting target would look at it
            best = choose_alpha(probe, point.size, share=1.0, start=start, guess=guess)[-1]
        except InputError as error:
            return Outcome(point, 0.0, failure=str(error))
        if not all(map(math.isfinite, (best.retain_kl, best.forget_loss, probability))):
            return Outcome(point, 0.0, failure="the edited model's outputs are not finite")
        return Outcome(
            point,
            0.0,
            alpha=best.alpha,
            predicted_kl=step.predicted_kl(best.alpha),
            retain_kl=best.retain_kl,
            forget_loss=best.forget_loss,
            forget_probability=probability,
        )

    def _guess(
        self, kl: float, targets: Sequence[Target], step: Step, last: Outcome | None
    ) -> float:
        """An α near the one that gives that KL, which grows about as α²."""
        if last is not None and last.alpha and last.retain_kl:
            return last.alpha * math.sqrt(kl / last.retain_kl)
        batches = self._gauge.base.batches
        return math.sqrt(2 * kl / quadratic_form(self._model, batches, targets, step.direction))
