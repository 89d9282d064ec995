"""The training loop of all baselines: steps, evaluations, an ``Update``.

A step (:mod:`kfade.baselines.training`) depends on its number and the seed alone, so a run that was
interrupted ends where an uninterrupted one does. With a selection
(:mod:`kfade.baselines.repselect`) all steps go along one direction, found before the first.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace

from torch import nn

from kfade.baselines.checkpoint import Checkpoint, Row, keep
from kfade.baselines.losses import Net, Term
from kfade.baselines.repselect import select
from kfade.baselines.settings import Settings
from kfade.baselines.training import Training, refuse_not_finite
from kfade.baselines.weights import Trainable
from kfade.curvature.vectors import Divided, InHostMemory, Vector
from kfade.curvature.vectors import keep as keep_vector
from kfade.data.sequences import TokenSequence
from kfade.errors import InputError
from kfade.method.unlearn import base_facts
from kfade.method.update import Update
from kfade.models.head import read_head
from kfade.models.interface import check_sets
from kfade.models.targets import memory_of
from kfade.runtime.progress import track
from kfade.runtime.stages import stage

SETS = {"forget": "forget set", "retain": "retain set", "held_out": "held-out retain set"}


def train(
    model: nn.Module,
    terms: Sequence[Term],
    trainable: Trainable,
    sets: Mapping[str, Sequence[TokenSequence]],
    settings: Settings,
    *,
    start: Checkpoint | None = None,
    on_evaluation: Callable[[Checkpoint, Update], bool | None] | None = None,
) -> Update:
    """Minimise the terms; the model is left bit for bit as it was.

    The model's own dropout is off. The update's provenance has the ``curve`` of evaluations, of
    which the first is before training, and the ``kept_step`` that the update is of.

    Args:
        sets: ``forget`` and ``retain`` sequences to train on; ``held_out``, retain sequences to
            measure KL on.
        start: an interrupted run to go on from.
        on_evaluation: called with what is needed to go on, and with the update so far. The run
            ends there if it returns True.

    Raises:
        InputError: an empty set, a sequence that the model cannot read, a loss that is not finite,
            or a sharpness-aware term of a model in 16 bits.
    """
    check_sets(model, {called: sets[name] for name, called in SETS.items()})
    _refuse_rounded_away(model, terms)
    facts = base_facts(model, trainable.names, **sets)
    with trainable.training():
        run = Training(_net(model, trainable), terms, trainable, sets, settings)
        if settings.selection is not None:
            run.selected = select(run, settings.selection)
        with stage("check"):
            gauge = run.gauge()
        curve: list[Row] = []
        kept: Vector = {}
        if start is None:
            with stage("check"):
                curve.append({"step": 0, **gauge.measure()})
        else:
            start.restore(trainable, run.optimizer)
            curve += start.curve
            kept = trainable.deltas()
            if start.kept:
                kept = keep_vector(start.kept, Divided(InHostMemory()))
        losses: list[float] = []
        for step in track(range(int(curve[-1]["step"]), settings.steps), "training"):
            losses.append(run.step(step))
            if not settings.evaluates_after(step + 1):
                continue
            with stage("check"):
                row = {"step": step + 1, **gauge.measure()}
            if run.selected is not None:  # steps along a known direction measure no loss
                refuse_not_finite(row["forget_loss"], step, "--lr")
            curve.append({**row, "loss": sum(losses) / len(losses)})
            losses = []
            deltas = trainable.deltas()
            is_kept = keep(curve, settings.max_kl) == step + 1
            kept = deltas if is_kept else kept
            if on_evaluation is not None:
                other = {} if is_kept else kept
                checkpoint = Checkpoint.of(curve, facts, other, trainable, run.optimizer)
                if on_evaluation(checkpoint, Update(deltas, {**facts, "curve": curve})):
                    break
    return Update(kept, {**facts, "curve": curve, "kept_step": keep(curve, settings.max_kl)})


def _refuse_rounded_away(model: nn.Module, terms: Sequence[Term]) -> None:
    """Raises InputError for a sharpness-aware term where rounding would undo the step uphill.

    It moves each of P weights by about ρ/√P: 1e-6 for ρ = 0.01 and P = 10⁸. At a weight of 0.02
    numbers in bfloat16 are 1e-4 apart.
    """
    radius = max(term.radius for term in terms)
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if radius and any(dtype.itemsize < 4 for dtype in dtypes):
        raise InputError(
            f"--sam-radius {radius:g} moves weights by less than 16 bits resolve: give --dtype "
            "float32"
        )


def _net(model: nn.Module, trainable: Trainable) -> Net:
    """The model, its head, and a copy of the head where training would change it."""
    head = read_head(model)
    owners: dict[Hashable, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(memory_of(parameter), set()).add(name)
    trained = any(owners[memory_of(p)] & set(trainable.names) for p in head.linear.parameters())
    base_head = replace(head, linear=copy.deepcopy(head.linear)) if trained else head
    return Net(model, head, base_head)
