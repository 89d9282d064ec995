"""Load, freeze and save a causal language model: hub id, local folder, or GGUF file.

The only file that imports transformers' loaders. No code from a hub runs unless asked for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from kfade.errors import InputError
from kfade.lengths import no_memory_of_lengths

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_model(
    name: str,
    *,
    dtype: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[nn.Module, Any]:
    """(model, tokenizer) of a hub id, a local folder, or a GGUF file (which is dequantised).

    Args:
        dtype: ``float32`` or ``bfloat16``; None keeps the checkpoint's own, float32 for GGUF.
        device: as PyTorch spells it; None: the GPU if there is one.

    Raises:
        InputError: nothing there, not a causal language model, quantised weights, NaN or Inf in
            weights.
    """
    from transformers import AutoModelForCausalLM

    given = _dtype_of(dtype)
    tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
    source, options = _source(name)
    gguf = "gguf_file" in options
    wanted: Any = given or (torch.float32 if gguf else "auto")
    with _loading(name):
        model: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=wanted, trust_remote_code=trust_remote_code, **options
        )
    if gguf:
        _forget_gguf(model)
    if getattr(model.config, "quantization_config", None) is not None:
        raise InputError(
            f"{name}: its weights are quantised; load the full-precision model and quantise the "
            "edited one afterwards"
        )
    for parameter_name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise InputError(f"{name}: NaN or Inf in {parameter_name}; get a whole copy")
    model.to(device or default_device())
    return model.eval(), tokenizer


def default_device() -> str:
    """The GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model named as for :func:`load_model`, without its weights.

    Raises:
        InputError: nothing there, or nothing that is a model.
    """
    from transformers import AutoTokenizer

    source, options = _source(name)
    with _loading(name):
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code, **options)


def load_skeleton(name: str, *, dtype: str | None = None, trust_remote_code: bool = False) -> Any:
    """A model named as for :func:`load_model` without its weights, on fake tensors.

    They have shapes and dtypes, and passes run on them, but there are no numbers and no memory is
    used. Only the configuration is read.

    Raises:
        InputError: nothing there, or nothing that is a model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    wanted = _dtype_of(dtype)
    source, options = _source(name)
    with _loading(name):
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, **options)
        wanted = wanted or ("gguf_file" not in options and config.dtype) or torch.float32
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = AutoModelForCausalLM.from_config(
                config, dtype=wanted, trust_remote_code=trust_remote_code
            )
    return model.eval()


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no parameter requiring gradients, both as before on leaving."""
    modes = {module: module.training for module in model.modules()}
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.eval()
        model.requires_grad_(False)
        with no_memory_of_lengths(model):
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a folder of safetensors that ``from_pretrained`` loads."""
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)


def model_window(model: Any) -> int | None:
    """The longest input the model was made for, where its configuration says."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _dtype_of(dtype: str | None) -> torch.dtype | None:
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"--dtype {dtype}: give one of {', '.join(DTYPES)}")
    return DTYPES[dtype] if dtype else None


def _source(name: str) -> tuple[str, dict[str, Any]]:
    """What transformers' loaders call the model, and the options that they need for it."""
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"{name}: no such GGUF file")
        return str(path.parent), {"gguf_file": path.name}
    if path.exists() and not (path / "config.json").is_file():
        raise InputError(f"{name}: not a model folder, it has no config.json")
    return name, {}


@contextlib.contextmanager
def _loading(name: str) -> Iterator[None]:
    """Turns the loaders' many complaints into one line."""
    try:
        yield
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise InputError(
            f"{name}: could not be loaded as a causal language model ({reason}); give a hub id, a "
            "folder that from_pretrained loads, or a GGUF file"
        ) from None


def _forget_gguf(model: Any) -> None:
    """The weights are dequantised; drop the marks that would stop them from being saved."""
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer = None
    model.is_quantized = False
