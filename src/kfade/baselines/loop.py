"""The training loop of all baselines: batches, terms, an optimiser, evaluations, an ``Update``.

Each step draws ``accumulate`` batches of forget and as many of retain sequences. Its loss is the
mean over them of a method's terms (:mod:`kfade.baselines.losses`). A step depends on its number and
the seed alone, so a run that was interrupted ends where an uninterrupted one does.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from kfade.baselines.checkpoint import Checkpoint, keep
from kfade.baselines.gauge import DriftGauge
from kfade.baselines.losses import Net, Term
from kfade.baselines.references import Drawn, References
from kfade.baselines.weights import Trainable
from kfade.data.batches import draw_without_replacement
from kfade.data.sequences import TokenSequence
from kfade.errors import InputError
from kfade.method.settings import at_least
from kfade.method.unlearn import MEASURED_SEQUENCES, base_facts
from kfade.method.update import Update
from kfade.models.head import read_head
from kfade.models.interface import check_sets
from kfade.models.lengths import batches_for
from kfade.models.targets import memory_of
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
        with stage("check"):
            gauge = run.gauge()
        curve, kept = [], {}
        if start is None:
            with stage("check"):
                curve.append({"step": 0, **gauge.measure()})
        else:
            start.restore(trainable, run.optimizer)
            curve += start.curve
            kept = start.kept or trainable.deltas()
        losses: list[float] = []
        for step in track(range(int(curve[-1]["step"]), settings.steps), "training"):
            losses.append(run.step(step))
            if not settings.evaluates_after(step + 1):
                continue
            with stage("check"):
                row = {"step": step + 1, **gauge.measure()}
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
        settings, tensors = self.settings, self.trainable.tensors.values()
        self._compute_references(number)
        with stage("train"):
            self.trainable.reseed(settings.seed * 1_000_003 + number)
            drawn = _draw(self.sets, settings, number)
            loss = sum(map(self._backward, drawn)) / settings.accumulate
            if not math.isfinite(loss):
                raise InputError(
                    f"step {number + 1}: the loss is not finite; lower --lr, or try --dtype float32"
                )
            for tensor in tensors:
                if tensor.grad is not None:
                    tensor.grad /= settings.accumulate
            if settings.clip is not None:
                nn.utils.clip_grad_norm_(tensors, settings.clip)
            for group in self.optimizer.param_groups:
                group["lr"] = rate(settings, number)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.trainable.push()
        return loss

    def _backward(self, drawn: Drawn) -> float:
        """Add the gradients of one batch of each set; returns its loss."""
        model = self.net.model
        device = next(model.parameters()).device
        total = torch.zeros((), device=device, dtype=torch.float64)
        for number, term in enumerate(self.terms):
            own = drawn[term.on]
            sequences = [self.sets[term.on][i] for i in own]
            pieces = batches_for(model, sequences, self.settings.batch_tokens)
            rows = [self.references.rows(number, [own[i] for i in p.id_B.tolist()]) for p in pieces]
            count = sum(term.count(p, r) for p, r in zip(pieces, rows, strict=True))
            for piece, known in zip(pieces, rows, strict=True):
                loss = term.weight / count * term.values(self.net, piece, known).sum()
                loss.backward()
                self.trainable.collect()
                total += loss.detach()
        return total.item()

    def _compute_references(self, step: int) -> None:
        """Where this step lacks outputs of the base model, compute its own and later steps'."""
        settings = self.settings
        coming = (_draw(self.sets, settings, later) for later in range(step, settings.steps))
        if any(map(self.references.missing, _draw(self.sets, settings, step))):
            with stage("reference"), self.trainable.at_base():
                self.references.compute(coming)


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
