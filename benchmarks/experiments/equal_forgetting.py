"""Carry an edit of a model to a forget probability, and measure it there.

A *curve* is a list of evaluations along a method's way: ``forget_probability`` (mean over the
forget questions of the answer's probability per token), ``forget_loss``, ``kl`` held out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

import kfade
from kfade.curvature.curvature import Curvature, Matrices
from kfade.curvature.product import quadratic_form
from kfade.data.batches import Batch, make_batches
from kfade.data.sequences import TokenSequence
from kfade.errors import InputError
from kfade.method.gauge import parameter_changes
from kfade.method.measure import (
    Reference,
    TokenLosses,
    hidden_reference,
    mean_divergence,
    mean_objectives,
)
from kfade.method.step import Probe, StepSize, choose_alpha, gauss_newton_step
from kfade.method.update import Update
from kfade.models.head import read_head
from kfade.models.targets import Target
from kfade.runs.words import draw_of

Curve = list[dict[str, float]]
OBJECTIVES = {"margin": kfade.margin, "ce": kfade.cross_entropy}
BUDGET = 2048  # positions in one forward pass
GUESS_SEQUENCES, GUESS_KL = 4, 0.01  # an exact form and its KL, to begin a search with
# Where a model is noise its answers' probability may rise again: a search must not get there.
FAR_KL, MOST_TRIALS = 5.0, 12
MEASURED = 2  # every so many of the forget questions tell how far a method has come


class Ruler:
    """Measures edits of a model, by forward passes: KL on slices, forgetting on questions."""

    def __init__(self, model: Any, slices: Mapping[str, Sequence[TokenSequence]]) -> None:
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


def forgetting(model: Any, forget: Sequence[TokenSequence]) -> dict[str, float]:
    """How likely the answers are: ``forget_loss``, ``forget_probability``."""
    batches, losses = make_batches(forget, budget=BUDGET), TokenLosses()
    (loss,) = mean_objectives(model, batches, [losses])
    return {"forget_loss": loss, "forget_probability": losses.mean_probability(batches)}


@dataclass(frozen=True)
class Group:
    """What is to be forgotten, and how far."""

    name: str
    forget: Sequence[TokenSequence]
    start: float
    """Forget probability of the full model."""
    target: float
    """The one at which methods are compared."""

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
    draw = draw_of(labels or "sqrt")
    match estimator:
        case "identity":
            return kfade.Identity().fit(model, batches, targets)
        case "diagonal":
            return kfade.Diagonal(draw).fit(model, batches, targets)
        case "kfac":
            return kfade.KFAC(draw).fit(model, batches, targets)
    kfac = fit_of(name.replace("ekfac", "kfac"))
    return kfade.EKFAC(draw).correct(kfac, model, batches, targets)


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
        self, changes: Mapping[str, Tensor], guess: float, before: Update | None = None
    ) -> tuple[dict[str, Any], Update | None]:
        """Where along ``changes``, made after those of ``before``, the target lies within 3 % of
        the way, in nats."""
        curve: Curve = []
        base, gone = before or Update({}), self._group.start
        if base.deltas:
            gone = self.at(base)["forget_probability"]

        def probe(alpha: float) -> Probe:
            if len(curve) == MOST_TRIALS:
                raise InputError("no more trials")
            found = {"alpha": alpha, **self.at(base.plus(changes, alpha))}
            curve.append(found)
            far = found["kl"] > FAR_KL
            left = math.nan if far else found["forget_probability"]
            return Probe(alpha, found["kl"], math.nan, left, math.nan)

        start = Probe(0.0, math.nan, math.nan, gone, math.nan)
        size = StepSize(until_probability=self._group.target)
        try:
            best = choose_alpha(probe, size, share=1.0, start=start, guess=guess)[-1]
        except InputError:
            least = min(point["forget_probability"] for point in curve)
            return {
                "failure": f"not reached: {least:.3f} in {len(curve)} trials",
                "curve": curve,
            }, None
        update = base.plus(changes, best.alpha)
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


def nats(probability: float) -> float:
    """−log p; finite where p has underflowed."""
    return -math.log(max(probability, 1e-300))
