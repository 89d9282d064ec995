"""An update as a LoRA adapter, in the format of the package peft.

Each change ΔW [O, I] is replaced by the nearest matrix of rank R in the Frobenius norm,

    ΔW ≈ B A,   B = U √σ  [O, R],   A = √σ Vᵀ  [R, I],

which keeps the R largest singular values of ΔW = U diag(σ) Vᵀ. The error is the root of the sum of
the squares of the other singular values (Eckart and Young). A Gauss-Newton update need not be close
to low rank: check the error before you use the adapter in place of the update.

Shapes: O outputs, I inputs of a layer, R rank.
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
from kfade.runtime.progress import track
from kfade.runtime.tensors import write_tensors

PREFIX = "base_model.model."  # every tensor name in a peft adapter begins with it


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
    """The same for all weights together."""

    def save(self, path: Path) -> None:
        """Write the tensors as a safetensors file; peft expects ``adapter_model.safetensors``."""
        write_tensors(path, self.tensors, {"format": "pt"})


def to_lora(
    update: Update,
    model: nn.Module,
    rank: int,
    *,
    base: str = "",
    device: torch.device | str = "cpu",
) -> Lora:
    """The adapter of rank ``rank`` that is nearest to ``update``.

    Args:
        model: the model that the update belongs to. Its modules are used, not their values.
        base: name of the model, written into the adapter's configuration.
        device: where the singular values are computed.

    Raises:
        InputError: the update is empty, the rank is below 1 or above the full rank of every weight,
            or a change does not belong to the weight of a linear layer of this model.
    """
    if not update.deltas:
        raise InputError("the update is empty: no adapter can be made from it; give another update")
    layers = {name: _linear(model, name, delta) for name, delta in update.deltas.items()}
    most = max(min(delta.shape) for delta in update.deltas.values())
    if not 1 <= rank <= most:
        raise InputError(f"--rank {rank}: give 1 to {most}, the full rank")
    tensors: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    lost = size = 0.0
    for name in track(list(update.deltas), "singular values"):
        delta = update.deltas[name]
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
    """The linear layer whose weight is ``name``; its shape must be that of ``delta``."""
    modules = dict(model.named_modules())
    module = modules.get(name.removesuffix(".weight"))
    if not (name.endswith(".weight") and isinstance(module, nn.Linear | Conv1D)):
        raise InputError(
            f"the update changes {name}, which is not the weight of a linear layer of "
            f"{type(model).__name__}, and an adapter can change nothing else; unlearn without "
            "--joint-bias, with --experts none, or give the --model that the update was computed on"
        )
    if module.weight.shape != delta.shape:
        raise InputError(
            f"the update changes {name} of shape {tuple(delta.shape)}, the model has "
            f"{tuple(module.weight.shape)}: the update was computed on another model; give that "
            "one as --model"
        )
    return module


def _truncated(delta_OI: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """(A [R, I], B [O, R], all singular values). Rows and columns beyond the full rank are zero."""
    u, values, v = torch.linalg.svd(delta_OI, full_matrices=False)
    kept = min(rank, len(values))
    root = values[:kept].sqrt()
    a_RI = delta_OI.new_zeros(rank, delta_OI.shape[1])
    b_OR = delta_OI.new_zeros(delta_OI.shape[0], rank)
    a_RI[:kept] = root[:, None] * v[:kept]
    b_OR[:, :kept] = u[:, :kept] * root
    return a_RI, b_OR, values
