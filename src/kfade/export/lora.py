"""An update as a LoRA adapter, in the format of the package peft.

For each changed weight, seen as a map from I inputs to O outputs, the nearest matrix of rank R,

    ΔW ≈ B A,   B = U √σ  [O, R],   A = √σ Vᵀ  [R, I],

from the R largest singular values of ΔW = U diag(σ) Vᵀ. What is left out has the norm of the other
singular values (Eckart and Young). Gauss-Newton updates are not of low rank by design: check the
error before you use the adapter in place of the update.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kfade.errors import InputError
from kfade.method.update import Update
from kfade.runtime.files import write_tensors
from kfade.runtime.progress import track

PREFIX = "base_model.model."  # of every name in a peft adapter


@dataclass(frozen=True)
class Lora:
    """An adapter for peft, and its distance from the update."""

    tensors: dict[str, Tensor]
    """``base_model.model.MODULE.lora_A.weight`` [R, I] and ``...lora_B.weight`` [O, R]."""
    config: dict[str, Any]
    """``adapter_config.json``."""
    errors: dict[str, float]
    """‖ΔW − BA‖ / ‖ΔW‖ by weight, Frobenius norms."""
    error: float
    """The same over all weights together."""

    def save(self, path: Path) -> None:
        """Write the tensors, ``adapter_model.safetensors``."""
        write_tensors(path, self.tensors, {"format": "pt"})


def to_lora(
    update: Update,
    model: nn.Module,
    rank: int,
    *,
    base: str = "",
    device: torch.device | str = "cpu",
) -> Lora:
    """The adapter of that rank that is nearest to ``update``.

    Args:
        model: the model that the update fits; only its modules are used, not their values.
        base: the model's name for the adapter's configuration.
        device: where the singular values are computed.

    Raises:
        InputError: a rank below 1 or above that of every weight, a change of something that is not
            the weight of a linear map, or an update of another model.
    """
    if not update.deltas:
        raise InputError("the update changes nothing: an adapter cannot be made of it")
    layers = {name: _linear(model, name, delta) for name, delta in update.deltas.items()}
    most = max(min(delta.shape) for delta in update.deltas.values())
    if not 1 <= rank <= most:
        raise InputError(f"--rank {rank}: give 1 to {most}, the full rank")
    tensors: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    lost = size = 0.0
    for name, delta in track(list(update.deltas.items()), "singular values"):
        layer = name.removesuffix(".weight")
        delta_OI = delta.T if isinstance(layers[name], Conv1D) else delta
        a_RI, b_OR, values = _truncated(delta_OI.to(device), rank)
        tensors[f"{PREFIX}{layer}.lora_A.weight"] = a_RI.contiguous().cpu()
        tensors[f"{PREFIX}{layer}.lora_B.weight"] = b_OR.contiguous().cpu()
        squares = values.double().square()
        own_lost, own_size = squares[rank:].sum().item(), squares.sum().item()
        errors[name] = (own_lost / own_size) ** 0.5 if own_size else 0.0
        lost, size = lost + own_lost, size + own_size
    transposed = any(isinstance(layer, Conv1D) for layer in layers.values())
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,  # peft scales BA by alpha / r
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "target_modules": [name.removesuffix(".weight") for name in update.deltas],
        "inference_mode": True,
    }
    return Lora(tensors, config, errors, (lost / size) ** 0.5 if size else 0.0)


def _linear(model: nn.Module, name: str, delta: Tensor) -> nn.Module:
    """The linear map whose weight is called ``name``."""
    modules = dict(model.named_modules())
    module = modules.get(name.removesuffix(".weight"))
    if not (name.endswith(".weight") and isinstance(module, nn.Linear | Conv1D)):
        raise InputError(
            f"the update changes {name}, which is not the weight of a linear map of "
            f"{type(model).__name__}: an adapter holds nothing else; unlearn without --joint-bias, "
            "or give the --model that the update was computed on"
        )
    if module.weight.shape != delta.shape:
        raise InputError(
            f"the update changes {name} of shape {tuple(delta.shape)}, the model has "
            f"{tuple(module.weight.shape)}: it was computed on another model"
        )
    return module


def _truncated(delta_OI: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """(A [R, I], B [O, R], all singular values); zeros beyond a weight's own full rank."""
    u, values, v = torch.linalg.svd(delta_OI, full_matrices=False)
    kept = min(rank, len(values))
    root = values[:kept].sqrt()
    a_RI = delta_OI.new_zeros(rank, delta_OI.shape[1])
    b_OR = delta_OI.new_zeros(delta_OI.shape[0], rank)
    a_RI[:kept] = root[:, None] * v[:kept]
    b_OR[:, :kept] = u[:, :kept] * root
    return a_RI, b_OR, values
