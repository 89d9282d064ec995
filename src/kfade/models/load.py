"""Load, freeze and save a causal language model: hub id, local folder, GGUF file, LoRA adapter.

The only file that imports transformers' loaders. Code from a hub runs only where that is allowed.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from kfade.errors import InputError
from kfade.models.adapters import check_adapter, merge_adapter
from kfade.models.faults import (
    CONFIG,
    TOKENIZER,
    WEIGHTS,
    check_config,
    check_report,
    check_stored,
    check_weights,
    listed,
    quiet,
    reading,
)
from kfade.models.lengths import fresh_frequencies
from kfade.models.parts import Divide, divided_class, was_converted
from kfade.models.sources import Place, Source, copy_companions, other_weights, resolve
from kfade.models.vocabulary import check_has_vocabulary, fit_vocabulary
from kfade.runtime import distributed
from kfade.runtime.files import making, writing
from kfade.runtime.progress import waiting

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
logger = logging.getLogger(__name__)


def load_model(
    name: str,
    *,
    dtype: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    tokenizer: str | None = None,
    needs_tokenizer: bool = True,
    divide: Divide | None = None,
) -> tuple[nn.Module, Any]:
    """(model, tokenizer) of a hub id, a local folder, a GGUF file, or a LoRA adapter.

    A GGUF file is dequantised. An adapter is merged into the base that it names.

    Args:
        dtype: ``float32`` or ``bfloat16``; None keeps the checkpoint's own, float32 for GGUF.
        device: as PyTorch spells it; None: the GPU if there is one.
        revision: branch, tag or commit of the hub.
        tokenizer: hub id or folder of the tokenizer, if it is not with the model.
        needs_tokenizer: False allows a model without one; the tokenizer is then None.
        divide: divides the model over several processes. Where ``parts`` allows it, each reads its
            own part only; else each reads the whole model before it is divided, with a note.

    Raises:
        InputError: nothing there, files that are not whole, not a causal language model, quantised
            weights, weights that are missing or have no place in the model, NaN or Inf in weights,
            no tokenizer, or one with tokens that the model has no embedding for.
    """
    given = _dtype_of(dtype)
    with waiting(f"loading {name}") as download:
        resolved = resolve(Source(name, revision, tokenizer))
        place, adapter = resolved.weights, resolved.adapter
        called = name
        if adapter is not None:
            called = f"{name} on its base {place.location}"
            with reading(name, CONFIG, adapter.folder):
                check_adapter(name, adapter)
        config = _read_config(called, place, trust_remote_code)
        words = None
        if needs_tokenizer or tokenizer is not None or resolved.tokenizer.may_hold_tokenizer:
            words = _read_tokenizer(name, resolved.tokenizer, trust_remote_code)
        wanted: Any = given or (torch.float32 if place.is_gguf else "auto")
        divided = divided_class(config, place, divide) if divide and adapter is None else None
        model = _read_weights(called, place, config, wanted, trust_remote_code, download, divided)
        if place.is_gguf:
            _forget_gguf(model)
        if resolved.tokenizer.is_gguf:
            _take_eos_of_gguf(words, config)
        if adapter is not None:
            with reading(called, WEIGHTS, adapter.folder):
                model = merge_adapter(name, model, adapter, place.location)
        check_weights(name, model)
        if divide is not None and not distributed.is_sharded(model):
            logger.warning("note: %s: each process has read the whole model", called)
            divide(model)
        if words is not None:
            with contextlib.suppress(NotImplementedError):  # of a model with code of its own
                rows = model.get_input_embeddings().weight.shape[0]
                converted = resolved.tokenizer.is_gguf
                fit_vocabulary(tokenizer or name, words, rows, converted=converted)
        model.to(device or default_device())
    return model.eval(), words


def _read_config(name: str, place: Place, trust_remote_code: bool) -> Any:
    """The configuration, of a causal language model whose weights are not quantised."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    with reading(name, CONFIG, place.folder):
        config = AutoConfig.from_pretrained(
            place.location, trust_remote_code=trust_remote_code, **place.options
        )
    if not place.is_gguf:
        check_config(name, config)
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not own_code:
        raise InputError(
            f"{name}: {config.model_type} is not a causal language model, or not one that this "
            "version of transformers knows"
        )
    return config


def _read_tokenizer(name: str, place: Place, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    with reading(name, TOKENIZER, place.folder):
        tokenizer = AutoTokenizer.from_pretrained(
            place.location, trust_remote_code=trust_remote_code, **place.options
        )
    check_has_vocabulary(name, tokenizer)
    return tokenizer


def _read_weights(
    name: str,
    place: Place,
    config: Any,
    dtype: Any,
    trust_remote_code: bool,
    download: type,
    divided: Any = None,
) -> Any:
    """The model with its weights; ``divided``: the class of ``parts`` that makes it."""
    from transformers import AutoModelForCausalLM

    read: Any = (divided or AutoModelForCausalLM).from_pretrained
    with reading(name, WEIGHTS, place.folder):
        model, report = read(
            place.location,
            config=config,  # a GGUF file is not read a second time for it: that takes seconds
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # check_report refuses them, with their shapes
            tqdm_class=download,
            **place.options,
        )
        if place.folder is not None:
            check_stored(name, model, place.folder)
    if divided is not None and distributed.is_sharded(model) and was_converted(model):
        return _read_weights(name, place, config, dtype, trust_remote_code, download)
    note = check_report(name, model, report)
    if note is not None:
        logger.warning("note: %s", note)
    return model


def default_device() -> str:
    """The GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_tokenizer(
    name: str,
    *,
    trust_remote_code: bool = False,
    revision: str | None = None,
    tokenizer: str | None = None,
) -> Any:
    """The tokenizer of a model named as for :func:`load_model`, without its weights.

    Raises:
        InputError: nothing there, or no tokenizer.
    """
    place = resolve(Source(name, revision, tokenizer)).tokenizer
    return _read_tokenizer(name, place, trust_remote_code)


def load_skeleton(
    name: str,
    *,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> Any:
    """A model named as for :func:`load_model` without its weights, on fake tensors.

    Passes run on fake tensors, which have shapes and dtypes but neither values nor memory. Only the
    configuration is read.

    Raises:
        InputError: nothing there, not a causal language model, or quantised weights.
    """
    from transformers import AutoModelForCausalLM

    wanted = _dtype_of(dtype)
    place = resolve(Source(name, revision)).weights
    config = _read_config(name, place, trust_remote_code)
    wanted = wanted or (not place.is_gguf and config.dtype) or torch.float32
    with reading(name, CONFIG, place.folder), FakeTensorMode(allow_non_fake_inputs=True):
        model = AutoModelForCausalLM.from_config(
            config, dtype=wanted, trust_remote_code=trust_remote_code
        )
    return model.eval()


def provenance(source: Source) -> dict[str, Any]:
    """Where a model came from, for a manifest that holds its name and settings already."""
    return resolve(source).provenance


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Within the ``with`` a model is in evaluation mode, no parameter requires gradients, and
    outputs have names. All three are as before on leaving.

    Raises:
        InputError: weights that were made in ``torch.inference_mode``, or a ``torch.autocast``
            around it, which rounds every product.
    """
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise InputError(
            f"{type(model).__name__}: its weights were made within torch.inference_mode, where "
            "nothing can be differentiated: load the model outside of it"
        )
    for kind in {parameter.device.type for parameter in model.parameters()}:
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            raise InputError(
                f"torch.autocast is on for {kind}: its rounding changes every number; leave the "
                "with-block, and load the model in the dtype to be used"
            )
    modes = {module: module.training for module in model.modules()}
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    configs = [vars(module)["config"] for module in modes if "config" in vars(module)]
    tuples = {id(c): c for c in configs if getattr(c, "return_dict", None) is False}.values()
    try:
        for config in tuples:
            config.return_dict = True
        model.eval()
        model.requires_grad_(False)
        with fresh_frequencies(model):
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        for config in tuples:
            config.return_dict = False


def save_model(model: Any, tokenizer: Any, folder: Path, source: Source | None = None) -> None:
    """Write a folder of safetensors that ``from_pretrained`` loads.

    Args:
        tokenizer: None where the model has none.
        source: where the model was loaded from. Its further files (processor, chat template, code,
            licence) are copied, byte for byte.

    Raises:
        InputError: ``source`` holds more than the language model (see :func:`check_writable`), or
            ``folder`` cannot be written; a new folder is removed then.
    """
    if source is not None:
        check_writable(model, source)
    resolved = resolve(source) if source is not None else None
    with making(folder), writing(folder):
        with quiet():
            model.save_pretrained(folder, safe_serialization=True)
        mode = (folder / "config.json").stat().st_mode
        for path in folder.glob("*.safetensors"):  # the library may allow only the owner to read
            path.chmod(mode)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if resolved is not None:
            copy_companions(resolved, folder)
    left = other_weights(resolved, folder) if resolved is not None else []
    if source is not None and left:
        logger.warning(
            "note: %s: not copied, since its weights are those before the edit: %s",
            source.name,
            listed(left),
        )


def check_writable(model: Any, source: Source) -> None:
    """Raises InputError where ``model`` is only the language model of what ``source`` holds.

    It is that where a checkpoint of several modalities was loaded. The checkpoint's own loader
    could not load what would be written.
    """
    folder = resolve(source).weights.folder
    if folder is None:
        return
    from transformers import PreTrainedConfig

    whole, _ = PreTrainedConfig.get_config_dict(folder)
    kind = whole.get("model_type")
    if kind is not None and kind != model.config.model_type:
        raise InputError(
            f"{source.name}: a model of type {kind}, of which the language model alone "
            f"({model.config.model_type}) is loaded, so that the edited model cannot be written "
            "whole; take the update without it (kfade unlearn without --export-model), or give "
            "the language model in a folder of its own"
        )


def _dtype_of(dtype: str | None) -> torch.dtype | None:
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"--dtype {dtype}: give one of {', '.join(DTYPES)}")
    return DTYPES[dtype] if dtype else None


def _take_eos_of_gguf(tokenizer: Any, config: Any) -> None:
    """Set the EOS that a GGUF file names: transformers up to 5.17 takes the BOS for it."""
    number = config.eos_token_id
    if isinstance(number, int) and tokenizer.eos_token_id == tokenizer.bos_token_id != number:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(number)


def _forget_gguf(model: Any) -> None:
    """Drop the marks of quantised weights, which are dequantised now: they would forbid saving."""
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer = None
    model.is_quantized = False
