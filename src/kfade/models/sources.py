"""Where a model's files lie: hub id, local folder, GGUF file, or adapter folder with its base."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kfade.errors import InputError
from kfade.models.faults import CONFIG, VOCABULARIES, file_fault, has_tokenizer, reading
from kfade.runtime.files import remove

ADAPTER_CONFIG = "adapter_config.json"
_FULL_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
_OWN_WEIGHTS = ("model*.safetensors*", "pytorch_model*.bin*")  # what is written anew
_ANY_WEIGHTS = (
    *("*.safetensors*", "*.bin*", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx*"),
    *("*.ckpt*", "*.npz", "*.ot"),
)
# With them what belongs to hub, git or peft, or is half-written.
_NOT_COPIED = (*_ANY_WEIGHTS, "*.part", "*.writing", "adapter_*", ".*")
_TOKENIZER = (
    *VOCABULARIES,
    *("tokenizer*", "added_tokens.json", "special_tokens_map.json", "chat_template*"),
)


@dataclass(frozen=True)
class Source:
    """Which model, as the user says it."""

    name: str
    """Hub id, local folder, GGUF file, or the folder or hub id of a LoRA adapter."""
    revision: str | None = None
    """Branch, tag or commit of the hub."""
    tokenizer: str | None = None
    """Where the tokenizer is, if not with the model."""


@dataclass(frozen=True)
class Place:
    """What transformers' loaders call it."""

    location: str
    options: dict[str, Any] = field(default_factory=dict)
    """``revision``, ``gguf_file``."""

    @property
    def folder(self) -> Path | None:
        """Where the files lie on this machine: the folder, or the hub's cached snapshot."""
        if "gguf_file" in self.options:
            return None
        if Path(self.location).is_dir():
            return Path(self.location)
        return _snapshot(self.location, self.options.get("revision"))

    @property
    def commit(self) -> str | None:
        """The hub's commit that lies in the cache, where the model is the hub's."""
        folder = self.folder
        if folder is None or Path(self.location).is_dir():
            return None
        return folder.name


@dataclass(frozen=True)
class Resolved:
    """Where each part lies."""

    weights: Place
    tokenizer: Place
    adapter: Place | None = None
    """The LoRA adapter that is to be merged into the weights."""

    @property
    def provenance(self) -> dict[str, Any]:
        """What a manifest tells beside the name: commits of the hub, an adapter's base."""
        facts = {"commit": (self.adapter or self.weights).commit}
        if self.adapter is not None:
            facts["adapter_base"] = self.weights.location
            facts["adapter_base_commit"] = self.weights.commit
        return {key: value for key, value in facts.items() if value is not None}


def resolve(source: Source) -> Resolved:
    """Find the files, without reading weights.

    Raises:
        InputError: nothing there; a revision of something that is not on the hub; an adapter whose
            base is not to be found.
    """
    own = _place(source.name, source.revision)
    base, adapter = own, None
    if "gguf_file" not in own.options:
        base = _base_of_adapter(source, own) or own
        adapter = own if base is not own else None
    if source.revision is not None and Path(base.location).exists():
        if adapter is None or Path(adapter.location).exists():
            raise InputError(
                f"--revision {source.revision}: {source.name} is on this machine; revisions are "
                "of models of the hub"
            )
    if source.tokenizer is not None:
        if Path(source.tokenizer).is_dir():  # it need not hold a model
            return Resolved(base, Place(source.tokenizer), adapter)
        return Resolved(base, _place(source.tokenizer, None), adapter)
    folder = adapter.folder if adapter is not None else None
    own_tokenizer = folder is not None and has_tokenizer(folder)
    return Resolved(base, adapter if adapter is not None and own_tokenizer else base, adapter)


def _place(name: str, revision: str | None) -> Place:
    path = Path(name)
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise InputError(f"{name}: no such GGUF file")
        fault = file_fault(path)
        if fault is not None:
            raise InputError(f"{name}: {path.name} {fault}")
        return Place(str(path.parent), {"gguf_file": path.name})
    if path.is_file():
        raise InputError(
            f"{name}: is a file; give the folder that it lies in, a hub id, or a GGUF file"
        )
    if path.is_dir():
        if not any((path / file).is_file() for file in ("config.json", ADAPTER_CONFIG)):
            raise InputError(f"{name}: not a model folder, it has no config.json")
        return Place(name)
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise InputError(f"{name}: no such folder")
    return Place(name, {"revision": revision} if revision is not None else {})


def _base_of_adapter(source: Source, own: Place) -> Place | None:
    """The model that an adapter is for; None where ``own`` is not an adapter.

    Raises:
        InputError: an adapter beside whole weights, or one whose base cannot be told or found.
    """
    from transformers.utils.peft_utils import find_adapter_config_file

    with reading(source.name, CONFIG, own.folder):
        found = find_adapter_config_file(own.location, revision=own.options.get("revision"))
        if found is None:
            return None
        config = json.loads(Path(found).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"{ADAPTER_CONFIG} holds no settings by name")
    folder = Path(found).parent
    if any(next(folder.glob(pattern), None) for pattern in _FULL_WEIGHTS):
        raise InputError(
            f"{source.name}: holds an adapter ({ADAPTER_CONFIG}) and weights of a whole model; "
            "move one of them elsewhere, so that it is clear which is meant"
        )
    name = config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise InputError(
            f"{source.name}: an adapter whose {ADAPTER_CONFIG} does not name its base; put it "
            "there as base_model_name_or_path"
        )
    revision = config.get("revision")
    if Path(own.location).is_dir():  # the option can only mean the base's
        revision = source.revision or revision
    if not Path(name).exists() and (folder / name).is_dir():
        name = str(folder / name)
    try:
        base = _place(name, None if Path(name).exists() else revision)
    except InputError as error:
        raise InputError(
            f"{source.name}: an adapter, of which the base is not to be found ({error}); correct "
            f"base_model_name_or_path in its {ADAPTER_CONFIG}"
        ) from None
    if base.folder is not None and (base.folder / ADAPTER_CONFIG).is_file():
        raise InputError(
            f"{source.name}: an adapter on top of another, {name}; merge that one into its own "
            "base first"
        )
    return base


def _snapshot(name: str, revision: str | None) -> Path | None:
    """The folder of the hub's cache that holds the model's configuration, if there is one."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for file in ("config.json", ADAPTER_CONFIG, "tokenizer_config.json", "tokenizer.json"):
        try:
            found = try_to_load_from_cache(name, file, revision=revision)
        except HFValidationError:
            return None
        if isinstance(found, str):
            return Path(found).parent
    return None


def copy_companions(resolved: Resolved, folder: Path) -> None:
    """Put beside the model in ``folder`` what its own folder holds and no library writes.

    Byte for byte: processors, chat templates, code, licences, a generation configuration, and the
    tokenizer's files where the tokenizer is the model's own. Never weights, their index, or a
    model's configuration. A GGUF file has no folder of its own.
    """
    own, tokenizer = resolved.weights.folder, resolved.tokenizer.folder
    elsewhere = resolved.tokenizer != resolved.weights
    if own is not None and not elsewhere and has_tokenizer(own):
        for path in sorted(folder.iterdir()):
            if _matches(path, _TOKENIZER):
                remove(path)
    if own is not None:
        for path in sorted(own.iterdir()):
            skipped = _matches(path, _NOT_COPIED) or path.name == "config.json"
            if not skipped and not (elsewhere and _matches(path, _TOKENIZER)):
                _copy(path, folder / path.name)
    if elsewhere and tokenizer is not None:
        for path in sorted(tokenizer.iterdir()):
            if _matches(path, _TOKENIZER) and not (folder / path.name).exists():
                _copy(path, folder / path.name)


def other_weights(resolved: Resolved, folder: Path) -> list[str]:
    """Weights in further forms or folders beside the model's, which :func:`copy_companions` leaves
    out: they are those from before the edit. None of ``folder``, if it lies there."""
    own = resolved.weights.folder
    if own is None:
        return []
    within = folder.resolve()
    paths = [
        path.relative_to(own)
        for path in sorted(own.rglob("*"))
        if path.is_file() and not path.resolve().is_relative_to(within)
    ]
    return [
        str(path)
        for path in paths
        if _matches(path, _ANY_WEIGHTS)
        and not any(part.startswith(".") for part in path.parts)
        and not (path.parent == Path() and _matches(path, (*_OWN_WEIGHTS, "adapter_*")))
    ]


def _matches(path: Path, patterns: tuple[str, ...]) -> bool:
    return any(path.match(pattern) for pattern in patterns)


def _copy(source: Path, target: Path) -> None:
    """A file, or a folder without weights; what links point to, not links."""
    if source.is_dir():
        if target.resolve().is_relative_to(source.resolve()):  # written into the model's own folder
            return
        ignored = shutil.ignore_patterns(*_NOT_COPIED, "__pycache__")
        shutil.copytree(source, target, ignore=ignored, dirs_exist_ok=True)
        for path in sorted(target.rglob("*"), reverse=True):  # folders of nothing but weights
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        if not any(target.iterdir()):
            target.rmdir()
    elif source.is_file():
        shutil.copyfile(source, target)
