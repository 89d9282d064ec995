"""Bring an edit of a model to a given forget probability and measure it there.

The *forget probability* of token sequences is the mean over them of the geometric mean of the
probabilities of their scored tokens. A *curve* is a list of measurements: ``forget_probability``,
``forget_loss`` (nats per token) and ``kl`` (held-out KL from the unedited model, nats per token).
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kfade import Damping
from kfade.curvature.curvature import Curvature
from kfade.curvature.product import quadratic_form
from kfade.curvature.vectors import Vector
from kfade.data.batches import Batch
from kfade.data.sequences import TokenSequence
from kfade.errors import InputError
from kfade.evaluate.divergence import divergences, grouped, outputs, rounded
from kfade.method.gauge import parameter_changes
from kfade.method.measure import (
    Reference,
    TokenLosses,
    hidden_reference,
    mean_divergence,
    mean_objectives,
)
from kfade.method.search import Probe
from kfade.method.size import StepSize, choose_alpha
from kfade.method.step import gauss_newton_step
from kfade.method.update import Update
from kfade.models.head import read_head
from kfade.models.lengths import batches_for
from kfade.models.targets import Target

# Positions in one forward pass, and in training; a GPU takes more. Sums are then rounded in another
# order.
BUDGET = int(os.environ.get("KFADE_BATCH_TOKENS", "2048"))
TRAIN_BUDGET = int(os.environ.get("KFADE_BATCH_TOKENS", "400"))
GUESS_SEQUENCES, GUESS_KL = 4, 0.01  # sequences of the quadratic form, and the KL to start from
# Far away a model outputs noise, and the answers' probability may rise again: stop before that.
FAR_KL, MOST_TRIALS = 5.0, 12
EVERY = 2  # one in so many forget questions is measured


class Ruler:
    """Measures the KL between a model and its edits on named sets of sequences."""

    def __init__(self, model: Any, slices: Mapping[str, Sequence[TokenSequence]]) -> None:
        self._model, self._head = model, read_head(model)
        self._base: dict[str, Reference] = {
            name: hidden_reference(model, batches_for(model, sequences, BUDGET), name)
            for name, sequences in slices.items()
        }

    def kl(self, name: str, model: Any | None = None) -> float:
        """KL(base ‖ model) per scored token of a slice; by default of the model as it is now.

        Embeddings and head are the same in all models here, so one head serves both.
        """
        base = self._base[name]
        now = hidden_reference(model or self._model, base.batches, name)
        return mean_divergence(self._head, base, now)

    def first(self, name: str, count: int) -> list[Batch]:
        """A batch of a few sequences of a slice."""
        batch = self._base[name].batches[0]
        tensors = (batch.input_BT, batch.target_BT, batch.loss_BT, batch.live_BT, batch.id_B)
        return [Batch(*(tensor[:count] for tensor in tensors))]


def forgetting(model: Any, forget: Sequence[TokenSequence]) -> dict[str, float]:
    """``forget_loss`` and ``forget_probability`` of every ``EVERY``-th sequence."""
    batches, losses = batches_for(model, forget[::EVERY], BUDGET), TokenLosses()
    (loss,) = mean_objectives(model, batches, [losses])
    return {"forget_loss": loss, "forget_probability": losses.mean_probability(batches)}


def text_kls(
    base: Any, model: Any, update: Update, sequences: Sequence[TokenSequence]
) -> list[tuple[float, int]]:
    """(KL(base ‖ model with ``update``) per scored token, scored tokens) of each sequence."""
    groups = grouped(batches_for(base, sequences, BUDGET))
    kls = dict(
        divergences(
            groups,
            lambda number: outputs(base, groups[number], "base"),
            lambda: update.applied_to(model),
        )
    )
    means = torch.stack([kls[i].mean() for i in range(len(sequences))])
    return [(kl, len(kls[i])) for i, kl in enumerate(rounded(means))]


@dataclass(frozen=True)
class Group:
    """What is forgotten, and how far."""

    name: str
    forget: Sequence[TokenSequence]
    start: float
    """Forget probability of the model before it forgets."""
    target: float
    """Forget probability at which methods are compared."""

    def forgotten(self, model: Any) -> dict[str, float]:
        """How far the model has forgotten: at least ``forget_probability``."""
        return forgetting(model, self.forget)


class Search:
    """Finds how far along a direction the target of a group lies."""

    def __init__(self, model: Any, ruler: Ruler, group: Group) -> None:
        self._model, self._ruler, self._group = model, ruler, group

    def step(
        self,
        curvature: Curvature,
        gradient: Vector,
        targets: Sequence[Target],
        *,
        damping: float,
        relative: bool = True,
        guess_kl: float | None = None,
    ) -> tuple[dict[str, Any], Update | None]:
        """One Gauss-Newton step to the target, and what it does there.

        Args:
            guess_kl: half the exact quadratic form where the target is likely to lie; the search
                begins at half of that length.
        """
        start = time.perf_counter()
        step = gauss_newton_step(curvature, gradient, damping=Damping(damping, relative=relative))
        changes = parameter_changes(targets, step.direction)
        solve = time.perf_counter() - start
        few = self._ruler.first("held_out", GUESS_SEQUENCES)
        exact = quadratic_form(self._model, few, targets, step.direction)
        guess = math.sqrt(2 * (guess_kl / 4 if guess_kl else GUESS_KL) / exact)
        row, update = self.along(changes, guess)
        row |= {"solve_seconds": solve, "search_seconds": time.perf_counter() - start - solve}
        row |= {"damping": damping}
        if update is not None:
            row |= {"exact_kl": 0.5 * exact * row["alpha"] ** 2}
            row |= {"predicted_kl": step.predicted_kl(row["alpha"])}
        return row, update

    def along(
        self,
        changes: Mapping[str, Tensor],
        guess: float = 1.0,
        before: Update | None = None,
        begin: float | None = None,
    ) -> tuple[dict[str, Any], Update | None]:
        """The multiple of ``changes``, added to ``before``, that reaches the target.

        The target is met within 3 % of the difference in log probability. If it cannot be reached,
        or is where the search begins, the row has a ``failure`` and there is no update.
        """
        curve: list[dict[str, float]] = []
        base = before or Update({})
        if begin is None:
            begin = self._probability(base)
        if begin <= self._group.target:
            return {"failure": f"begins at {begin:.3f}, not above the target", "curve": []}, None

        def probe(alpha: float) -> Probe:
            if len(curve) == MOST_TRIALS:
                raise InputError("no more trials")
            found = {"alpha": alpha, **self.at(base.plus(changes, alpha))}
            curve.append(found)
            probability = math.nan if found["kl"] > FAR_KL else found["forget_probability"]
            return Probe(alpha, found["kl"], math.nan, probability, math.nan)

        start = Probe(0.0, math.nan, math.nan, begin, math.nan)
        size = StepSize(until_probability=self._group.target)
        try:
            best = choose_alpha(probe, size, share=1.0, start=start, guess=guess)[-1]
        except InputError:
            least = min(point["forget_probability"] for point in curve)
            failure = f"not reached: {least:.3f} in {len(curve)} trials"
            return {"failure": failure, "curve": curve}, None
        return {**curve[-1], "curve": curve}, base.plus(changes, best.alpha)

    def on_path(self, states: Sequence[Update]) -> tuple[dict[str, Any], Update | None]:
        """The point that reaches the target on the straight lines from each update to the next, or
        beyond the last one; as :meth:`along`, with the number of the update before it, ``after``.

        A run that is told to go no further stops there, for steps do not look ahead.

        Args:
            states: an empty update, then those after each step of a run. They forget more and more.
                Those before the last one that forget as much as it are left out, for a run scales
                its end down where it has gone too far.
        """

        @cache
        def probability(number: int) -> float:
            return self._probability(states[number])

        low, last = 0, len(states) - 1
        high = last
        while high > 1 and probability(high - 1) <= probability(last):
            high -= 1
        way = [*states[:high], states[last]]
        while high - low > 1:
            middle = (low + high) // 2
            if probability(middle) > self._group.target:
                low = middle
            else:
                high = middle
        changes = way[high].plus(way[low].deltas, -1.0).deltas
        row, found = self.along(changes, before=way[low], begin=probability(low))
        return {**row, "after": low}, found

    def _probability(self, update: Update) -> float:
        """The forget probability of the model with ``update``."""
        if not update.deltas:
            return self._group.start
        with update.applied_to(self._model):
            return self._group.forgotten(self._model)["forget_probability"]

    def at(self, update: Update) -> dict[str, float]:
        """A point of a curve: what the model with ``update`` does."""
        with update.applied_to(self._model):
            found = self._group.forgotten(self._model)
            return {**found, "kl": self._ruler.kl("held_out")}
