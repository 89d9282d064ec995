"""The methods: what each minimises, and how its reference code trains.

Learning rates are those of 7B models; a small model needs its own sweep.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from kfade.baselines import elm as erasing
from kfade.baselines import repselect as selective
from kfade.baselines import rmu as representations
from kfade.baselines.losses import (
    Term,
    closeness,
    distillation,
    likelihood,
    preference,
    sharpness_aware,
    simple_preference,
    weighted_ascent,
)
from kfade.baselines.settings import Selection
from kfade.baselines.sophia import Sophia
from kfade.models.layers import choose_targets
from kfade.models.targets import Target


@dataclass(frozen=True)
class Defaults:
    """How a method's reference code trains."""

    lr: float
    batch: int = 32
    epochs: float | None = None
    """Passes over the forget set, unless ``steps`` are given."""
    steps: int | None = None
    accumulate: int = 1
    warm_up: Literal["epoch", "tenth", "none"] = "none"
    """Steps of rising learning rate: one epoch, a tenth of all steps, or none."""
    decay: bool = False
    weight_decay: float = 0.01
    clip: float | None = None
    optimizer: type[Optimizer] = AdamW
    selection: Selection | None = None
    """How the one direction of all steps is found, if there is one."""
    lora: int = 0
    """Rank of low-rank changes; 0 trains the weights themselves."""
    layers: str | None = None
    """Blocks whose linear maps are trained, attention's too; ``Method.trains`` when None."""


@dataclass(frozen=True)
class Method:
    """A sum of terms to minimise, and how to."""

    terms: tuple[Term, ...]
    defaults: Defaults
    trains: tuple[str, ...] | None = None
    """Names of the weights that are trained; every parameter of the model when None."""
    last_block: int | None = None
    """Blocks after it are not run."""


# The trainer of the TOFU family clips gradients and lets the learning rate fall linearly.
TOFU: dict[str, Any] = {"lr": 1e-5, "warm_up": "epoch", "decay": True, "clip": 1.0}
FIVE_EPOCHS, TEN_EPOCHS = Defaults(**TOFU, epochs=5), Defaults(**TOFU, epochs=10)


def gradient_ascent() -> Method:
    """GA: −CE_f."""
    return Method((likelihood("forget", -1.0),), FIVE_EPOCHS)


def gradient_difference(*, retain_weight: float = 1.0) -> Method:
    """GD: −CE_f + CE_r."""
    return Method(_difference(retain_weight), FIVE_EPOCHS)


def kl_minimisation(*, retain_weight: float = 1.0) -> Method:
    """KL-min: −CE_f + KL(base ‖ current) on retain tokens."""
    return Method((likelihood("forget", -1.0), closeness(retain_weight)), FIVE_EPOCHS)


def npo(*, beta: float = 0.1, coefficient: float = 1.0, retain_weight: float = 1.0) -> Method:
    """NPO: c (2/β) softplus(−β (L − L_base)) + CE_r."""
    return Method(_and_retain(preference(beta, coefficient), retain_weight), TEN_EPOCHS)


def simnpo(
    *,
    beta: float = 2.5,
    gamma: float = 0.0,
    coefficient: float = 0.1375,
    retain_weight: float = 1.0,
) -> Method:
    """SimNPO: c (2/β) softplus(−β (L/|y| − γ)) + CE_r; β and c as for 5 % of TOFU."""
    forget = simple_preference(beta, gamma, coefficient)
    return Method(_and_retain(forget, retain_weight), TEN_EPOCHS)


def npo_sam(
    *,
    beta: float = 0.1,
    coefficient: float = 1.0,
    retain_weight: float = 1.0,
    sam_radius: float = 0.01,
) -> Method:
    """NPO with the gradient of its forget term taken at θ + ρ g/‖g‖; trained as NPO.

    ρ is that of the reference code on MUSE.

    Raises:
        InputError: the radius is not above 0.
    """
    forget = sharpness_aware(preference(beta, coefficient), sam_radius)
    return Method(_and_retain(forget, retain_weight), TEN_EPOCHS)


def wga(*, beta: float = 1.0, coefficient: float = 1.0, retain_weight: float = 1.0) -> Method:
    """WGA: c p^β log p + CE_r; defaults of OpenUnlearning."""
    return Method(_and_retain(weighted_ascent(beta, 0.0, coefficient), retain_weight), FIVE_EPOCHS)


def satimp(
    *,
    beta1: float = 5.0,
    beta2: float = 1.0,
    coefficient: float = 0.1,
    retain_weight: float = 1.0,
) -> Method:
    """SatImp: c p^β₁ (1 − p)^β₂ log p + CE_r; defaults of OpenUnlearning."""
    forget = weighted_ascent(beta1, beta2, coefficient)
    return Method(_and_retain(forget, retain_weight), FIVE_EPOCHS)


def undial(*, beta: float = 10.0, coefficient: float = 1.0, retain_weight: float = 0.0) -> Method:
    """UNDIAL: c CE(softmax(z_base − β e_y), current) + w CE_r; defaults of OpenUnlearning.

    The paper and OpenUnlearning use no retain data; at w = 0 none is read in training.
    """
    retain = (likelihood("retain", retain_weight),) if retain_weight else ()
    defaults = Defaults(**{**TOFU, "lr": 1e-4}, epochs=10)
    return Method((distillation(beta, coefficient), *retain), defaults)


def soul(*, gamma: float = 2.0) -> Method:
    """SOUL: −CE_f + γ CE_r by Sophia."""
    schedule: dict[str, Any] = {"epochs": 5, "warm_up": "tenth", "decay": True}
    defaults = Defaults(lr=5e-6, **schedule, weight_decay=0.1, clip=1.0, optimizer=Sophia)
    return Method(_difference(gamma), defaults)


def rmu(
    model: Any,
    *,
    layer: int = 7,
    coefficient: float = 6.5,
    retain_weight: float = 1200.0,
    seed: int = 0,
) -> Method:
    """RMU: moves hidden states of forget text at block ``layer`` to c u and holds those of retain
    text; settings for Zephyr.

    Raises:
        InputError: the model has no such block.
    """
    block = representations.find_block(model, layer)
    width = model.get_input_embeddings().weight.shape[1]
    vector_D = representations.control_vector(width, coefficient, seed)
    terms = (
        representations.steering(block, vector_D),
        representations.holding(block, retain_weight),
    )
    names = tuple(representations.trained_weights(model, layer))
    return Method(terms, Defaults(lr=5e-5, batch=4, steps=150), names, last_block=layer)


def repselect(
    model: nn.Module, *, components: int | None = None, adapter_lr: float = 0.01
) -> Method:
    """RepSelect: −CE_f along one direction without the gradient's top components, by plain descent.

    Raises:
        InputError: a number out of its range, or the model has experts.
    """
    selection = Selection(components, adapter_lr)
    plain: dict[str, Any] = {"weight_decay": 0.0, "optimizer": SGD, "selection": selection}
    names = tuple(selective.trained_weights(model))
    terms = (likelihood("forget", -1.0),)
    return Method(terms, Defaults(lr=0.05, batch=8, steps=10, **plain), names)


def elm(guidance: erasing.Guidance, *, retain_weight: float = 1.0) -> Method:
    """ELM: erasure + KL on retain text + fluency; low-rank changes of attention and feed-forward.

    3000 forget sequences one by one, four a step.
    """
    terms = (erasing.erasure(guidance), closeness(retain_weight), erasing.fluency(guidance, 1.0))
    defaults = Defaults(lr=5e-5, batch=1, accumulate=4, steps=750, lora=256, layers="4-7")
    return Method(terms, defaults)


def block_targets(model: nn.Module, layers: str | None) -> list[Target]:
    """Every linear map of the blocks ``layers``, attention's too; of all blocks when None.

    Raises:
        InputError: the model has no such blocks.
    """
    return choose_targets(model, layers=layers, attention=True).targets


def _difference(retain_weight: float) -> tuple[Term, ...]:
    return _and_retain(likelihood("forget", -1.0), retain_weight)


def _and_retain(forget: Term, weight: float) -> tuple[Term, ...]:
    """The term and ``weight`` times CE_r."""
    return (forget, likelihood("retain", weight))
