"""The training loop of all baselines: batches, terms, an optimiser, evaluations, an ``Update``.

Each step draws ``accumulate`` batches of forget and as many of retain sequences. Its loss is the
mean over them of a method's terms (:mod:`kfade.baselines.losses`). A step depends on its number and
the seed alone, so a run that was interrupted ends where an uninterrupted one does. With a selection
(:mod:`kfade.baselines.repselect`) all steps go along one direction, found before the first.

With several processes each computes the gradients of its part of a step's sequences. They are
summed over processes, and all take the same optimiser step. Of a sharded model each process steps
with its own parts of the weights.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from kfade.baselines.checkpoint import Checkpoint, Row, keep
from kfade.baselines.gauge import DriftGauge
from kfade.baselines.losses import Net, Rows, Term
from kfade.baselines.references import Drawn, References
from kfade.baselines.repselect import Selection, select
from kfade.baselines.weights import Trainable
from kfade.curvature.vectors import Divided, InHostMemory, Vector
from kfade.curvature.vectors import keep as keep_vector
from kfade.data.batches import Batch, draw_without_replacement
from kfade.data.sequences import TokenSequence
from kfade.errors import InputError
from kfade.method.settings import at_least
from kfade.method.unlearn import MEASURED_SEQUENCES, base_facts
from kfade.method.update import Update
from kfade.models.head import read_head
from kfade.models.interface import check_sets
from kfade.models.lengths import batches_for
from kfade.models.targets import memory_of
from kfade.runtime import distributed
from kfade.runtime.progress import track
from kfade.runtime.stages import stage

SETS = {"forget": "forget set", "retain": "retain set", "held_out": "held-out retain set"}


@dataclass(frozen=True)
class Settings:
    """How to train, and how often to evaluate.

    Raises:
        InputError: a number out of its range.
    """

    lr: float
    """Highest learning rate."""
    steps: int
    batch: int
    """Sequences of each set in a batch."""
    accumulate: int = 1
    """Batches of each set a step; their losses are averaged."""
    warm_up: int = 0
    """Steps over which the rate rises linearly."""
    decay: bool = False
    """Let the rate fall linearly to 0 afterwards."""
    weight_decay: float = 0.0
    """Decoupled, of matrices only."""
    clip: float | None = None
    """Largest norm of the gradient, as one vector over all that is trained."""
    optimizer: Callable[..., Optimizer] = AdamW
    selection: Selection | None = None
    """How one direction of all steps is found; None: each step has the gradient of its batches."""
    evaluate_every: int | None = None
    """Steps between evaluations; None for an evaluation after the last step only."""
    max_kl: float | None = None
    """Keep the evaluation that forgets most within this KL, see
    :func:`~kfade.baselines.checkpoint.keep`; the last one when None."""
    batch_tokens: int = 4096
    """Positions in one forward pass. A larger batch is cut into pieces, which does not change its
    gradient, but LoRA's dropout is drawn for each piece."""
    seed: int = 0
    """Keys the order of batches and dropout."""

    def __post_init__(self) -> None:
        at_least("--steps", self.steps, 1)
        at_least("--batch", self.batch, 1)
        at_least("--accumulate", self.accumulate, 1)
        if self.evaluate_every is not None:
            at_least("--evaluate-every", self.evaluate_every, 1)
        rest = {"lr": self.lr, "weight-decay": self.weight_decay, "warm-up": self.warm_up}
        for flag, value in rest.items():
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"--{flag} {value}: give a finite number, 0 or more")
        if self.max_kl is not None and not self.max_kl > 0:
            raise InputError(f"--max-kl {self.max_kl}: give a number above 0")

    def evaluates_after(self, steps: int) -> bool:
        """Whether the model is evaluated after that many steps."""
        return steps == self.steps or bool(self.evaluate_every and steps % self.evaluate_every == 0)


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
        InputError: an empty set, a sequence that the model cannot read, or a loss that is not
            finite.
    """
    check_sets(model, {called: sets[name] for name, called in SETS.items()})
    facts = base_facts(model, trainable.names, **sets)
    with trainable.training():
        run = _Training(_net(model, trainable), terms, trainable, sets, settings)
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
                _refuse_not_finite(row["forget_loss"], step, "--lr")
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


def rate(settings: Settings, step: int) -> float:
    """Learning rate of step number ``step``, from 0: rises linearly, then falls or stays."""
    if step < settings.warm_up:
        return settings.lr * (step + 1) / settings.warm_up
    if settings.decay:
        return settings.lr * (settings.steps - step) / (settings.steps - settings.warm_up)
    return settings.lr


def steps_per_epoch(sequences: int, batch: int, accumulate: int) -> int:
    """Steps that see each of that many sequences at most once; at least 1."""
    return max(1, sequences // (batch * accumulate))


@dataclass
class _Training:
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

        Raises:
            InputError: the loss is not finite.
        """
        tensors, accumulate = self.trainable.tensors, self.settings.accumulate
        loss = sum(self._backward(self._own(step)) for step in steps) / accumulate
        # With a selection this is its adapter's pass, or the pass after it.
        flag = "--adapter-lr" if self.settings.selection else "--lr"
        _refuse_not_finite(loss, steps[-1], flag)
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

    def _backward(self, own: Sequence[Drawn]) -> float:
        """Add the gradients of this process's part of a step.

        Returns the sum over the step's batches of their losses, the same in all processes.
        """
        terms = self.terms
        work = [(term, self._pieces(k, drawn)) for drawn in own for k, term in enumerate(terms)]
        # A mean is over a whole batch, of all processes.
        counts = distributed.all_reduce_numbers(
            [sum(term.count(*piece) for piece in pieces) for term, pieces in work]
        )
        made = sum(len(pieces) for _, pieces in work)
        added = distributed.extra_passes(self.net.model, made)
        device = next(self.net.model.parameters()).device
        losses = torch.zeros(len(own), device=device, dtype=torch.float64)
        for number, ((term, pieces), count) in enumerate(zip(work, counts, strict=True)):
            for piece, rows in pieces:
                loss = term.weight / count * term.values(self.net, piece, rows).sum()
                loss.backward()
                self.trainable.collect()
                losses[number // len(terms)] += loss.detach()
        for _ in range(added):
            self._idle()
        (total,) = distributed.all_reduce_numbers([sum(losses.tolist())])
        return total

    def _idle(self) -> None:
        """A pass forward and backward that adds nothing: processes run a sharded model together."""
        term = next(term for term in self.terms if term.reference is None)
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


def _refuse_not_finite(loss: float, step: int, flag: str) -> None:
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


def _net(model: nn.Module, trainable: Trainable) -> Net:
    """The model, its head, and a copy of the head where training would change it."""
    head = read_head(model)
    owners: dict[Hashable, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(memory_of(parameter), set()).add(name)
    trained = any(owners[memory_of(p)] & set(trainable.names) for p in head.linear.parameters())
    base_head = replace(head, linear=copy.deepcopy(head.linear)) if trained else head
    return Net(model, head, base_head)
