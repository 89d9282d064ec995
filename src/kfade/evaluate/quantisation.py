"""Round-to-nearest quantisation: does an edit survive in a model that is served in few bits?

A weight w becomes s·round(w/s) with s = max|w| / (2^(bits−1) − 1). The maximum is over an output
channel for 8 bits, over 128 inputs of a channel for 4 bits. All linear maps but the vocabulary head
are rounded; the model still computes in its own dtype.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kfade.errors import InputError
from kfade.evaluate.division import map_shared
from kfade.method.update import Update
from kfade.models.experts import ExpertLayer, is_expert_layer
from kfade.models.masters import restored
from kfade.models.targets import memory_of
from kfade.runtime import distributed

GROUP = 128  # inputs that share a scale in 4 bits


def int8(weight_OI: Tensor) -> Tensor:
    """``weight_OI`` on the grid of 255 levels of each of its rows, in its own dtype."""
    return _round(weight_OI, 127, weight_OI.shape[1])


def int4(weight_OI: Tensor) -> Tensor:
    """``weight_OI`` on the grid of 15 levels of each 128 inputs of each row, in its own dtype."""
    return _round(weight_OI, 7, GROUP)


def bfloat16(weight: Tensor) -> Tensor:
    """``weight`` rounded to bfloat16, in its own dtype."""
    return weight.to(torch.bfloat16).to(weight.dtype)


Rounding = Callable[[Tensor], Tensor]
ROUNDINGS = (bfloat16, int8, int4)


def rounding_of(word: str | None) -> Rounding | None:
    """The rounding of that name, ``int8`` or ``int4``; None for None.

    Raises:
        InputError: another word.
    """
    roundings = {None: None, "int8": int8, "int4": int4}
    if word in roundings:
        return roundings[word]
    raise InputError(f"--quantise {word}: give int8 or int4")


@contextlib.contextmanager
def quantised(model: nn.Module, rounding: Rounding | None) -> Iterator[nn.Module]:
    """The rounded model within the ``with``; bit for bit the old one afterwards."""
    weights = {} if rounding is None else linear_weights(model)
    parts = {name: distributed.own_part(weight.detach()) for name, (weight, _) in weights.items()}
    with restored(parts):
        with torch.no_grad():
            for weight, transposed in weights.values():
                assert rounding is not None
                whole = distributed.gather_full(weight)
                rounded = rounding(whole.T).T if transposed else rounding(whole)
                distributed.scatter_into(weight, rounded)
        yield model


def linear_weights(model: Any) -> dict[str, tuple[Tensor, bool]]:
    """(weight, whether it is stored as [I, O]) of every linear map but the vocabulary head, those
    of experts included, except in a model that is spread over processes."""
    kept = {memory_of(model.get_input_embeddings().weight)}
    head = model.get_output_embeddings()
    if head is not None:
        kept.add(memory_of(head.weight))
    found: dict[str, tuple[Tensor, bool]] = {}
    whole = not distributed.is_sharded(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and memory_of(module.weight) not in kept:
            found[f"{name}.weight"] = module.weight, isinstance(module, Conv1D)
        elif whole and is_expert_layer(module):
            layer = ExpertLayer(module)
            found |= {f"{name}.{m.name}": (m.weight, layer.transposed) for m in layer.maps}
    return found


def survival(model: nn.Module, update: Update) -> dict[str, dict[str, dict[str, float]]]:
    """How much of each weight's ΔW is left after rounding, by weight and rounding.

    With E = Q(W + ΔW) − Q(W), the change of the rounded weights:
    ``surviving`` = ⟨E, ΔW⟩ / ‖ΔW‖², 1 when all of ΔW survives and 0 when none does;
    ``lost`` = ‖E − ΔW‖ / ‖ΔW‖, which also counts the noise that rounding adds and may exceed 1;
    ``norm`` = ‖ΔW‖. Parameters other than weights of linear maps are left out. The update has to
    fit the model.
    """
    weights = linear_weights(model)
    names = [name for name in update.deltas if name in weights]

    def measure(name: str) -> dict[str, dict[str, float]]:
        (weight, transposed), delta = weights[name], update.deltas[name]
        base, change = weight.detach().to(delta.dtype), delta.to(weight.device)
        if transposed:
            base, change = base.T, change.T
        return {own.__name__: _survival(base, change, own) for own in ROUNDINGS}

    found = map_shared(names, measure, "rounding", cost=lambda name: weights[name][0].numel())
    return dict(zip(names, found, strict=True))


def overall(by_weight: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    """``surviving`` and ``lost`` of all weights as one vector, by rounding."""
    result: dict[str, Any] = {}
    for rounding in ROUNDINGS:
        entries = [entry[rounding.__name__] for entry in by_weight.values()]
        size = sum(e["norm"] ** 2 for e in entries)
        surviving = sum(e["surviving"] * e["norm"] ** 2 for e in entries)
        lost = sum((e["lost"] * e["norm"]) ** 2 for e in entries)
        result[rounding.__name__] = {
            "surviving": surviving / size if size else 1.0,
            "lost": (lost / size) ** 0.5 if size else 0.0,
        }
    return result


def _survival(base_OI: Tensor, change_OI: Tensor, rounding: Rounding) -> dict[str, float]:
    seen = (rounding(base_OI + change_OI) - rounding(base_OI)).double()
    change = change_OI.double()
    size = change.square().sum().item()
    if size == 0:
        return {"surviving": 1.0, "lost": 0.0, "norm": 0.0}
    return {
        "surviving": (seen * change).sum().item() / size,
        "lost": (seen - change).norm().item() / size**0.5,
        "norm": size**0.5,
    }


def _round(weight_OI: Tensor, levels: int, group: int) -> Tensor:
    rows, columns = weight_OI.shape
    group = min(group, columns)
    padding = -columns % group  # zeros do not change a group's largest value
    exact = weight_OI.to(torch.promote_types(weight_OI.dtype, torch.float32))
    groups = nn.functional.pad(exact, (0, padding)).reshape(rows, -1, group)
    scale = groups.abs().amax(dim=2, keepdim=True) / levels
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    whole = (groups / scale).round().clamp(-levels, levels) * scale
    return whole.reshape(rows, -1)[:, :columns].to(weight_OI.dtype)
