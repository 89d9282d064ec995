"""Read only this process's part of a checkpoint.

transformers makes a model without memory (on the meta device) and then fills in its weights. If
weights were divided over processes (``distributed.shard``) in between, it reads of each tensor in a
safetensors file only the rows of this process. No process then holds the whole model.

It reads the rows of a stored tensor, before conversions. So this is done only where every weight is
stored under its own name and in its own shape, and nothing is converted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from kfade.models.sources import Place
from kfade.runtime import distributed

Divide = Callable[[nn.Module], None]
"""Divides the weights of a model over the processes, in place."""


def divided_class(config: Any, place: Place, divide: Divide) -> Any:
    """transformers' class for ``config``, whose models divide themselves when they are made.

    None where weights cannot be read in parts: of a GGUF file, of a model with code of its own, or
    of one of several modalities.
    A model whose weights are stored in other names or shapes is made whole.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    plain = isinstance(kind, type) and getattr(kind, "config_class", None) is type(config)
    if place.is_gguf or getattr(config, "auto_map", None) or not plain:
        return None

    def make(self: Any, *arguments: Any, **options: Any) -> None:
        kind.__init__(self, *arguments, **options)
        with torch.device("cpu"):  # only the parameters are to be on the meta device
            if not distributed.any_of(not _is_stored_by_name(self, place)):
                divide(self)
        self.__class__ = kind

    same = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(kind.__name__, (kind,), {"__init__": make, **same})


def was_converted(model: Any) -> bool:
    """Whether transformers has computed weights of ``model`` from several or permuted tensors."""
    used = getattr(model, "_weight_conversions", None) or ()
    return any(getattr(conversion, "operations", None) for conversion in used)


def _is_stored_by_name(model: Any, place: Place) -> bool:
    """Whether files hold all parameters under their names and in their shapes, but tied ones."""
    stored: dict[str, list[int]] = {}
    for path in sorted(place.folder.glob("model*.safetensors")) if place.folder else []:
        with safe_open(path, "pt") as file:
            stored |= {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return all(
        stored.get(name) == list(parameter.shape)
        for name, parameter in model.named_parameters()
        if name not in tied
    )
