"""Measure the effects of an update on a model, by forward passes."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

from torch import Tensor, nn

from kfade.curvature.product import gram_matrix
from kfade.curvature.vectors import Layerwise, OnDevice, Storage, Vector
from kfade.data.batches import Batch
from kfade.errors import InputError
from kfade.method.measure import (
    TokenLosses,
    hidden_reference,
    mean_divergence,
    mean_objectives,
    rounding_changes,
)
from kfade.method.objectives import Objective
from kfade.method.search import Probe
from kfade.method.size import StepSize
from kfade.method.update import Update
from kfade.models.head import Head, read_head
from kfade.models.load import frozen
from kfade.models.targets import Target
from kfade.models.weights import parameter_names

MOST_FACTOR = 10.0  # a part with less of the KL than that does not tell how it grows
LEAST_PROBABILITY = 1e-300  # a probability may underflow
FLOAT32_SAFE = 1e-8  # nats per token: far above the KL of rounding to float32


class Gauge:
    """Measures updates of a model: KL from the model without them, and forgetting.

    Args:
        held_out: retain data that KL is measured on.
        forget: data that losses and objectives are measured on.
        storage: keeps the weights that an update replaces while it is measured.
        head: the model's head, if it has been read before (reading it runs trial passes).
    """

    def __init__(
        self,
        model: nn.Module,
        held_out: Sequence[Batch],
        forget: Sequence[Batch],
        *,
        storage: Storage = OnDevice(),
        head: Head | None = None,
    ) -> None:
        self.model, self._forget, self._storage = model, forget, storage
        with frozen(model):
            self.head = head or read_head(model)
        self.base = hidden_reference(model, held_out, "base reference")
        self.latest = self.base
        """Hidden states on held-out retain data with the update that was measured last."""
        self._loss_offset = self._log_offset = 0.0
        self._kl_factor, self._kl_offset = 1.0, 0.0

    @property
    def sequences(self) -> dict[str, int]:
        """Number of sequences that are measured: ``forget`` and ``held_out``."""
        return {name: sum(len(b.loss_BT) for b in batches) for name, batches in self._sets.items()}

    @property
    def tokens(self) -> dict[str, int]:
        """Number of scored tokens that are measured: ``forget`` and ``held_out``."""
        return {name: sum(b.loss_tokens for b in batches) for name, batches in self._sets.items()}

    @property
    def _sets(self) -> dict[str, Sequence[Batch]]:
        return {"forget": self._forget, "held_out": self.base.batches}

    def applied(self, update: Update) -> AbstractContextManager[nn.Module]:
        """The model with ``update`` within the ``with``."""
        return update.applied_to(self.model, self._storage)

    def measure(self, update: Update, objective: Objective, alpha: float = 0.0) -> Probe:
        """Retain KL, forget loss and probability, and objective of the model with ``update``."""
        with self.applied(update) as model:
            self.latest = self.base
            if update.deltas:
                self.latest = hidden_reference(model, self.base.batches, "held-out KL")
            forgotten = self._forgetting(model, objective, alpha)
        kl = mean_divergence(self.head, self.base, self.latest) if update.deltas else 0.0
        return replace(forgotten, retain_kl=self._kl_factor * kl + self._kl_offset)

    def forgetting(self, update: Update, objective: Objective) -> Probe:
        """What :meth:`measure` gives, without the retain KL, which is not a number here."""
        with self.applied(update) as model:
            return self._forgetting(model, objective, 0.0)

    def _forgetting(self, model: nn.Module, objective: Objective, alpha: float) -> Probe:
        losses = TokenLosses()
        loss, value = mean_objectives(model, self._forget, (losses, objective), self.head)
        probability = losses.mean_probability(self._forget) * math.exp(self._log_offset)
        return Probe(alpha, math.nan, loss + self._loss_offset, probability, value)

    def anchored(self, update: Update, now: Probe, objective: Objective) -> tuple[Gauge, Probe]:
        """A gauge that estimates what more data than its own would measure near ``update``, and
        what it measures there.

        Its own data are a control variate. The forget loss, and the logarithm of the probability,
        are shifted by constants, and the KL is multiplied by one, such that with ``update`` they
        are those of all the data. What a factor of ``MOST_FACTOR`` leaves of the KL is added.

        Args:
            now: the measurements of all the data with ``update``.
        """
        found = copy.copy(self)
        own = found.measure(update, objective)
        found._loss_offset = now.forget_loss - own.forget_loss
        found._log_offset = math.log(max(now.forget_probability, LEAST_PROBABILITY)) - math.log(
            max(own.forget_probability, LEAST_PROBABILITY)
        )
        if math.isfinite(own.retain_kl) and 0 < now.retain_kl < math.inf:
            whole = now.retain_kl / max(own.retain_kl, math.ulp(0.0))
            found._kl_factor = min(whole, MOST_FACTOR)
            if whole > MOST_FACTOR:
                found._kl_offset = now.retain_kl - MOST_FACTOR * own.retain_kl
        return found, replace(now, objective=own.objective)

    def exact_form(self, direction: Vector, targets: Sequence[Target]) -> float:
        """dᵀGd with the exact G of held-out retain data, at the model's present weights.

        Args:
            direction: matrices [O, I] by target. Targets that have none stay as they are.
        """
        return float(self.exact_forms([direction], targets))

    def exact_forms(self, directions: Sequence[Vector], targets: Sequence[Target]) -> Tensor:
        """d_iᵀGd_j of each two directions, in float64 on the CPU; see :meth:`exact_form`."""
        return gram_matrix(self.model, self.base.batches, targets, directions, head=self.head)

    def rounding_kl(self, targets: Sequence[Target], asked: float = math.inf) -> float:
        """KL due to rounding alone, measured with :func:`~kfade.method.measure.rounding_changes`.

        Args:
            asked: the least KL that is aimed at. In float32 rounding gave 3e-11 on a real model, so
                for ``FLOAT32_SAFE`` and more it is taken as 0 without a pass.
        """
        if targets[0].dtype.itemsize >= 4 and asked >= FLOAT32_SAFE:
            return 0.0
        changes = rounding_changes(self.model, parameter_names(targets))
        with self.applied(Update(changes)) as model:
            moved = hidden_reference(model, self.base.batches, "KL of rounding")
        return mean_divergence(self.head, self.base, moved)


def least_kl(size: StepSize, share: float = 1.0) -> float:
    """The least KL that a run aims at: after its first step, which goes that share of the way, or
    the cap; ∞ if neither."""
    first = math.inf if size.kl is None else size.kl * share**2
    return min(first, math.inf if size.max_kl is None else size.max_kl)


def refuse_below(
    floor: float,
    size: StepSize,
    targets: Sequence[Target],
    steps: int = 1,
    share: float = 1.0,
) -> None:
    """Raise InputError if a KL below ``floor``, that of rounding, is asked for.

    Also if the first of ``steps``, which goes that share of the way, would aim at one.
    """
    if least_kl(size, share) >= floor:
        return
    dtype = str(targets[0].dtype).removeprefix("torch.")
    means = (
        f"rounding to {dtype} alone measures as {floor:.1e} nats per token on the held-out "
        "retain data"
    )
    finer = ", or use --dtype float32" if targets[0].dtype.itemsize < 4 else ""
    for flag, asked in (("--kl", size.kl), ("--max-kl", size.max_kl)):
        if asked is not None and asked < floor:
            raise InputError(f"{flag} {asked:g}: {means}; ask for more{finer}")
    first = least_kl(replace(size, max_kl=None), share)
    raise InputError(
        f"--kl {size.kl:g} in --steps {steps}: the first step aims at {first:.1e}, but {means}; "
        f"ask for more or take fewer steps{finer}"
    )


def parameter_changes(targets: Sequence[Target], matrices: Vector) -> Vector:
    """Matrices [O, I] by target as changes by parameter, in the parameters' own layout; each is
    made when it is read. Targets that have none are left out."""
    changed = [target for target in targets if target.name in matrices]
    target_of = {name: t for t in changed for name in (t.name, t.bias) if name is not None}

    def change(name: str) -> Tensor:
        target = target_of[name]
        return target.to_parameters(matrices[target.name])[name]

    return Layerwise(target_of, change)
