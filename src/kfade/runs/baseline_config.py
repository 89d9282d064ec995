"""The settings of a baseline run: its method, model, data and training; see ``config``."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from cyclopts import Parameter

from kfade.runs import options as o
from kfade.runs.baseline_choices import LORA_ALPHA, LORA_DROPOUT, METHODS
from kfade.runs.config import DataConfig, ModelConfig


@o.settings(o.LOSS)
@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The loss of the method. Unset options are as in its reference code; others are refused."""

    beta: float | None = None
    """β of npo and npo-sam (unset: 0.1), simnpo (unset: 2.5), wga (unset: 1) and undial (unset:
    10)."""
    beta1: float | None = None
    """β₁ of satimp, the exponent of p. Unset: 5."""
    beta2: float | None = None
    """β₂ of satimp, the exponent of 1 − p. Unset: 1."""
    gamma: float | None = None
    """γ of simnpo (unset: 0), or the weight of the retain loss in soul (unset: 2)."""
    coefficient: float | None = None
    """Weight of the forget term in npo, npo-sam, wga and undial (unset: 1), satimp (unset: 0.1) and
    simnpo (unset: 0.1375), or length c of the control vector of rmu (unset: 6.5)."""
    retain_weight: float | None = None
    """Weight of the retain term. Unset: 1; for rmu 1200, for undial 0."""
    sam_radius: float | None = None
    """Length ρ of npo-sam's step uphill, before the gradient of its forget term is taken. Unset:
    0.01."""
    layer: int | None = None
    """Block whose output rmu changes, counted from 0. Unset: 7."""
    concept: str | None = None
    """Description of what elm erases, as in 'Greek mythology, its gods'. elm needs it."""
    eta: float | None = None
    """Strength η of the guidance in elm. Unset: 1000."""
    components: int | None = None
    """Number of top components of each gradient that repselect collapses. Unset: 512, but at most
    an eighth of the weight's smaller side."""
    adapter_lr: float | None = None
    """Learning rate of the adapter that learns the forget set in repselect. Unset: 0.01."""


@o.settings(o.TRAINING)
@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The training loop. Unset options are as in the method's reference code."""

    lr: float | None = None
    """Peak learning rate. Unset: that of the method's reference code."""
    epochs: float | None = None
    """Number of passes over the forget set. Unset: that of the method's reference code."""
    steps: int | None = None
    """Number of optimiser steps, instead of --epochs."""
    batch: int | None = None
    """Number of sequences of each set in a batch. Unset: 32; for repselect 8, rmu 4, elm 1."""
    accumulate: int | None = None
    """Number of batches in a step; their losses are averaged. Unset: 1; for elm 4."""
    warm_up: int | None = None
    """Number of steps of learning-rate warm-up. Unset: one epoch; for soul a tenth of the steps;
    for rmu, repselect and elm 0."""
    decay: bool | None = None
    """Decay the learning rate to 0 after the warm-up. Unset: yes; for rmu, repselect and elm
    no."""
    weight_decay: float | None = None
    """Weight decay of the optimiser. Unset: 0.01; for soul 0.1, repselect 0."""
    clip: float | None = None
    """Maximum norm of the gradient, 0 for no limit. Unset: 1; for rmu, repselect and elm no
    limit."""
    evaluate_every: int | None = None
    """Number of steps between evaluations. Unset: a tenth of the steps."""
    max_kl: float | None = None
    """Keep the checkpoint with the most forgetting of those up to this retain KL, in nats per
    token. Unset: the last checkpoint."""


@o.settings(o.WEIGHTS)
@dataclass(frozen=True, kw_only=True)
class WeightsConfig:
    """The weights to train. Unset options are as in the method's reference code."""

    layers: str | None = None
    """Transformer blocks to train, counted from 0, as in 3-6 or 0,2,8-11. Unset: those of the
    method's reference code."""
    target: str | None = None
    """Glob pattern for the names of the parameters to train. Unset: those of the method's reference
    code."""
    lora: int | None = None
    """Rank of the low-rank (LoRA) changes, 0 to train the weights themselves. Unset: 0; for elm
    256."""
    lora_alpha: float = LORA_ALPHA
    """LoRA α: the low-rank changes are scaled by α / rank."""
    lora_dropout: float = LORA_DROPOUT
    """Dropout probability of the inputs of the low-rank changes."""


@o.settings(o.RUN)
@dataclass(frozen=True)
class BaselineRequest:
    """The baseline method, the model, the data and the training."""

    method: Annotated[str, o.argument("method"), Parameter(help=f"Method: {METHODS}.")] = ""
    """Name of the method."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model."""
    data: DataConfig = field(default_factory=DataConfig, kw_only=True)
    """The data."""
    loss: LossConfig = field(default_factory=LossConfig, kw_only=True)
    """The method's loss."""
    training: TrainingConfig = field(default_factory=TrainingConfig, kw_only=True)
    """The training loop."""
    weights: WeightsConfig = field(default_factory=WeightsConfig, kw_only=True)
    """The weights to train."""
    seed: int = field(default=0, kw_only=True)
    """Random seed of the order of batches, of dropout and of the held-out split."""
    checkpoints: Annotated[bool, o.FLAG, Parameter(group=o.TRAINING)] = field(
        default=False, kw_only=True
    )
    """Write the update of every evaluation into checkpoints/."""
    export_model: Annotated[bool, o.FLAG] = field(default=False, kw_only=True)
    """Also write the edited model, as a folder that from_pretrained loads."""

    shard: Annotated[bool, o.FLAG] = field(default=False, kw_only=True)
    """Shard the weights of the model's blocks, their copies and the optimiser's state over the
    processes of torchrun. Not for elm and repselect."""

    @property
    def asked(self) -> dict[str, Any]:
        """The settings that decide the result, as JSON values for the manifest."""
        return {
            "method": self.method,
            "model": asdict(self.model),
            "data": asdict(self.data),
            "loss": given(self.loss),
            "training": given(self.training),
            "weights": given(self.weights),
            "seed": self.seed,
        }


def given(config: LossConfig | TrainingConfig | WeightsConfig) -> dict[str, Any]:
    """The settings that are set."""
    return {name: value for name, value in asdict(config).items() if value is not None}
