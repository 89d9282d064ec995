"""K-FADE and the baselines, each carried to a forget probability and measured there.

A *curve* is a list of evaluations along a method's way: ``forget_probability`` (mean over the
forget questions of the answer's probability per token), ``forget_loss``, ``kl`` held out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from tofu_small_data import BUDGET, Sizes, block_weights
from torch import Tensor
from torch.optim import AdamW

import kfade
from kfade.baselines import rmu
from kfade.baselines.loop import Settings, train
from kfade.baselines.methods import Method
from kfade.baselines.weights import Dense
from kfade.batches import Batch, make_batches
from kfade.batches import Sequence as Tokens
from kfade.cli.baseline_words import builder_of
from kfade.cli.session import Loaded
from kfade.curvature.curvature import Curvature, Matrices
from kfade.curvature.fit import correct_eigenvalues
from kfade.curvature.product import quadratic_form
from kfade.errors import InputError
from kfade.head import read_head
from kfade.layers import Target, decoder_blocks
from kfade.measure import (
    Reference,
    TokenLosses,
    hidden_reference,
    mean_divergence,
    mean_objectives,
)
from kfade.step import Probe, StepSize, choose_alpha, gauss_newton_step
from kfade.unlearn import parameter_changes
from kfade.update import Update

Curve = list[dict[str, float]]
OBJECTIVES = {"margin": kfade.margin, "ce": kfade.cross_entropy}
GUESS_SEQUENCES, GUESS_KL = 4, 0.01  # an exact form and its KL, to begin a search with
# Where a model is noise its answers' probability may rise again: a search must not get there.
FAR_KL, MOST_TRIALS = 5.0, 12
MEASURED = 2  # every so many of the forget questions tell how far a method has come
# Rates are constant: a run ends where it has forgotten enough, which nobody knows beforehand.
START_RATE, RMU_START_RATE = 2e-4, 1e-3
RMU_LENGTH = 3.0  # of the control vector, times the median length of hidden states at its block
RMU_RETAIN_WEIGHT = 100.0
RMU_STEPS = 3  # as many times the steps: its passes end at a third of the blocks


class Ruler:
    """Measures edits of a model, by forward passes: KL on slices, forgetting on questions."""

    def __init__(self, model: Any, slices: Mapping[str, Sequence[Tokens]]) -> None:
        self._model, self._head = model, read_head(model)
        self._base: dict[str, Reference] = {
            name: hidden_reference(model, make_batches(sequences, budget=BUDGET), name)
            for name, sequences in slices.items()
        }

    def kl(self, name: str, model: Any | None = None) -> float:
        """KL(base ‖ model as it is now) per scored token of a slice.

        Embeddings and head are the same in all models here, so one head serves both.
        """
        base = self._base[name]
        now = hidden_reference(model or self._model, base.batches, name)
        return mean_divergence(self._head, base, now)

    def some(self, name: str, count: int) -> list[Batch]:
        """A batch of a few of a slice's sequences."""
        batch = self._base[name].batches[0]
        few = (batch.input_BT, batch.target_BT, batch.loss_BT, batch.live_BT, batch.id_B)
        return [Batch(*(tensor[:count] for tensor in few))]


def forgetting(model: Any, forget: Sequence[Tokens]) -> dict[str, float]:
    """How likely the answers are: ``forget_loss``, ``forget_probability``."""
    batches, losses = make_batches(forget, budget=BUDGET), TokenLosses()
    (loss,) = mean_objectives(model, batches, [losses])
    return {"forget_loss": loss, "forget_probability": losses.mean_probability(batches)}


@dataclass(frozen=True)
class Group:
    """What is to be forgotten, and how far."""

    name: str
    forget: Sequence[Tokens]
    start: float
    """Forget probability of the full model."""
    target: float
    """The one at which methods are compared."""
    target_loss: float

    def forgotten(self, model: Any) -> dict[str, float]:
        """How far the model has forgotten: ``forget_loss``, ``forget_probability``."""
        return forgetting(model, self.forget[::MEASURED])


def fitted(
    name: str,
    model: Any,
    batches: Sequence[Batch],
    targets: Sequence[Target],
    fit_of: Callable[[str], Curvature],
) -> Curvature:
    """The curvature by the estimator of that name, by square-root draws or, as in ``ekfac
    sampled``, by sampled labels; EK-FAC from the K-FAC fit that ``fit_of`` gives."""
    estimator, _, labels = name.partition(" ")
    draw = kfade.sampled_labels if labels == "sampled" else kfade.square_root_draw
    match estimator:
        case "identity":
            return kfade.fit_identity(model, batches, targets)
        case "diagonal":
            return kfade.fit_diagonal(model, batches, targets, draw=draw)
        case "kfac":
            return kfade.fit_kfac(model, batches, targets, draw=draw)
    kfac = fit_of(name.replace("ekfac", "kfac"))
    return correct_eigenvalues(model, batches, targets, kfac, draw=draw)


class Search:
    """K-FADE on a group: a direction, and how far along it the target lies."""

    def __init__(self, model: Any, ruler: Ruler, group: Group) -> None:
        self._model, self._ruler, self._group = model, ruler, group

    def step(
        self,
        curvature: Curvature,
        gradient: Matrices,
        targets: Sequence[Target],
        *,
        damping: float,
        relative: bool = True,
        guess_kl: float | None,
    ) -> tuple[dict[str, Any], Update | None]:
        """One step to the target, and what it does there.

        Args:
            guess_kl: half the exact quadratic form where the target is likely to lie; the search
                begins at half of that way.
        """
        start = time.perf_counter()
        step = gauss_newton_step(curvature, gradient, damping=damping, relative=relative)
        changes = parameter_changes(targets, step.direction)
        solve = time.perf_counter() - start
        few = self._ruler.some("held_out", GUESS_SEQUENCES)
        exact = quadratic_form(self._model, few, targets, step.direction)
        guess = math.sqrt(2 * (guess_kl / 4 if guess_kl else GUESS_KL) / exact)
        row, update = self.along(changes, guess)
        row |= {"solve_seconds": solve, "search_seconds": time.perf_counter() - start - solve}
        if update is not None:
            row |= {"exact_kl": 0.5 * exact * row["alpha"] ** 2}
            row |= {"predicted_kl": step.predicted_kl(row["alpha"])}
        return row, update

    def along(
        self, changes: Mapping[str, Tensor], guess: float
    ) -> tuple[dict[str, Any], Update | None]:
        """Where along ``changes`` the target lies within 3 % of the way, in nats."""
        curve: Curve = []

        def probe(alpha: float) -> Probe:
            if len(curve) == MOST_TRIALS:
                raise InputError("no more trials")
            found = {"alpha": alpha, **self.at(Update({}).plus(changes, alpha))}
            curve.append(found)
            far = found["kl"] > FAR_KL
            forgotten = math.inf if far else nats(found["forget_probability"])
            return Probe(alpha, found["kl"], forgotten, 0.0)

        start = Probe(0.0, 0.0, nats(self._group.start), 0.0)
        size = StepSize(until=nats(self._group.target))
        try:
            best = choose_alpha(probe, size, share=1.0, start=start, guess=guess)[-1]
        except InputError:
            least = min(point["forget_probability"] for point in curve)
            return {
                "failure": f"not reached: {least:.3f} in {len(curve)} trials",
                "curve": curve,
            }, None
        update = Update({}).plus(changes, best.alpha)
        row: dict[str, Any] = {**curve[-1], "curve": curve}
        if self._group.name == "report":
            with update.applied_to(self._model):
                row["report_kl"] = self._ruler.kl("report")
        return row, update

    def at(self, update: Update) -> dict[str, float]:
        """A point of a curve: what the model with ``update`` does."""
        with update.applied_to(self._model):
            found = self._group.forgotten(self._model)
            return {**found, "kl": self._ruler.kl("held_out")}


def method_of(
    name: str, model: Any, forget: Sequence[Tokens], tokenizer: Any = None, **given: Any
) -> Method:
    """The baseline that ``kfade baseline`` calls so, with the loss options ``given``."""
    loaded = Loaded(model, tokenizer, [])
    if name != "rmu":
        return builder_of(name, given)(loaded, 0)
    layer = len(decoder_blocks(model)[1]) // 3
    block = rmu.find_block(model, layer)
    with torch.no_grad():
        lengths = [
            rmu.live_output(model, block, batch).norm(dim=-1)
            for batch in make_batches(forget, budget=BUDGET)
        ]
    length = RMU_LENGTH * torch.cat(lengths).median().item()
    given = {"layer": layer, "coefficient": length, "retain_weight": RMU_RETAIN_WEIGHT}
    return builder_of(name, given)(loaded, 0)


def start_rate(name: str) -> float:
    """Learning rate that the tuning of a baseline begins with."""
    return RMU_START_RATE if name == "rmu" else START_RATE


def steps_of(name: str, rate: float, sizes: Sizes) -> int:
    """Of a baseline's run when it is tuned, at most; it has twice as many when it is reported.

    A lower rate than the first has more of them, in proportion.
    """
    longer = max(1.0, start_rate(name) / rate) * (RMU_STEPS if name == "rmu" else 1)
    return round(sizes.steps * longer)


def baseline(
    name: str,
    rate: float,
    model: Any,
    ruler: Ruler,
    group: Group,
    fit: Sequence[Tokens],
    held_out: Sequence[Tokens],
    sizes: Sizes,
    report: Callable[[], float] | None = None,
) -> tuple[dict[str, Any], Update | None]:
    """Train until the forget probability is at the target or below and the KL, which training on
    retain data may bring down again, no longer falls; or until the steps are over.

    Args:
        report: KL on the report slice of the model as it is, measured at each evaluation.

    Returns:
        What was measured, with ``kl`` and ``report_kl`` as :func:`at_target` says, and the update
        of the evaluation of the lowest KL at the target or below; of the last where none is.
    """
    method = method_of(name, model, group.forget)
    steps = steps_of(name, rate, sizes)
    given = method.defaults
    reports, best, least_kl = [0.0], Update({}), math.inf

    def enough(checkpoint: Any, update: Update) -> bool:
        nonlocal best, least_kl
        reports.append(report() if report else math.nan)
        *_, before, now = (point["retain_kl"] for point in checkpoint.curve)
        if checkpoint.curve[-1]["forget_probability"] > group.target:
            return False
        if now < least_kl:
            best, least_kl = update, now
        return now >= before

    settings = Settings(
        lr=rate,
        steps=steps * (2 if report else 1),
        batch=sizes.batch,
        weight_decay=given.weight_decay,
        clip=given.clip,
        # Fused, a step over all weights takes a seventh of the time on a CPU.
        optimizer=partial(AdamW, fused=True) if given.optimizer is AdamW else given.optimizer,
    )
    start = time.perf_counter()
    try:
        update = train(
            model,
            method.terms,
            Dense(model, method.trains or block_weights(model)),
            forget=group.forget,
            retain=fit,
            held_out=held_out,
            settings=settings,
            evaluate_every=sizes.every * steps // sizes.steps,
            batch_tokens=400,
            seed=sizes.seed,
            on_evaluation=enough,
        )
    except InputError as error:  # the loss is not finite
        return {"failure": str(error), "curve": []}, None
    kept = ("step", "forget_loss", "forget_probability", "retain_loss")
    curve: Curve = []
    for told, report_kl in zip(update.provenance["curve"], reports, strict=True):
        curve.append({**{key: told[key] for key in kept}, "kl": told["retain_kl"]})
        if report:
            curve[-1]["report_kl"] = report_kl
    row: dict[str, Any] = {"curve": curve, "run_seconds": time.perf_counter() - start}
    found = at_target(curve, group.target)
    if found is None:
        least = min(point["forget_probability"] for point in curve)
        return {**row, "failure": f"not reached: {least:.3f} in {settings.steps} steps"}, update
    return {**row, **found}, best


def at_target(curve: Curve, target: float) -> dict[str, float] | None:
    """Each KL where the held-out one is lowest of all points of the curve at ``target`` or below;
    None where there are none.

    Where the curve passes ``target`` between two evaluations √KL is taken as linear in −log p.
    """
    found: list[dict[str, float]] = []
    for before, after in pairwise(curve):
        if after["forget_probability"] > target:
            continue
        reached = {name: after[name] for name in ("kl", "report_kl") if name in after}
        found.append(reached)
        if before["forget_probability"] > target:
            first, last = nats(before["forget_probability"]), nats(after["forget_probability"])
            share = (nats(target) - first) / (last - first)
            starts = {name: before.get(name, 0.0) for name in reached}
            passing = {
                name: ((1 - share) * starts[name] ** 0.5 + share * end**0.5) ** 2
                for name, end in reached.items()
            }
            found.append(passing)
    return min(found, key=lambda kls: kls["kl"], default=None)


def nats(probability: float) -> float:
    """−log p; finite where p has underflowed."""
    return -math.log(max(probability, 1e-300))


def lowest(rows: Iterable[tuple[Any, Mapping[str, Any]]]) -> Any | None:
    """Of (setting, row) pairs the setting of the lowest held-out KL at the target.

    Where none has got there: the one that came nearest. None of no rows.
    """

    def order(row: Mapping[str, Any]) -> tuple[bool, float]:
        if "failure" in row:
            return True, min((point["forget_probability"] for point in row["curve"]), default=1.0)
        return False, row["kl"]

    return min(rows, key=lambda pair: order(pair[1]), default=(None, {}))[0]


def thirds(blocks: int) -> list[str]:
    """The first, middle and last third of so many blocks."""
    bounds = [round(blocks * part / 3) for part in range(4)]
    return [f"{first}-{end - 1}" for first, end in pairwise(bounds)]
