"""The whole method on one page: fit, gradient, direction, size, and the update they make."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from kfade.curvature.curvature import Matrices
from kfade.curvature.fit import Fit, fit_ekfac
from kfade.curvature.passes import refuse_float16
from kfade.curvature.product import gauss_newton_product, quadratic_form
from kfade.data.batches import Batch, draw_without_replacement, make_batches
from kfade.data.sequences import TokenSequence, check_sequences, digest_sequences
from kfade.errors import InputError
from kfade.method.gauge import Gauge, least_kl, parameter_changes, refuse_below
from kfade.method.gradient import forget_gradient
from kfade.method.measure import (
    Reference,
    mean_divergence,
)
from kfade.method.objectives import Objective
from kfade.method.preflight import preflight
from kfade.method.record import StepRecord, Try, best_try
from kfade.method.refine import refined_steps
from kfade.method.settings import DEFAULT_KL, Direction, Run
from kfade.method.step import Probe, Step, StepSize, choose_alpha
from kfade.method.update import Update
from kfade.models.interface import check_model, check_readable
from kfade.models.layers import Target, find_targets, parameter_names, weight_digests
from kfade.models.lengths import length_class
from kfade.runtime import distributed
from kfade.runtime.provenance import versions
from kfade.runtime.stages import stage

MEASURED_SEQUENCES = 256  # forget sequences whose loss is measured at each trial of a step's size


def unlearn(
    model: nn.Module,
    *,
    forget: Sequence[TokenSequence],
    retain: Sequence[TokenSequence],
    held_out: Sequence[TokenSequence],
    fit: Fit = fit_ekfac,
    direction: Direction = Direction(),
    size: StepSize = StepSize(kl=DEFAULT_KL),
    run: Run = Run(),
) -> Update:
    """K-FADE: a few uphill Gauss-Newton steps on the forget set (paper §3).

    At each step: fit G̃ on ``retain`` at the present weights, g on a batch of ``forget``,
    r = (G̃ + λI)⁻¹g, and go α along r/‖r‖_G̃. The model is left bit for bit as it was; the update
    is what is returned.

    Args:
        held_out: retain sequences that no fit sees; KL is measured on them.
        fit: the estimator of the curvature.
        direction: objective, damping and refinement of each step, see
            :class:`~kfade.method.settings.Direction`.
        size: how far to go, see :class:`~kfade.method.step.StepSize`.
        run: targets, number of steps, memory, seed, see :class:`~kfade.method.settings.Run`.

    Raises:
        InputError: an empty set, an impossible target, a model of an unknown kind, a token or a
            length that it does not read, a KL that the model's dtype cannot tell from rounding,
            numbers that are not finite.
    """
    _check_data(forget, retain, held_out, run.forget_batch)
    targets = list(run.targets) if run.targets is not None else find_targets(model)
    check_model(model, targets)
    check_readable(model, [*forget, *retain, *held_out])
    refuse_float16(targets)
    device = targets[0].weight.device
    batches_of = partial(
        make_batches, budget=run.batch_tokens, device=device, group=length_class(model)
    )

    def drawn(sequences: Sequence[TokenSequence], count: int | None, index: int) -> list[Batch]:
        chosen = draw_without_replacement(len(sequences), count, index, run.seed)
        return batches_of([sequences[i] for i in chosen])

    retain_batches = batches_of(retain)
    with stage("check"):
        preflight(model, targets, recompute=run.recompute)
        measured = drawn(forget, MEASURED_SEQUENCES, 0)
        gauge = Gauge(model, batches_of(held_out), measured)
        floor = gauge.rounding_kl(targets, least_kl(size, run.steps))
        refuse_below(floor, size, targets, run.steps)
    update = run.start or Update(
        {},
        {**base_facts(model, parameter_names(targets), forget, retain, held_out), "steps": []},
    )
    update = update.to(device)  # what was read from files lies in the CPU's memory
    curvature = run.curvature
    if curvature is not None:
        curvature = curvature.only([target.name for target in targets], device)
    for index in range(len(update.provenance["steps"]), run.steps):
        aim = direction.objective_of(index)
        with stage("check"):
            state = _State(update, aim, gauge.measure(update, aim), gauge.latest)
        if _is_reached(size, state.probe, first=index == 0):
            break
        if curvature is None or (run.refit and index > 0):
            at, key = (update, run.seed + index) if run.refit else (Update({}), run.seed)
            with stage("fit"), at.applied_to(model):
                curvature = fit(
                    model, retain_batches, targets, draw=run.draw, seed=key, recompute=run.recompute
                )
        with stage("gradient"), update.applied_to(model):
            forget_batches = drawn(forget, run.forget_batch, index)
            gradient = forget_gradient(model, forget_batches, targets, aim, recompute=run.recompute)
        refining = drawn(retain, direction.refine_sequences, index)
        directions = refined_steps(
            curvature,
            gradient,
            _exact_product(model, update, targets, refining, run.recompute),
            damping=direction.damping,
            relative=direction.relative,
            iterations=direction.refine,
        )
        tries = _tries(
            gauge, targets, state, directions, size, run.steps, exact_norm=direction.exact_norm
        )
        record, changes = best_try(tries, state.first_loss)
        records = [*update.provenance["steps"], asdict(record)]
        update = update.plus(changes, record.alpha)
        update = Update(update.deltas, {**update.provenance, "steps": records})
        if run.on_step is not None:
            run.on_step(update)
    return update


@dataclass(frozen=True)
class _State:
    """The edited model before a step, as it was measured."""

    update: Update
    objective: Objective
    """Of the step."""
    probe: Probe
    hidden: Reference
    """On held-out retain data."""

    @property
    def first_loss(self) -> float:
        """Forget loss at the start of the run."""
        steps = self.update.provenance["steps"]
        return steps[0]["forget_loss_before"] if steps else self.probe.forget_loss


def _is_reached(size: StepSize, probe: Probe, *, first: bool) -> bool:
    """Whether as much is forgotten already as should be."""
    if size.goal is None or size.goal > size.forgotten(probe):
        return False
    if first:
        known = f"loss is {probe.forget_loss:.4g}"
        if size.until_probability is not None:
            known = f"probability is {probe.forget_probability:.4g}"
        raise InputError(f"{size.target}: the {known} already; ask for more")
    return True


def _exact_product(
    model: nn.Module,
    update: Update,
    targets: Sequence[Target],
    batches: Sequence[Batch],
    recompute: bool,
) -> Callable[[Matrices], Matrices]:
    """δ ↦ Gδ with the exact G of ``batches`` at the weights that ``update`` makes."""

    def product(delta: Matrices) -> Matrices:
        with update.applied_to(model):
            return gauss_newton_product(model, batches, targets, delta, recompute=recompute)

    return product


def _tries(
    gauge: Gauge,
    targets: Sequence[Target],
    state: _State,
    directions: Iterable[Step],
    size: StepSize,
    steps: int,
    *,
    exact_norm: bool,
) -> Iterator[Try]:
    """Go along each direction as far as ``size`` says: what it did, and r by parameter."""
    update, before = state.update, state.probe
    share = (len(update.provenance["steps"]) + 1) / steps
    numbered: Iterable[tuple[int, Step]] = enumerate(directions)
    if size.alpha is not None:  # every direction has a length of its own: nothing to compare at
        numbered = deque(numbered, maxlen=1)
    taken = [record["exact_kl"] for record in update.provenance["steps"]]
    for refined, step in numbered:
        with stage("step"), update.applied_to(gauge.model):
            exact = quadratic_form(gauge.model, gauge.base.batches, targets, step.direction)
        if exact == 0:
            raise InputError(
                "the step does not change what the model says to the held-out retain data: are "
                "they one token over and over, or of unknown words only?"
            )
        if exact_norm:
            step, exact = step.scaled(exact**-0.5), 1.0
        changes = parameter_changes(targets, step.direction)
        # To where the exact form was last; else to the KL asked for, or to a modest one.
        near = taken[-1] if taken else (size.kl or DEFAULT_KL) / steps**2
        guess = math.sqrt(2 * near / exact)
        with stage("check"):
            probes = choose_alpha(
                lambda trial: gauge.measure(
                    update.plus(changes, trial),  # noqa: B023
                    state.objective,
                    trial,
                ),
                size,
                share=share,
                start=before,
                guess=guess,
            )
            after = probes[-1]
            record = StepRecord(
                alpha=after.alpha,
                predicted_kl=step.predicted_kl(after.alpha),
                exact_kl=0.5 * exact * after.alpha**2,
                measured_kl=mean_divergence(gauge.head, state.hidden, gauge.latest),
                retain_kl=after.retain_kl,
                forget_loss_before=before.forget_loss,
                forget_loss_after=after.forget_loss,
                forget_probability_before=before.forget_probability,
                forget_probability_after=after.forget_probability,
                predicted_objective_change=step.slope * after.alpha,
                measured_objective_change=after.objective - before.objective,
                relative_change=_relative_change(gauge.model, changes, after.alpha),
                probes=[asdict(p) for p in probes],
                refined=refined,
            )
        taken.append(record.exact_kl)
        yield record, changes


def base_facts(
    model: nn.Module,
    names: Sequence[str],
    forget: Sequence[TokenSequence],
    retain: Sequence[TokenSequence],
    held_out: Sequence[TokenSequence],
) -> dict[str, Any]:
    """What an update of the parameters ``names`` was computed on, for its provenance."""
    return {
        "architecture": type(model).__name__,
        **weight_digests(model, "weights", names),
        "forget_sha256": digest_sequences(forget),
        "retain_sha256": digest_sequences(retain),
        "held_out_sha256": digest_sequences(held_out),
        "versions": versions(),
    }


def _relative_change(
    model: nn.Module, changes: dict[str, Tensor], alpha: float
) -> dict[str, float]:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    relative = {}
    for name, change in changes.items():
        weight = distributed.gather_full(parameters[name].detach()).to(change.dtype)
        if weight.any():  # nothing can be said of a weight that is zero
            relative[name] = (alpha * change.norm() / weight.norm()).item()
    return relative


def _check_data(
    forget: Sequence[TokenSequence],
    retain: Sequence[TokenSequence],
    held_out: Sequence[TokenSequence],
    forget_batch: int | None,
) -> None:
    sets = {"forget set": forget, "retain set": retain, "held-out retain set": held_out}
    for name, sequences in sets.items():
        if not sequences:
            raise InputError(f"the {name} is empty: give at least one sequence")
        check_sequences(sequences, f"the {name}")
    if forget_batch is not None and not 1 <= forget_batch <= len(forget):
        raise InputError(f"--forget-batch {forget_batch}: the forget set has {len(forget)}")
