"""The settings of a training run: the numbers of its loop, and its selection of a direction."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.optim import AdamW, Optimizer

from kfade.errors import InputError
from kfade.method.settings import at_least

MOST_COMPONENTS = 512
PART = 8  # 512 is an eighth of the smaller sides of Llama 3.1 8B, the published model


@dataclass(frozen=True)
class Selection:
    """How the one direction of all steps is found (:mod:`kfade.baselines.repselect`).

    Raises:
        InputError: a number out of its range.
    """

    components: int | None = None
    """k, the number of collapsed components; None for 512, but at most an eighth of a weight's
    smaller side."""
    adapter_lr: float = 0.01
    """η, the learning rate of the adapter."""

    def __post_init__(self) -> None:
        if self.components is not None:
            at_least("--components", self.components, 2)
        if not (math.isfinite(self.adapter_lr) and self.adapter_lr >= 0):
            raise InputError(f"--adapter-lr {self.adapter_lr}: give a finite number, 0 or more")

    def components_of(self, name: str, weight: Tensor) -> int:
        """k of one weight.

        Raises:
            InputError: the weight has no more components than k.
        """
        smaller = min(weight.shape)
        if self.components is None:
            return min(MOST_COMPONENTS, max(2, smaller // PART))
        if self.components >= smaller:
            raise InputError(
                f"--components {self.components}: {name} has {smaller} in all; give fewer"
            )
        return self.components


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
