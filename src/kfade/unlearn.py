"""The whole method on one page: fit, gradient, direction, size, and the update they make."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from kfade import distributed
from kfade.batches import Batch, digest_sequences, draw_without_replacement, make_batches
from kfade.batches import Sequence as Tokens
from kfade.curvature.curvature import Curvature, Matrices
from kfade.curvature.draws import Draw, square_root_draw
from kfade.curvature.fit import Fit, fit_ekfac
from kfade.curvature.product import quadratic_form
from kfade.errors import InputError
from kfade.gradient import forget_gradient
from kfade.head import read_head
from kfade.layers import Target, digest_weights, find_targets, parameter_names
from kfade.measure import hidden_reference, mean_divergence, mean_objectives
from kfade.models import frozen
from kfade.objectives import Objective, cross_entropy, margin
from kfade.stages import stage
from kfade.step import Probe, StepSize, choose_alpha, gauss_newton_step
from kfade.update import Update

MEASURED_SEQUENCES = 256  # forget sequences whose loss is measured at each trial of a step's size
DEFAULT_DAMPING = 0.1  # times each layer's mean eigenvalue
DEFAULT_KL = 0.01  # nats per token, where nothing is said, and where a search begins


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
    predicted_objective_change: float
    """α gᵀr, of the step's own forget batch."""
    measured_objective_change: float
    """On the forget sequences that are measured (all, up to ``MEASURED_SEQUENCES``)."""
    relative_change: dict[str, float] = field(default_factory=dict)
    """‖ΔW‖ / ‖W‖ of this step by weight."""
    probes: list[dict[str, float]] = field(default_factory=list)
    """Trials of the step's size, the chosen one last."""


def unlearn(
    model: nn.Module,
    *,
    forget: Sequence[Tokens],
    retain: Sequence[Tokens],
    held_out: Sequence[Tokens],
    targets: Sequence[Target] | None = None,
    fit: Fit = fit_ekfac,
    objective: Objective = margin,
    draw: Draw = square_root_draw,
    curvature: Curvature | None = None,
    damping: float = DEFAULT_DAMPING,
    relative: bool = True,
    exact_norm: bool = False,
    steps: int = 1,
    forget_batch: int | None = None,
    refit: bool = True,
    alpha: float | None = None,
    kl: float | None = None,
    until: float | None = None,
    max_kl: float | None = None,
    batch_tokens: int = 4096,
    seed: int = 0,
    start: Update | None = None,
    on_step: Callable[[Update], None] | None = None,
) -> Update:
    """K-FADE: a few uphill Gauss-Newton steps on the forget set (paper §3).

    At each step: fit G̃ on ``retain`` at the present weights, g on a batch of ``forget``,
    r = (G̃ + λI)⁻¹g, and go α along r/‖r‖_G̃. The model is left bit for bit as it was; the update
    is what is returned.

    Args:
        held_out: retain sequences that no fit sees; KL is measured on them.
        targets: weights to change; every feed-forward weight when None.
        curvature: a fit made before, used for the first step (for all if not ``refit``).
        damping: λ, times each layer's mean eigenvalue if ``relative``.
        exact_norm: measure the length of r by the exact Gauss-Newton form on ``held_out``
            instead of by G̃.
        forget_batch: forget sequences a step, without replacement; all of them when None.
        refit: fit anew at each step.
        alpha, kl, until, max_kl: how far to go, see :class:`~kfade.step.StepSize`.
        batch_tokens: positions in one forward pass.
        start: the update after some steps of the same run, to go on from.
        on_step: called with the update after every step.

    Raises:
        InputError: an empty set, an impossible size or target, numbers that are not finite.
    """
    size = StepSize(alpha, kl, until, max_kl)
    _check_arguments(forget, retain, held_out, steps, forget_batch, damping)
    targets = list(targets) if targets is not None else find_targets(model)
    device = targets[0].weight.device

    def batches_of(sequences: Sequence[Tokens]) -> list[Batch]:
        return make_batches(sequences, budget=batch_tokens, device=device)

    retain_batches = batches_of(retain)
    measured = draw_without_replacement(len(forget), MEASURED_SEQUENCES, 0, seed)
    with stage("check"):
        gauge = Gauge(
            model, batches_of(held_out), batches_of([forget[i] for i in measured]), objective
        )
    update = start or Update({}, _provenance(model, targets, forget, retain, held_out))
    for index in range(len(update.provenance["steps"]), steps):
        chosen = draw_without_replacement(len(forget), forget_batch, index, seed)
        forget_batches = batches_of([forget[i] for i in chosen])
        with stage("check"):
            before, reference = gauge.measure(update), gauge.latest
        if size.until is not None and size.until <= before.forget_loss:
            if index > 0:
                break
            raise InputError(
                f"--until forget_loss={size.until:.4g}: the loss is {before.forget_loss:.4g} "
                "already; ask for more"
            )
        if curvature is None or (refit and index > 0):
            at, key = (update, seed + index) if refit else (Update({}), seed)
            with stage("fit"), at.applied_to(model):
                curvature = fit(model, retain_batches, targets, draw=draw, seed=key)
        with update.applied_to(model):
            with stage("gradient"):
                gradient = forget_gradient(model, forget_batches, targets, objective)
            with stage("step"):
                step = gauss_newton_step(curvature, gradient, damping=damping, relative=relative)
                exact = quadratic_form(model, gauge.base.batches, targets, step.direction)
                if exact_norm:
                    step, exact = step.scaled(exact**-0.5), 1.0
        changes = parameter_changes(targets, step.direction)
        with stage("check"):
            probes = choose_alpha(
                lambda trial: gauge.measure(update.plus(changes, trial), trial),  # noqa: B023
                size,
                share=(index + 1) / steps,
                start=before,
                # What would bring the exact form to the KL asked for, or to a modest one.
                guess=math.sqrt(2 * (size.kl or DEFAULT_KL) / exact) / steps,
            )
            after = probes[-1]
            record = StepRecord(
                alpha=after.alpha,
                predicted_kl=step.predicted_kl(after.alpha),
                exact_kl=0.5 * exact * after.alpha**2,
                measured_kl=mean_divergence(gauge.head, reference, gauge.latest),
                retain_kl=after.retain_kl,
                forget_loss_before=before.forget_loss,
                forget_loss_after=after.forget_loss,
                predicted_objective_change=step.slope * after.alpha,
                measured_objective_change=after.objective - before.objective,
                relative_change=_relative_change(model, changes, after.alpha),
                probes=[asdict(p) for p in probes],
            )
        records = [*update.provenance["steps"], asdict(record)]
        update = update.plus(changes, after.alpha)
        update = Update(update.deltas, {**update.provenance, "steps": records})
        if on_step is not None:
            on_step(update)
    return update


class Gauge:
    """Measures edits of a model against the model itself, by forward passes only."""

    def __init__(
        self,
        model: nn.Module,
        held_out: Sequence[Batch],
        forget: Sequence[Batch],
        objective: Objective,
    ) -> None:
        self._model, self._forget, self._objective = model, forget, objective
        with frozen(model):
            self.head = read_head(model)
        self.base = hidden_reference(model, held_out, "base reference")
        self.latest = self.base
        """Hidden states of the model that was measured last, on held-out retain data."""

    def measure(self, update: Update, alpha: float = 0.0) -> Probe:
        """Retain KL from the base, and forget loss, of the model with ``update`` applied."""
        with update.applied_to(self._model) as model:
            self.latest = self.base
            if update.deltas:
                self.latest = hidden_reference(model, self.base.batches, "held-out KL")
            objectives = (cross_entropy, self._objective)
            loss, value = mean_objectives(model, self._forget, objectives)
        kl = mean_divergence(self.head, self.base, self.latest) if update.deltas else 0.0
        return Probe(alpha, kl, loss, value)


def parameter_changes(targets: Sequence[Target], matrices: Matrices) -> dict[str, torch.Tensor]:
    """Matrices [O, I] by target as changes by parameter, each in its own layout."""
    changes: dict[str, torch.Tensor] = {}
    for target in targets:
        changes.update(target.to_parameters(matrices[target.name]))
    return changes


def versions() -> dict[str, str]:
    """Versions of everything that the numbers depend on."""
    packages = ("kfade", "torch", "transformers", "safetensors")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def _provenance(
    model: nn.Module,
    targets: Sequence[Target],
    forget: Sequence[Tokens],
    retain: Sequence[Tokens],
    held_out: Sequence[Tokens],
) -> dict[str, Any]:
    return {
        "weights_sha256": digest_weights(model, parameter_names(targets)),
        "forget_sha256": digest_sequences(forget),
        "retain_sha256": digest_sequences(retain),
        "held_out_sha256": digest_sequences(held_out),
        "versions": versions(),
        "steps": [],
    }


def _relative_change(
    model: nn.Module, changes: dict[str, torch.Tensor], alpha: float
) -> dict[str, float]:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    relative = {}
    for name, change in changes.items():
        weight = distributed.whole(parameters[name].detach()).to(change.dtype)
        relative[name] = (alpha * change.norm() / weight.norm()).item()
    return relative


def _check_arguments(
    forget: Sequence[Tokens],
    retain: Sequence[Tokens],
    held_out: Sequence[Tokens],
    steps: int,
    forget_batch: int | None,
    damping: float,
) -> None:
    sets = {"forget set": forget, "retain set": retain, "held-out retain set": held_out}
    for name, sequences in sets.items():
        if not sequences:
            raise InputError(f"the {name} is empty: give at least one sequence")
    if steps < 1:
        raise InputError(f"--steps {steps}: give 1 or more")
    if forget_batch is not None and not 1 <= forget_batch <= len(forget):
        raise InputError(f"--forget-batch {forget_batch}: the forget set has {len(forget)}")
    if not (math.isfinite(damping) and damping >= 0):
        raise InputError(f"--damping {damping}: give a finite number, 0 or more")
