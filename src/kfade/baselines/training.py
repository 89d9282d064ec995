"""The steps of a training run: the batches of each, their gradients, the optimiser.

Each step draws ``accumulate`` batches of forget and as many of retain sequences. Its loss is the
mean over them of a method's terms (:mod:`kfade.baselines.losses`). For sharpness-aware terms it
goes a little uphill, computes their gradients there, and comes back. A step depends on its number
and the seed alone.

With several processes each computes the gradients of its part of a step's sequences. They are
summed over processes, and all take the same optimiser step. Of a sharded model each process steps
with its own parts of the weights.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kfade.baselines.gauge import DriftGauge
from kfade.baselines.losses import Net, Rows, Term, likelihood
from kfade.baselines.references import Drawn, References
from kfade.baselines.settings import Settings, rate
from kfade.baselines.weights import Trainable
from kfade.data.batches import Batch, draw_without_replacement
from kfade.data.sequences import TokenSequence
from kfade.errors import InputError
from kfade.method.gauges import MEASURED_SEQUENCES
from kfade.models.lengths import batches_for
from kfade.models.masters import restored
from kfade.runtime import distributed
from kfade.runtime.stages import stage


@dataclass
class Training:
    """The steps of a training run; use it within ``trainable.training()``."""

    net: Net
    terms: Sequence[Term]
    trainable: Trainable
    sets: Mapping[str, Sequence[TokenSequence]]
    settings: Settings
    selected: tuple[float, Mapping[str, Tensor]] | None = None
    """The loss and the gradients of every step, if all have the same."""

    def __post_init__(self) -> None:
        self.references = References(self.net, self.terms, self.sets)
        self.optimizer = _optimizer(self.trainable, self.settings)

    def gauge(self) -> DriftGauge:
        """Measures the model against what it is now, on some of the forget sequences."""
        forget, settings = self.sets["forget"], self.settings
        drawn = draw_without_replacement(len(forget), MEASURED_SEQUENCES, 0, settings.seed)
        measured, held_out = (
            batches_for(self.net.model, sequences, settings.batch_tokens)
            for sequences in ([forget[i] for i in drawn], self.sets["held_out"])
        )
        return DriftGauge(self.net, measured, held_out)

    def step(self, number: int) -> float:
        """Optimiser step ``number``, from 0; returns its loss."""
        settings, tensors = self.settings, self.trainable.tensors
        if self.selected is None:
            self._compute_references(number)
        with stage("train"):
            seed = settings.seed * 1_000_003 + number
            self.trainable.reseed(seed + distributed.rank() * 2**32)
            if self.selected is None:
                loss = self.find_gradients([number])
            else:
                loss, gradients = self.selected
                for name, gradient in gradients.items():
                    tensors[name].grad = gradient.clone()  # clipping is in place
            if settings.clip is not None:
                norm = distributed.gradient_norm(tensors, self.trainable.parameters)
                nn.utils.clip_grads_with_norm_(tensors.values(), settings.clip, norm)
            for group in self.optimizer.param_groups:
                group["lr"] = rate(settings, number)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.trainable.push()
        return loss

    def find_gradients(self, steps: Sequence[int]) -> float:
        """Sum the gradients of ``steps`` over them and over processes; returns the sum of losses.

        Sharpness-aware terms take one step at a time.

        Raises:
            InputError: the loss is not finite.
        """
        tensors, accumulate = self.trainable.tensors, self.settings.accumulate
        loss = sum(self._gradients(self._own(step)) for step in steps) / accumulate
        # With a selection this is its adapter's pass, or the pass after it.
        flag = "--adapter-lr" if self.settings.selection else "--lr"
        refuse_not_finite(loss, steps[-1], flag)
        distributed.sum_gradients(tensors, self.trainable.parameters)
        for tensor in tensors.values():
            if tensor.grad is not None:
                tensor.grad /= accumulate
        return loss

    def _own(self, step: int) -> list[Drawn]:
        """This process's part of each batch of a step; with one process the whole batch."""
        batches = _draw(self.sets, self.settings, step)
        terms = Counter[str](term.on for term in self.terms)  # by set
        drawn = [
            (index, name, number)
            for index, batch in enumerate(batches)
            for name in terms
            for number in batch[name]
        ]

        def cost(one: tuple[int, str, int]) -> float:
            _, name, number = one
            return terms[name] * self.sets[name][number].live

        own: list[Drawn] = [{name: [] for name in terms} for _ in batches]
        for index, name, number in distributed.share(drawn, cost):
            own[index][name].append(number)
        return own

    def _gradients(self, own: Sequence[Drawn]) -> float:
        """Add the gradients of this process's part of a step.

        Returns the sum over the step's batches of their losses, the same in all processes. A
        sharpness-aware term's loss is taken where its gradient is.
        """
        sharp = [number for number, term in enumerate(self.terms) if term.radius]
        plain = [number for number, term in enumerate(self.terms) if not term.radius]
        loss = 0.0
        if sharp:  # first: a step uphill drops the gradients found before
            with self._uphill(own, sharp):
                loss += self._backward(own, sharp)
        if plain:
            loss += self._backward(own, plain)
        return loss

    @contextlib.contextmanager
    def _uphill(self, own: Sequence[Drawn], sharp: Sequence[int]) -> Iterator[None]:
        """Within the ``with`` what is trained is θ + ρ g/‖g‖, g being these terms' gradient at θ.

        Afterwards it is θ again, bit for bit.
        """
        (radius,) = {self.terms[number].radius for number in sharp}
        tensors, like = self.trainable.tensors, self.trainable.parameters
        self._backward(own, sharp)
        distributed.sum_gradients(tensors, like)
        norm = float(distributed.gradient_norm(tensors, like))
        with restored(tensors):
            with torch.no_grad():
                for tensor in tensors.values():
                    if tensor.grad is not None and norm > 0:
                        tensor.add_(tensor.grad, alpha=radius / norm)
            self.optimizer.zero_grad()
            self.trainable.push()
            yield
        self.trainable.push()

    def _backward(self, own: Sequence[Drawn], terms: Sequence[int]) -> float:
        """Add the gradients of the terms with these numbers; see :meth:`_gradients`."""
        work = [(self.terms[k], self._pieces(k, drawn)) for drawn in own for k in terms]
        # A mean is over a whole batch, of all processes.
        counts = distributed.all_reduce_numbers(
            [sum(term.count(*piece) for piece in pieces) for term, pieces in work]
        )
        made = sum(len(pieces) for _, pieces in work)
        added = distributed.extra_passes(self.net.model, made)
        device = next(self.net.model.parameters()).device
        losses = torch.zeros(len(own), device=device, dtype=torch.float64)
        for index, ((term, pieces), count) in enumerate(zip(work, counts, strict=True)):
            for piece, rows in pieces:
                loss = term.weight / count * term.values(self.net, piece, rows).sum()
                loss.backward()
                self.trainable.collect()
                losses[index // len(terms)] += loss.detach()
        for _ in range(added):
            self._idle()
        (total,) = distributed.all_reduce_numbers([sum(losses.tolist())])
        return total

    def _idle(self) -> None:
        """A pass forward and backward that adds nothing: processes run a sharded model together."""
        term = next((t for t in self.terms if t.reference is None), likelihood("forget", 1.0))
        (piece,) = batches_for(self.net.model, self.sets[term.on][:1])
        (0.0 * term.values(self.net, piece, []).sum()).backward()
        self.trainable.collect()

    def _pieces(self, term: int, drawn: Drawn) -> list[tuple[Batch, Rows]]:
        """The sequences of a term's batch, in pieces, each with what it needs of the base model."""
        on, model = self.terms[term].on, self.net.model
        own = drawn[on]
        pieces = batches_for(model, [self.sets[on][i] for i in own], self.settings.batch_tokens)
        return [(p, self.references.rows(term, [own[i] for i in p.id_B.tolist()])) for p in pieces]

    def _compute_references(self, step: int) -> None:
        """Where this step lacks outputs of the base model, compute its own and later steps'."""
        coming = (self._own(later) for later in range(step, self.settings.steps))
        if distributed.any_of(any(map(self.references.missing, self._own(step)))):
            with stage("reference"), self.trainable.at_base():
                self.references.compute(coming)


def refuse_not_finite(loss: float, step: int, flag: str) -> None:
    """Raises InputError for a loss that is not finite."""
    if not math.isfinite(loss):
        raise InputError(
            f"step {step + 1}: the loss is not finite; lower {flag}, or try --dtype float32"
        )


def _draw(
    sets: Mapping[str, Sequence[TokenSequence]], settings: Settings, step: int
) -> list[Drawn]:
    """The batches of a step, drawn from each set without replacement, in an order of its own."""
    first = step * settings.accumulate
    return [
        {
            name: draw_without_replacement(
                len(sets[name]), settings.batch, index, settings.seed + offset
            )
            for offset, name in enumerate(("forget", "retain"))
        }
        for index in range(first, first + settings.accumulate)
    ]


def _optimizer(trainable: Trainable, settings: Settings) -> Optimizer:
    """Weight decay is for matrices; norms and biases have none."""
    tensors = list(trainable.tensors.values())
    groups = [
        {"params": [t for t in tensors if t.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [t for t in tensors if t.ndim <= 1], "weight_decay": 0.0},
    ]
    return settings.optimizer([g for g in groups if g["params"]], lr=settings.lr)
