"""Relearning: how soon fine-tuning brings back what an update took away (paper, Appendix E, RQ4).

The edited model is fine-tuned on benign, related, or the forgotten data: all weights, with AdamW.
It is measured on the way. At the same steps the update is also added once more to the fine-tuned
weights, θ_ft + ΔW, as the model's owner could do after each fine-tuning, and that is measured too.

Shapes: N loss tokens, D hidden width.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import nn

from kfade.data.batches import Batch, draw_without_replacement
from kfade.data.sequences import TokenSequence
from kfade.errors import InputError
from kfade.evaluate.choice import answer_questions, verdict
from kfade.evaluate.divergence import Outputs, divergences, outputs
from kfade.evaluate.memorisation import MEMORISED, memorised, token_statistics
from kfade.evaluate.questions import Question
from kfade.evaluate.tokens import token_values
from kfade.evaluate.uncertainty import bootstrap
from kfade.method.objectives import cross_entropy
from kfade.method.settings import at_least
from kfade.method.update import Update
from kfade.models.head import Head, hidden_states, read_head
from kfade.models.interface import check_sets
from kfade.models.lengths import batches_for, model_window
from kfade.models.masters import Masters, restored
from kfade.runtime import distributed
from kfade.runtime.progress import track

AT = (0, 25, 50, 100, 200)
STEPS, LEARNING_RATE, BATCH = 200, 1e-5, 8  # the paper's
WEIGHT_DECAY = 0.01  # the paper does not say; AdamW's own default
ACCURACIES = {"forget_accuracy": "text_per_token", "forget_accuracy_letters": "letters"}
State = Literal["attacked", "reapplied"]


@dataclass(frozen=True)
class Tuning:
    """How to fine-tune: AdamW on all weights.

    Raises:
        InputError: a number out of its range.
    """

    steps: int = STEPS
    learning_rate: float = LEARNING_RATE
    batch: int = BATCH
    """Sequences a step."""
    warmup: int = 0
    """Steps over which the learning rate rises linearly; it is constant from then on."""
    weight_decay: float = WEIGHT_DECAY
    batch_tokens: int = 4096
    """Positions in one forward and backward pass; a larger batch is summed from several."""
    seed: int = 0
    """Keys the order of the data."""

    def __post_init__(self) -> None:
        at_least("--steps", self.steps, 1)
        at_least("--batch", self.batch, 1)
        at_least("--batch-tokens", self.batch_tokens, 1)
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise InputError(f"--lr {self.learning_rate}: give a positive, finite number")


@dataclass(frozen=True)
class Figures:
    """What was measured of one model."""

    values: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    """Bootstrap intervals of 95 %, over sequences or questions."""


@dataclass(frozen=True)
class Measurement:
    """Figures after some steps of fine-tuning."""

    state: State
    """``attacked``, or ``reapplied``: the update added to the attacked model again."""
    step: int
    figures: Figures


class Examination:
    """Measures a model again and again on the same data; call it with the model.

    Args:
        model: the base model, as it is before any update: retain KL is measured from it.
        forget: sequences to forget.
        held_out: retain sequences; without them there is no retain KL.
        questions: multiple choice on what was to be forgotten; without them there is no accuracy.
        tokenizer: for the questions.
        seed: of the bootstrap.
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
        check_sets(model, {"forget set": forget})
        self._forget, self._questions, self._tokenizer = forget, questions, tokenizer
        self._batch_tokens, self._seed = batch_tokens, seed
        self._held_out = batches_for(model, held_out, batch_tokens)
        if held_out:
            found = outputs(model, self._held_out, "base model")
            # A copy of the head: fine-tuning changes the model's own.
            linear = copy.deepcopy(found.head.linear).requires_grad_(False)
            self._base = Outputs(replace(found.head, linear=linear), found.reference)

    def __call__(self, model: nn.Module) -> Figures:
        """Figures of the model as it is now.

        ``forget_loss``: −Σ log p / tokens. ``forget_probability``: mean over sequences of
        exp(−loss per token). ``exact_memorisation``, ``extraction_strength``: means over sequences
        (:mod:`kfade.evaluate.memorisation`). ``retain_kl``: KL(base ‖ model) per held-out retain
        token. ``forget_accuracy``: questions answered correctly by the choice whose text is
        likeliest per token; ``forget_accuracy_letters``: by the likeliest letter.
        """
        values = token_values(
            model,
            self._forget,
            token_statistics,
            name="likelihoods",
            batch_tokens=self._batch_tokens,
        )
        own = [memorised(one) for _, one in sorted(values, key=lambda pair: pair[0])]
        tokens = np.array([one["tokens"] for one in own])
        losses = np.array([one["loss"] for one in own])  # per token
        found = {
            "forget_loss": self._mean(losses * tokens, tokens),
            "forget_probability": self._mean(np.exp(-losses)),
            **{key: self._mean([one[key] for one in own]) for key in MEMORISED},
        }
        if self._held_out:
            groups, edited = [self._held_out], lambda: contextlib.nullcontext(model)
            kl = [own for _, own in divergences(groups, lambda _: self._base, edited)]
            sums, counts = [own.sum().item() for own in kl], [float(len(own)) for own in kl]
            found["retain_kl"] = self._mean(sums, counts)
        if self._questions:
            correct = self._answers(model)
            for name, scoring in ACCURACIES.items():
                found[name] = self._mean([float(own[scoring]) for own in correct])
        return Figures(
            {name: figure["value"] for name, figure in found.items()},
            {name: (figure["low"], figure["high"]) for name, figure in found.items()},
        )

    def _answers(self, model: nn.Module) -> list[dict[str, bool]]:
        """Of each question, by scoring: whether it is answered correctly."""
        scored = answer_questions(
            model,
            self._tokenizer,
            self._questions,
            window=model_window(model),
            batch_tokens=self._batch_tokens,
        )
        return [verdict(scores, self._questions[number].answer) for number, scores in scored]

    def _mean(self, sums: ArrayLike, weights: ArrayLike | None = None) -> dict[str, float]:
        """Σ sums / Σ weights with its interval; all weights are 1 when None."""
        total = np.asarray(sums)
        weight = np.ones(len(total)) if weights is None else np.asarray(weights)
        (figure,) = bootstrap(
            lambda i: [total[i].sum() / weight[i].sum()], len(total), seed=self._seed
        )
        return figure


def attack(
    model: nn.Module,
    update: Update,
    sequences: Sequence[TokenSequence],
    measure: Callable[[nn.Module], Figures],
    *,
    tuning: Tuning | None = None,
    at: Sequence[int] = AT,
) -> list[Measurement]:
    """Fine-tune the edited model and measure it after each number of steps in ``at``.

    After each number but 0 the model is also measured with the update added once more. An empty
    update, ``Update({})``, makes the control run, where nothing is added again. The model is bit
    for bit as it was afterwards.

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

    with restored(dict(model.named_parameters())):
        update.apply(model)
        fine_tune(model, sequences, replace(tuning, steps=max(1, *at)), on_step)
    return found


def fine_tune(
    model: nn.Module,
    sequences: Sequence[TokenSequence],
    tuning: Tuning,
    on_step: Callable[[int], None] = lambda step: None,
) -> None:
    """Minimise the mean cross-entropy of the scored tokens; changes ``model``.

    Processes divide the sequences of a step and sum their gradients. Of a sharded model each trains
    its own parts of the weights.

    Args:
        on_step: called with the number of steps done, from 0, before each and after the last.

    Raises:
        InputError: no data, or a loss that is not finite.
    """
    if not sequences:
        raise InputError("there is nothing to fine-tune on: give at least one sequence")
    weights = Masters(model, [name for name, _ in model.named_parameters()])
    with weights.training():
        with torch.no_grad():
            head = read_head(model)
        optimizer = torch.optim.AdamW(
            weights.tensors.values(),
            lr=tuning.learning_rate,
            weight_decay=tuning.weight_decay,
            # On a CPU a step over all weights takes an eighth of the time.
            fused=True,
        )
        for step in track(range(tuning.steps), "fine-tuning"):
            on_step(step)
            drawn = draw_without_replacement(len(sequences), tuning.batch, step, tuning.seed)
            own = distributed.share([sequences[i] for i in drawn], lambda sequence: sequence.live)
            batches = batches_for(model, own, tuning.batch_tokens)
            # The mean is over the tokens of all processes.
            (loss_tokens,) = distributed.all_reduce_numbers([sum(b.loss_tokens for b in batches)])
            added = distributed.extra_passes(model, len(batches))
            loss = 0.0
            for batch in batches:
                loss += _backward(model, head, batch, loss_tokens)
                weights.collect()
            for _ in range(added):
                _idle(model, sequences[0])
                weights.collect()
            distributed.sum_gradients(weights.tensors, weights.parameters)
            (loss,) = distributed.all_reduce_numbers([loss])
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
            weights.push()
        on_step(tuning.steps)


def _backward(model: nn.Module, head: Head, batch: Batch, loss_tokens: float) -> float:
    """Backward pass of Σ loss / ``loss_tokens``, logits of a few positions at a time; its value."""
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


def _idle(model: nn.Module, sequence: TokenSequence) -> None:
    """A pass forward and backward that adds nothing: processes run a sharded model together."""
    (batch,) = batches_for(model, [sequence])
    (0.0 * hidden_states(model, batch.input_BT).sum()).backward()
