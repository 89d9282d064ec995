"""A LoRA adapter, merged into the model that it is for, by the package peft."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from safetensors import safe_open

from kfade.errors import InputError
from kfade.models.sources import Place


def merge_adapter(name: str, model: Any, place: Place) -> Any:
    """``model`` with the adapter's change added to its weights.

    Raises:
        InputError: peft is missing, the adapter is of a kind that cannot be merged, or its tensors
            are not those of the model.
    """
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ImportError:
        raise InputError(
            f"{name}: an adapter, which the package peft loads; install it with "
            "pip install 'kfade[adapters]'"
        ) from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tensors that do not match: they are compared below
        adapted = PeftModel.from_pretrained(
            model, place.location, revision=place.options.get("revision")
        )
        loaded = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    if not hasattr(adapted.base_model, "merge_and_unload"):
        kind = adapted.peft_config["default"].peft_type
        kind = getattr(kind, "value", kind)  # a word, or an entry of a list of words
        raise InputError(
            f"{name}: an adapter of the kind {kind}, which is not a change of weights and cannot "
            "be merged into the model"
        )
    # Beside the adapter's own tensors there may be whole ones of the model, such as its embedding.
    _check_tensors(name, set(loaded), set(adapted.state_dict()), place)
    return adapted.merge_and_unload(safe_merge=True)


def _check_tensors(name: str, loaded: set[str], whole: set[str], place: Place) -> None:
    """That the file holds every tensor of the adapter and no other."""
    folder = place.folder
    path = folder / "adapter_model.safetensors" if folder is not None else Path()
    if not path.is_file():  # adapter_model.bin, as older versions wrote
        return
    with safe_open(path, "pt") as file:
        held = set(file.keys())
    wrong = sorted((loaded - held) | (held - loaded - whole))
    if wrong:
        verb = "holds" if wrong[0] in held else "lacks"
        raise InputError(
            f"{name}: its adapter_model.safetensors {verb} {wrong[0]}, and {len(wrong)} of its "
            f"{len(held | loaded)} tensors in all do not match the base; give the base that it was "
            "trained on"
        )
