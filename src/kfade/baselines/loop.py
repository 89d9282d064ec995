"""The training loop of all baselines: batches, terms, an optimiser, evaluations, an ``Update``.

At each step ``accumulate`` batches of forget and as many of retain sequences are drawn; the loss is
the mean over them of a method's terms (:mod:`kfade.baselines.losses`). What a step does depends on
its number and the seed, so a run that was interrupted ends where an uninterrupted one does.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from kfade.baselines.checkpoint import Checkpoint, keep
from kfade.baselines.gauge import DriftGauge
from kfade.baselines.losses import Net, Term
from kfade.baselines.references import Drawn, References
from kfade.baselines.weights import Trainable
from kfade.data.batches import Batch, draw_without_replacement, make_batches
from kfade.data.sequences import TokenSequence
from kfade.errors import InputError
from kfade.method.unlearn import MEASURED_SEQUENCES, base_facts
from kfade.method.update import Update
from kfade.models.head import read_head
from kfade.models.lengths import length_class
from kfade.models.targets import memory_of
from kfade.runtime.progress import track
from kfade.runtime.stages import stage


@dataclass(frozen=True)
class Settings:
    """How to train. A step sees ``accumulate`` batches of ``batch`` sequences of each set."""

    lr: float
    """Highest learning rate."""
    steps: int
    batch: int
    accumulate: int = 1
    warm_up: int = 0
    """Steps over which the rate rises linearly."""
    decay: bool = False
    """Let it fall linearly to 0 afterwards."""
    weight_decay: float = 0.0
    """Decoupled, on matrices only."""
    clip: float | None = None
    """Longest gradient, as one vector over all that is trained."""
    optimizer: Callable[..., Optimizer] = AdamW


def train(
    model: nn.Module,
    terms: Sequence[Term],
    trainable: Trainable,
    *,
    forget: Sequence[TokenSequence],
    retain: Sequence[TokenSequence],
    held_out: Sequence[TokenSequence],
    settings: Settings,
    evaluate_every: int | None = None,
    max_kl: float | None = None,
    batch_tokens: int = 4096,
    seed: int = 0,
    start: Checkpoint | None = None,
    on_evaluation: Callable[[Checkpoint, Update], bool | None] | None = None,
) -> Update:
    """Minimise the terms; the model is left bit for bit as it was.

    Dropout of the model itself is off. The update's provenance has the ``curve`` of evaluations,
    the one before training first, and the ``kept_step`` that the update is of.

    Args:
        held_out: retain sequences that are not trained on; KL is measured on them.
        evaluate_every: steps between evaluations; the last step always has one.
        max_kl: keep the evaluation that forgets most at no more than this KL, see
            :func:`~kfade.baselines.checkpoint.keep`; the last one when None.
        batch_tokens: positions in one forward pass; a batch is cut into as many as it takes,
            which does not change its gradient; but what LoRA's dropout drops is drawn a pass.
        start: an interrupted run, to go on from.
        on_evaluation: called with what is needed to go on, and with the update so far; the run
            ends there if it says True.

    Raises:
        InputError: an empty set, impossible settings, a loss that is not finite.
    """
    _check(forget, retain, held_out, settings, evaluate_every, max_kl)
    device = next(model.parameters()).device
    sets = {"forget": forget, "retain": retain}
    provenance = base_facts(model, trainable.names, forget, retain, held_out)
    batches_of = partial(
        make_batches, budget=batch_tokens, device=device, group=length_class(model)
    )
    with trainable.training():
        net = _net(model, trainable)
        with stage("check"):
            measured = draw_without_replacement(len(forget), MEASURED_SEQUENCES, 0, seed)
            gauge = DriftGauge(
                net,
                batches_of([forget[i] for i in measured]),
                batches_of(held_out),
            )
        optimizer = _optimizer(trainable, settings)
        if start is None:
            with stage("check"):
                curve = [{"step": 0, **asdict(gauge.measure())}]
        else:
            start.restore(trainable, optimizer)
            curve = list(start.curve)
        kept = start.kept or trainable.deltas() if start else {}
        references = References(net, terms, sets)
        losses: list[float] = []
        for step in track(range(int(curve[-1]["step"]), settings.steps), "training"):
            _look_ahead(references, trainable, sets, settings, step, seed)
            with stage("train"):
                trainable.reseed(seed * 1_000_003 + step)
                loss = sum(
                    _backward(net, terms, trainable, references, sets, drawn, batches_of)
                    for drawn in _draw(sets, settings, step, seed)
                )
                losses.append(_finite(loss / settings.accumulate, step))
                _step(optimizer, trainable, settings, step)
            done = step + 1
            if done == settings.steps or (evaluate_every and done % evaluate_every == 0):
                with stage("check"):
                    row = {"step": done, **asdict(gauge.measure())}
                curve.append({**row, "loss": sum(losses) / len(losses)})
                losses = []
                deltas = trainable.deltas()
                is_kept = keep(curve, max_kl) == done
                kept = deltas if is_kept else kept
                if on_evaluation is not None:
                    other = {} if is_kept else kept
                    checkpoint = Checkpoint.of(curve, provenance, other, trainable, optimizer)
                    so_far = Update(deltas, {**provenance, "curve": curve})
                    if on_evaluation(checkpoint, so_far):
                        break
    return Update(kept, {**provenance, "curve": curve, "kept_step": keep(curve, max_kl)})


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


def _backward(
    net: Net,
    terms: Sequence[Term],
    trainable: Trainable,
    references: References,
    sets: dict[str, Sequence[TokenSequence]],
    drawn: Drawn,
    batches_of: Callable[[Sequence[TokenSequence]], list[Batch]],
) -> float:
    """Add a batch's gradient to that of ``trainable``, in batches of ``batches_of``; its loss."""
    device = next(net.model.parameters()).device
    total = torch.zeros((), device=device, dtype=torch.float64)
    for number, term in enumerate(terms):
        own = drawn[term.on]
        pieces = batches_of([sets[term.on][i] for i in own])
        rows = [references.rows(number, [own[i] for i in p.id_B.tolist()]) for p in pieces]
        count = sum(term.count(p, r) for p, r in zip(pieces, rows, strict=True))
        for piece, known in zip(pieces, rows, strict=True):
            loss = term.weight / count * term.values(net, piece, known).sum()
            loss.backward()
            trainable.collect()
            total += loss.detach()
    return total.item()


def _step(optimizer: Optimizer, trainable: Trainable, settings: Settings, step: int) -> None:
    """Change what is trained by the mean of the gradients of a step's batches."""
    tensors = trainable.tensors.values()
    for tensor in tensors:
        if tensor.grad is not None:
            tensor.grad /= settings.accumulate
    if settings.clip is not None:
        nn.utils.clip_grad_norm_(tensors, settings.clip)
    for group in optimizer.param_groups:
        group["lr"] = rate(settings, step)
    optimizer.step()
    optimizer.zero_grad()
    trainable.push()


def _look_ahead(
    references: References,
    trainable: Trainable,
    sets: dict[str, Sequence[TokenSequence]],
    settings: Settings,
    step: int,
    seed: int,
) -> None:
    """Have what the step needs of the base model's outputs, and what steps after it will need."""
    if not any(references.missing(drawn) for drawn in _draw(sets, settings, step, seed)):
        return

    def coming() -> Iterator[list[Drawn]]:
        for later in range(step, settings.steps):
            yield _draw(sets, settings, later, seed)

    with stage("reference"), trainable.at_base():
        references.compute(coming())


def _draw(
    sets: dict[str, Sequence[TokenSequence]], settings: Settings, step: int, seed: int
) -> list[Drawn]:
    """The batches of a step; each set is gone through without replacement, in its own order."""
    first = step * settings.accumulate
    return [
        {
            name: draw_without_replacement(len(sequences), settings.batch, index, seed + offset)
            for offset, (name, sequences) in enumerate(sets.items())
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


def _finite(loss: float, step: int) -> float:
    if not math.isfinite(loss):
        raise InputError(
            f"step {step + 1}: the loss is not finite; lower --lr, or try --dtype float32"
        )
    return loss


def _check(
    forget: Sequence[TokenSequence],
    retain: Sequence[TokenSequence],
    held_out: Sequence[TokenSequence],
    settings: Settings,
    evaluate_every: int | None,
    max_kl: float | None,
) -> None:
    sets = {"forget set": forget, "retain set": retain, "held-out retain set": held_out}
    for name, sequences in sets.items():
        if not sequences:
            raise InputError(f"the {name} is empty: give at least one sequence")
    whole = {
        "--steps": settings.steps,
        "--batch": settings.batch,
        "--accumulate": settings.accumulate,
        "--evaluate-every": 1 if evaluate_every is None else evaluate_every,
    }
    for name, number in whole.items():
        if number < 1:
            raise InputError(f"{name} {number}: give 1 or more")
    rest = {"--lr": settings.lr, "--weight-decay": settings.weight_decay}
    for name, value in {**rest, "--warm-up": settings.warm_up}.items():
        if not (math.isfinite(value) and value >= 0):
            raise InputError(f"{name} {value}: give a finite number, 0 or more")
    if max_kl is not None and not max_kl > 0:
        raise InputError(f"--max-kl {max_kl}: give a number above 0")
