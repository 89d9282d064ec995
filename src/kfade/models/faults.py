"""What can be wrong with a checkpoint, in one line: what, where, what to do.

transformers and the libraries below it fail in many ways, or load a model with random weights and
say so in a table. Here their errors become an :class:`InputError`. It names the file that is at
fault where one is found, and quotes the library otherwise.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from kfade.errors import InputError
from kfade.runtime import distributed
from kfade.runtime.progress import no_bars

CONFIG, TOKENIZER, WEIGHTS = "configuration", "tokenizer", "weights"
POINTER = b"version https://git-lfs.github.com/spec/"
# What a tokenizer is made from; tokenizer_config.json alone holds no vocabulary.
VOCABULARIES = (
    *("tokenizer.json", "tokenizer.model*", "vocab*", "merges.txt", "*.tiktoken", "tekken.json"),
    *("spiece.model", "spm*.model", "*bpe.model", "tokenization*.py", "encoder.json"),
)
TOKENIZER_FILES = (*VOCABULARIES, "tokenizer*", "*token*.json", "chat_template*")
_PARTS = {
    CONFIG: ("config.json", "adapter_config.json"),
    TOKENIZER: TOKENIZER_FILES,
    WEIGHTS: ("*.safetensors", "*.bin", "*.index.json", "*.gguf"),
}
_SHOWN = 3  # tensors that a message names
# Tensors that old versions stored and that are not learnt.
_CONSTANTS = ("masked_bias", "inv_freq", "position_ids")
_FULL_PRECISION = ("F64", "F32", "F16", "BF16")
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@contextlib.contextmanager
def reading(name: str, part: str, folder: Path | None) -> Iterator[None]:
    """Turn what the libraries raise while they read ``part`` of a model into an InputError.

    Args:
        name: the model, as the user wrote it.
        part: ``CONFIG``, ``TOKENIZER`` or ``WEIGHTS``.
        folder: where its files lie, if they are on this machine.

    Raises:
        InputError: in place of any error but an interruption and a lack of memory.
    """
    try:
        with quiet():
            yield
    except (InputError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if "allocate memory" in str(error):  # how PyTorch's CPU allocator says it
            raise
        raise InputError(f"{name}: {_explain(error, name, part, folder)}") from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within the ``with`` transformers logs errors only and draws no progress bars."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with no_bars():
            yield
    finally:
        logging.set_verbosity(level)


def _explain(error: Exception, name: str, part: str, folder: Path | None) -> str:
    broken = broken_file(folder, _PARTS[part]) if folder is not None else _broken_gguf(Path(name))
    if broken is not None:
        return broken
    if "trust_remote_code" in str(error):
        return (
            "it comes with code of its own, which has to run to load it; read that code, and if "
            "you trust it, pass --trust-remote-code"
        )
    if part == TOKENIZER and folder is not None and not has_tokenizer(folder):
        return no_tokenizer()
    advice = ""
    if part == CONFIG and folder is None and not name.lower().endswith(".gguf"):
        advice = "; give a hub id, a folder that from_pretrained loads, or a GGUF file"
    what = "the model" if part == WEIGHTS else f"its {part}"
    return f"{what} could not be loaded ({words(error)}){advice}"


def words(error: Exception) -> str:
    """The first line of an error, with its type where the line alone would say little."""
    module, kind = type(error).__module__, type(error).__name__
    called = kind if module == "builtins" else f"{module}.{kind}"
    text = _COLOURS.sub("", str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return called
    first = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    known = isinstance(error, OSError | ValueError | ImportError)
    plain = known and not isinstance(error, json.JSONDecodeError | UnicodeError)
    return first if plain else f"{called}: {first}"


# --- files -----------------------------------------------------------------------------------


def broken_file(folder: Path, patterns: Collection[str]) -> str | None:
    """What is wrong with the first file of ``folder`` that is not whole, or None."""
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        try:
            fault = file_fault(path)
        except OSError as error:
            fault = f"cannot be read ({error.strerror})"
        if fault is not None:
            return f"{path.name} {fault}"
    return None


def file_fault(path: Path) -> str | None:
    """Why a file cannot be whole, as its beginning and its size tell; None if they do not."""
    if not path.is_file():
        return None
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(512)
    if start.startswith(POINTER):
        return (
            f"is a pointer of git-lfs ({size} bytes), not the file itself; fetch it with git lfs "
            "pull"
        )
    if not size:
        return "is empty; get a whole copy"
    if path.suffix == ".safetensors":
        return _safetensors_fault(path)
    if path.suffix.lower() == ".gguf" and not start.startswith(b"GGUF"):
        return "is not a GGUF file; get a whole copy"
    if path.suffix == ".json":
        return _json_fault(path)
    try:
        if path.suffix == ".jinja":
            path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        return f"is not text in UTF-8 ({error})"
    return None


def _broken_gguf(path: Path) -> str | None:
    """What is wrong with a GGUF file that the package gguf cannot read, or None.

    To read it takes seconds. That is done only where loading has failed.
    """
    if path.suffix.lower() != ".gguf" or not path.is_file():
        return None
    from gguf import GGUFReader

    try:
        GGUFReader(path)
    except Exception:  # whatever comes of reading beyond the end
        size = path.stat().st_size
        return f"{path.name} is cut off after {size} bytes, or damaged; get a whole copy"
    return None


def _safetensors_fault(path: Path) -> str | None:
    """What safetensors finds wrong when it compares a file's header with its size."""
    try:
        with safe_open(path, "pt"):
            return None
    except SafetensorError as error:
        return f"is not a whole safetensors file ({error}); get a whole copy"


def _json_fault(path: Path) -> str | None:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:  # UnicodeDecodeError is one too
        return f"is not valid JSON ({error})"
    if not isinstance(content, dict) and path.name.endswith("config.json"):
        return f"holds a {type(content).__name__}, not settings by name"
    return None


def has_tokenizer(folder: Path) -> bool:
    """Whether a file of the folder holds a vocabulary."""
    return any(next(folder.glob(pattern), None) is not None for pattern in VOCABULARIES)


def no_tokenizer() -> str:
    """The message for a model without a tokenizer."""
    return "it has no tokenizer; give another model's with --tokenizer (a hub id or a folder)"


# --- configuration ---------------------------------------------------------------------------


def check_config(name: str, config: Any) -> None:
    """Check what the configuration alone tells, before transformers asks for further packages.

    Raises:
        InputError: the weights are quantised, or the model has an encoder or attention to later
            tokens.
    """
    method = quantisation_of(config)
    if method is not None:
        raise InputError(
            f"{name}: its weights are quantised ({method}); load the full-precision model and "
            "quantise the edited one afterwards"
        )
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(
            f"{name}: {kind} has an encoder and a decoder; kfade needs a causal language model, "
            "which is a decoder alone"
        )
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    masked = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if masked and not (getattr(config, "is_decoder", False) or getattr(config, "causal", False)):
        raise InputError(
            f"{name}: {kind} reads text both ways, to fill in masked words; kfade needs a causal "
            "language model"
        )


def quantisation_of(config: Any) -> str | None:
    """The method by which the weights are quantised, as the configuration calls it, or None."""
    parts = (config, config.get_text_config())
    keys = ("quantization_config", "compression_config")
    settings = [getattr(part, key, None) for part in parts for key in keys]
    found = next((one for one in settings if one is not None), None)
    if found is None:
        return None
    values = found if isinstance(found, Mapping) else found.to_dict()
    method = values.get("quant_method")
    if method is not None:
        return str(getattr(method, "value", method))
    if values.get("load_in_4bit") or values.get("load_in_8bit"):
        return "bitsandbytes"
    return "by a method that its quantization_config does not name"


# --- weights ---------------------------------------------------------------------------------


def check_report(name: str, model: nn.Module, report: Mapping[str, Any]) -> str | None:
    """Check the tensors of a checkpoint against those of the model, by transformers' report.

    The report leaves out tied weights, computed buffers, and what a model class is known to do
    without. A tensor of a part that the model does not have (a value head, a vision tower) is not
    loaded. A tensor of a part that the model has, such as one more block or a bias, is refused: the
    configuration is another model's, and outputs would be wrong.

    Returns:
        A note on the tensors that were not loaded, if there are any.

    Raises:
        InputError: tensors are missing, have another shape, or have no place in the model.
    """
    missing = sorted(report["missing_keys"])
    unexpected = sorted(report["unexpected_keys"])
    shapes = sorted(report["mismatched_keys"])
    total = len(model.state_dict())
    if missing:
        raise InputError(f"{name}: {_missing(missing, unexpected, total)}")
    if shapes:
        key, found, wanted = shapes[0]
        raise InputError(
            f"{name}: the shapes of {len(shapes)} of {total} tensors in its weights are not those "
            f"of its configuration ({key} is {list(found)}, not {list(wanted)}); get both from "
            "one copy"
        )
    buffers = {key for key, _ in model.named_buffers()}
    unexpected = [k for k in unexpected if k not in buffers and not k.endswith(_CONSTANTS)]
    inner = [key for key in unexpected if _within(model, key)]
    if inner:
        raise InputError(
            f"{name}: the model of its configuration has no place for {len(inner)} of the tensors "
            f"in its weights ({listed(inner)}); get both from one copy"
        )
    if not unexpected:
        return None
    return (
        f"{name}: left out, since the language model has no place for it: {listed(unexpected)}; "
        "what is written from it lacks that too"
    )


def _missing(missing: list[str], unexpected: list[str], total: int) -> str:
    """The message for tensors that the checkpoint lacks, with the likely cause."""
    count = "one" if len(missing) == 1 else str(len(missing))
    verb = "is" if len(missing) == 1 else "are"
    lead = f"{count} of the model's {total} tensors {verb} not in its weights ({listed(missing)})"
    prefix = _common_prefix(missing, unexpected)
    if prefix is not None:
        return (
            f"{lead}: there the names begin with {prefix!r}, which a wrapper put before them; "
            "save the weights without it"
        )
    if unexpected:
        return f"{lead}; they hold {listed(unexpected)}, for which it has no place"
    return f"{lead}; get weights and configuration from one whole copy"


def _common_prefix(missing: list[str], unexpected: list[str]) -> str | None:
    """The prefix that most of the missing names have in the checkpoint, if there is one."""
    pairs = ((key, name) for key in unexpected for name in missing)
    for prefix in (key.removesuffix(name) for key, name in pairs if key.endswith(name)):
        if 2 * len({prefix + name for name in missing} & {*unexpected}) > len(missing):
            return prefix
    return None


def _within(model: nn.Module, key: str) -> bool:
    """Whether a tensor's module, or one around it, is a part of the model or of its base model."""
    modules = dict(model.named_modules())
    base = getattr(model, "base_model_prefix", "")
    for parent in (key, f"{base}.{key}"):  # a base model's own checkpoint has no prefix
        while "." in parent:
            parent = parent.rpartition(".")[0]
            if parent in modules:
                if parent != base:
                    return True
                break
    return False


def listed(keys: Collection[str]) -> str:
    """The first few of them, and how many more there are."""
    shown = ", ".join(list(keys)[:_SHOWN])
    return f"{shown} and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else shown


def check_weights(name: str, model: nn.Module) -> None:
    """Raises InputError where a weight, or the part of it in this process, is NaN or infinite."""
    for key, parameter in model.named_parameters():
        if not torch.isfinite(distributed.own_part(parameter)).all():
            raise InputError(f"{name}: NaN or Inf in {key}; get a whole copy")


def check_stored(name: str, model: nn.Module, folder: Path) -> None:
    """Raises InputError where a file holds a weight in 8 bits or fewer.

    transformers would turn the stored numbers, without their scale, into the model's dtype.
    """
    wanted = {key for key, _ in model.named_parameters()}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in wanted & set(file.keys()):
                kind = file.get_slice(key).get_dtype()
                if kind not in _FULL_PRECISION:
                    raise InputError(
                        f"{name}: {key} is stored as {kind} in {path.name}, so its weights are "
                        "quantised; load the full-precision model and quantise the edited one "
                        "afterwards"
                    )
