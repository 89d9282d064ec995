"""A LoRA adapter, merged into its base model by the package peft."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from kfade.errors import InputError
from kfade.models.sources import ADAPTER_CONFIG, Place

FILES = ("adapter_model.safetensors", "adapter_model.bin")
# peft can merge these, but what they add to a weight depends on the input or the task.
_NOT_FIXED = ("XLORA", "POLY", "SHADOW")
_MISMATCH = re.compile(
    r"size mismatch for (\S+): copying a param with shape torch\.Size\((\[[\d, ]*\])\) from "
    r"checkpoint, the shape in current model is torch\.Size\((\[[\d, ]*\])\)"
)


def check_adapter(name: str, place: Place) -> None:
    """Check an adapter before its base is loaded.

    Raises:
        InputError: peft is missing, the adapter is of a kind that cannot be merged, or it has no
            weights.
    """
    try:
        from peft import PeftConfig
        from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    except ImportError:
        raise InputError(
            f"{name}: an adapter, which the package peft loads; install it with "
            "pip install 'kfade[adapters]'"
        ) from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of settings that another version wrote
            config = PeftConfig.from_pretrained(
                place.location, revision=place.options.get("revision")
            )
    except KeyError as error:
        raise InputError(
            f"{name}: its {ADAPTER_CONFIG} asks for {error}, which this version of peft does not "
            "know; upgrade peft"
        ) from None
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
    if not hasattr(tuner, "merge_and_unload") or kind in _NOT_FIXED:
        raise InputError(
            f"{name}: an adapter of the kind {kind}, which is not a change of weights and cannot "
            "be merged into the model"
        )
    folder = Path(place.location)
    if folder.is_dir() and not any((folder / file).is_file() for file in FILES):
        raise InputError(
            f"{name}: holds {ADAPTER_CONFIG} but no {FILES[0]}; put the adapter's weights there"
        )


def merge_adapter(name: str, model: Any, place: Place, base: str) -> Any:
    """``model`` with the adapter's change added to its weights.

    Where the adapter changes one of several layers that share a weight, such as an embedding that
    is tied to the head, that layer gets a weight of its own.

    Args:
        base: name of the model, for messages.

    Raises:
        InputError: the adapter's tensors are not those of the model, or a layer that it changes is
            in the model in several places.
    """
    from peft import PeftModel, get_peft_model_state_dict

    with warnings.catch_warnings():
        # Warnings of tied weights, and of tensors that do not match, which are compared below.
        warnings.simplefilter("ignore")
        try:
            adapted = PeftModel.from_pretrained(
                model, place.location, revision=place.options.get("revision")
            )
        except RuntimeError as error:
            _refuse_mismatch(name, str(error), model, base)
            raise
        loaded = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        # The file may also hold whole tensors of the model, such as its embedding.
        _check_tensors(name, set(loaded), set(adapted.state_dict()), place)
        tied = {id(config): config.tie_word_embeddings for config in _configs(model)}
        untied = _untie(name, model)
        merged = adapted.merge_and_unload(safe_merge=True)
    for layer, key, shared in untied:
        if torch.equal(getattr(layer, key), shared):  # the adapter changed all sharers alike
            setattr(layer, key, shared)
    head, embedding = merged.get_output_embeddings(), merged.get_input_embeddings()
    share = head is None or head.weight is embedding.weight
    for config in _configs(merged):
        config.tie_word_embeddings = tied[id(config)] and share
    merged.all_tied_weights_keys = merged.get_expanded_tied_weights_keys(all_submodels=True)
    return merged


def _refuse_mismatch(name: str, said: str, model: nn.Module, base: str) -> None:
    """Raises InputError where peft says that a tensor has another shape than the base needs."""
    found = _MISMATCH.search(said)
    if found is None:
        return
    tensor, has, needs = found[1].removeprefix("base_model.model."), found[2], found[3]
    layer = re.split(r"\.(?:lora_|base_layer|modules_to_save)", tensor)[0]
    weight = _weights(model).get(layer)
    there = f" ({layer} is of shape {list(weight.shape)} there)" if weight is not None else ""
    raise InputError(
        f"{name}: its {tensor} is of shape {has}, where its {ADAPTER_CONFIG} and the base "
        f"{base}{there} ask for {needs}; give the base that it was trained on, and the settings "
        "that it was saved with"
    )


def _weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """{layer: its weight}, with the names from before peft wrapped the layers."""
    names = model.named_parameters(remove_duplicate=False)
    return {
        key.replace(".base_layer", "").removesuffix(".weight"): weight
        for key, weight in names
        if key.endswith(".weight")
    }


def _untie(name: str, model: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Give each layer that the adapter changes its own copy of weights that it shares.

    Returns:
        (layer, name of the weight, shared weight) of each.

    Raises:
        InputError: the layer itself stands in several places of the model.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    holders: dict[nn.Parameter, set[tuple[int, str]]] = {}
    places: dict[int, set[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        places.setdefault(id(module), set()).add(path)
        for key, weight in module.named_parameters(recurse=False):
            holders.setdefault(weight, set()).add((id(module), key))
    untied: list[tuple[nn.Module, str, nn.Parameter]] = []
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    for layer in {id(m.get_base_layer()): m.get_base_layer() for m in layers}.values():
        if len(places[id(layer)]) > 1 and next(layer.parameters(recurse=False), None) is not None:
            names = sorted(path.replace(".base_layer", "") for path in places[id(layer)])
            if len(set(names)) > 1:
                raise InputError(
                    f"{name}: changes {names[0]}, which the model has again as {names[1]}; one "
                    "of them cannot be changed alone, so the adapter cannot be merged"
                )
        for key, weight in list(layer.named_parameters(recurse=False)):
            if len(holders[weight]) > 1:
                holders[weight].remove((id(layer), key))
                setattr(layer, key, nn.Parameter(weight.detach().clone(), weight.requires_grad))
                untied.append((layer, key, weight))
    return untied


def _configs(model: Any) -> list[Any]:
    """The configurations of the model and its text model that tell whether the head is tied."""
    configs = (model.config, model.config.get_text_config())
    return [config for config in configs if hasattr(config, "tie_word_embeddings")]


def _check_tensors(name: str, loaded: set[str], whole: set[str], place: Place) -> None:
    """Raises InputError unless the file holds every tensor of the adapter and no others."""
    folder = place.folder
    path = folder / FILES[0] if folder is not None else Path()
    if not path.is_file():  # adapter_model.bin, as older versions wrote
        return
    with safe_open(path, "pt") as file:
        held = set(file.keys())
    wrong = sorted((loaded - held) | (held - loaded - whole))
    if wrong:
        verb = "holds" if wrong[0] in held else "lacks"
        raise InputError(
            f"{name}: its {FILES[0]} {verb} {wrong[0]}, and {len(wrong)} of its "
            f"{len(held | loaded)} tensors in all do not match the base; give the base that it was "
            "trained on"
        )
