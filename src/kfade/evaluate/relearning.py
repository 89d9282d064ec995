"""Relearning: how soon fine-tuning brings back what an update took away (paper, Appendix E, RQ4).

The edited model is fine-tuned on benign, related, or the forgotten data, all weights, AdamW, and
measured on the way. Then the update is added once more to what came out, θ_ft + ΔW, as the keeper
of a model could do after each fine-tuning, and that is measured too.

Shapes: N loss tokens, D hidden width.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kfade.data.batches import Batch, draw_without_replacement, make_batches
from kfade.data.sequences import TokenSequence
from kfade.errors import InputError
from kfade.evaluate.choice import answer_questions, log_likelihoods, verdict
from kfade.evaluate.divergence import Outputs, divergences, outputs
from kfade.evaluate.questions import Question
from kfade.evaluate.uncertainty import bootstrap
from kfade.method.objectives import cross_entropy
from kfade.method.update import Update
from kfade.models.head import Head, hidden_states, read_head
from kfade.models.lengths import length_class, model_window
from kfade.models.load import frozen
from kfade.models.targets import refuse_shared_memory
from kfade.runtime.progress import track

AT = (0, 25, 50, 100, 200)
STEPS, LEARNING_RATE, BATCH = 200, 1e-5, 8  # the paper's
WEIGHT_DECAY = 0.01  # not said in the paper: AdamW's own default
State = Literal["attacked", "reapplied"]


@dataclass(frozen=True)
class Tuning:
    """How to fine-tune: AdamW on all weights."""

    steps: int = STEPS
    learning_rate: float = LEARNING_RATE
    batch: int = BATCH
    """Sequences a step."""
    warmup: int = 0
    """Steps over which the learning rate rises to its value; constant from then on."""
    weight_decay: float = WEIGHT_DECAY
    batch_tokens: int = 4096
    """Positions in one forward and backward pass; a larger batch is summed from several."""
    seed: int = 0
    """Keys the order of the data."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "batch_tokens"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise InputError(f"--{flag} {getattr(self, name)}: give 1 or more")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise InputError(f"--lr {self.learning_rate}: give a positive, finite number")


@dataclass(frozen=True)
class Figures:
    """What was measured of one model."""

    values: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    """95 %, by resampling sequences or questions."""


@dataclass(frozen=True)
class Measurement:
    """Figures after some steps of fine-tuning."""

    state: State
    """``attacked``, or ``reapplied``: the update added to the attacked model again."""
    step: int
    figures: Figures


class Examination:
    """What is asked of a model again and again: the forget loss, and what else is given for it.

    Args:
        model: the base model, as it is before any update: retain KL is measured from it.
        forget: sequences to forget.
        held_out: retain sequences; none: no retain KL.
        questions: multiple choice on what was to be forgotten; none: no accuracy.
        tokenizer: for the questions.
        seed: keys the resampling.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        forget: Sequence[TokenSequence],
        held_out: Sequence[TokenSequence] = (),
        questions: Sequence[Question] = (),
        tokenizer: Any = None,
        batch_tokens: int = 4096,
        seed: int = 0,
    ) -> None:
        if not forget:
            raise InputError("the forget set is empty: give at least one sequence")
        self._forget, self._questions, self._tokenizer = forget, questions, tokenizer
        self._batch_tokens, self._seed = batch_tokens, seed
        device = next(model.parameters()).device
        self._held_out = make_batches(
            held_out, budget=batch_tokens, device=device, group=length_class(model)
        )
        self._base: Outputs | None = None
        if held_out:
            found = outputs(model, self._held_out, "base model")
            # Fine-tuning changes the head too; the base model's has to stay.
            linear = copy.deepcopy(found.head.linear).requires_grad_(False)
            self._base = Outputs(replace(found.head, linear=linear), found.reference)

    def __call__(self, model: nn.Module) -> Figures:
        """Figures of the model as it is now.

        ``forget_loss``: −Σ log p / tokens. ``forget_probability``: mean over sequences of
        exp(−loss per token). ``retain_kl``: KL(base ‖ model) per held-out retain token.
        ``forget_accuracy``: questions answered rightly by the choice whose text is likeliest per
        token; ``forget_accuracy_letters``: by the likeliest letter.
        """
        totals = log_likelihoods(model, self._forget, batch_tokens=self._batch_tokens)
        counts = [sequence.loss_tokens for sequence in self._forget]
        loss = np.array([-total for total in totals])
        tokens = np.array(counts)
        found = {
            "forget_loss": (loss, tokens),
            "forget_probability": (np.exp(-loss / tokens), np.ones(len(loss))),
        }
        if self._base is not None:
            found["retain_kl"] = self._divergence(model, self._base)
        if self._questions:
            found |= self._accuracies(model)
        figures = {name: self._mean(*parts) for name, parts in found.items()}
        return Figures(
            {name: figure["value"] for name, figure in figures.items()},
            {name: (figure["low"], figure["high"]) for name, figure in figures.items()},
        )

    def _divergence(
        self, model: nn.Module, base: Outputs
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        kl: dict[int, Tensor] = {}
        divergences(
            [self._held_out], lambda _: base, lambda: contextlib.nullcontext(model), kl.__setitem__
        )
        own = list(kl.values())
        return np.array([k.sum().item() for k in own]), np.array([float(len(k)) for k in own])

    def _accuracies(
        self, model: nn.Module
    ) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
        names = {"forget_accuracy": "text_per_token", "forget_accuracy_letters": "letters"}
        right = {name: np.zeros(len(self._questions)) for name in names}

        def note(index: int, scores: dict[str, list[float]]) -> None:
            correct = verdict(scores, self._questions[index].answer)
            for name, scoring in names.items():
                right[name][index] = correct[scoring]

        answer_questions(
            model,
            self._tokenizer,
            self._questions,
            note,
            window=model_window(model),
            batch_tokens=self._batch_tokens,
        )
        return {name: (values, np.ones(len(values))) for name, values in right.items()}

    def _mean(self, sums: NDArray, weights: NDArray) -> dict[str, float]:
        """Σ sums / Σ weights with its interval."""
        return bootstrap(
            lambda i: np.array([sums[i].sum() / weights[i].sum()]), len(sums), seed=self._seed
        )[0]


def attack(
    model: nn.Module,
    update: Update,
    sequences: Sequence[TokenSequence],
    measure: Callable[[nn.Module], Figures],
    *,
    tuning: Tuning | None = None,
    at: Sequence[int] = AT,
) -> list[Measurement]:
    """Fine-tune the edited model, measuring it before the steps ``at``; see the module.

    Without an update (``Update({})``) it is the control, and nothing is re-applied; at step 0
    nothing is either, since the update is there. The model is bit for bit as it was afterwards.

    Raises:
        InputError: no data, a step that is not reached, or a loss that is not finite.
    """
    tuning = tuning or Tuning()
    if not at or min(at) < 0 or max(at) > tuning.steps:
        raise InputError(f"--at {','.join(map(str, at))}: give steps from 0 to {tuning.steps}")
    found: list[Measurement] = []

    def on_step(step: int) -> None:
        if step not in at:
            return
        found.append(Measurement("attacked", step, measure(model)))
        if update.deltas and step > 0:
            with update.applied_to(model):
                found.append(Measurement("reapplied", step, measure(model)))

    with restored(model):
        update.apply(model)
        fine_tune(model, sequences, replace(tuning, steps=max(1, *at)), on_step)
    return found


@contextlib.contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """All weights bit for bit as they were on leaving; kept on the CPU meanwhile."""
    kept = [parameter.detach().to("cpu", copy=True) for parameter in model.parameters()]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, before in zip(model.parameters(), kept, strict=True):
                parameter.copy_(before)


def fine_tune(
    model: nn.Module,
    sequences: Sequence[TokenSequence],
    tuning: Tuning,
    on_step: Callable[[int], None] = lambda step: None,
) -> None:
    """Minimise the mean cross-entropy of the scored tokens; changes ``model``.

    Weights in 16 bits have float32 masters: a step of 1e-5 would be rounded away in them.

    Args:
        on_step: called with the number of steps done, from 0, before each and after the last.

    Raises:
        InputError: no data, or a loss that is not finite.
    """
    if not sequences:
        raise InputError("there is nothing to fine-tune on: give at least one sequence")
    refuse_shared_memory(model, [name for name, _ in model.named_parameters()])
    device = next(model.parameters()).device
    batches_of = partial(
        make_batches, budget=tuning.batch_tokens, device=device, group=length_class(model)
    )
    with frozen(model), _all_trainable(model) as pairs:
        with torch.no_grad():
            head = read_head(model)
        optimizer = torch.optim.AdamW(
            [master for _, master in pairs],
            lr=tuning.learning_rate,
            weight_decay=tuning.weight_decay,
            # On a CPU a step over all weights takes an eighth of the time.
            fused=True,
        )
        for step in track(range(tuning.steps), "fine-tuning"):
            on_step(step)
            drawn = draw_without_replacement(len(sequences), tuning.batch, step, tuning.seed)
            loss = _accumulate(model, head, batches_of([sequences[i] for i in drawn]), pairs)
            if not math.isfinite(loss):
                raise InputError(
                    f"the loss is not finite at step {step} of fine-tuning: lower --lr, or give "
                    "--dtype float32"
                )
            rate = min(1.0, (step + 1) / tuning.warmup) if tuning.warmup else 1.0
            for group in optimizer.param_groups:
                group["lr"] = tuning.learning_rate * rate
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for parameter, master in pairs:
                    if parameter is not master:
                        parameter.copy_(master)
        on_step(tuning.steps)


@contextlib.contextmanager
def _all_trainable(model: nn.Module) -> Iterator[list[tuple[nn.Parameter, Tensor]]]:
    """(parameter, what the optimiser changes in its place) of all; no gradients left behind."""
    model.requires_grad_(True)
    try:
        yield [(parameter, _master(parameter)) for parameter in model.parameters()]
    finally:
        for parameter in model.parameters():
            parameter.grad = None


def _master(parameter: nn.Parameter) -> Tensor:
    """The parameter itself where it is precise enough, else a copy in float32."""
    return parameter if parameter.element_size() >= 4 else parameter.detach().float()


def _accumulate(
    model: nn.Module,
    head: Head,
    batches: Sequence[Batch],
    pairs: Sequence[tuple[nn.Parameter, Tensor]],
) -> float:
    """Gradients of the mean loss per token over all batches, summed in the masters; that loss."""
    loss_tokens = sum(batch.loss_tokens for batch in batches)
    total = 0.0
    for batch in batches:
        total += _backward(model, head, batch, loss_tokens)
        for parameter, master in pairs:
            if parameter is not master and parameter.grad is not None:
                gradient = parameter.grad.float()
                master.grad = gradient if master.grad is None else master.grad + gradient
                parameter.grad = None
    return total


def _backward(model: nn.Module, head: Head, batch: Batch, loss_tokens: int) -> float:
    """Backward of Σ loss / ``loss_tokens``, logits of a few positions at a time; its value."""
    hidden_ND = batch.at_loss(hidden_states(model, batch.input_BT))
    target_N = batch.at_loss(batch.target_BT)
    leaf_ND = hidden_ND.detach().requires_grad_()
    total = 0.0
    for part in head.chunks(leaf_ND):
        loss = cross_entropy(head(leaf_ND[part]), target_N[part]).sum() / loss_tokens
        loss.backward()
        total += loss.item()
    hidden_ND.backward(leaf_ND.grad)
    return total
