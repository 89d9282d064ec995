"""Where a model's files lie: hub id, local folder, GGUF file, or adapter folder with its base."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kfade.errors import InputError
from kfade.models.faults import CONFIG, TOKENIZER_FILES, file_fault, has_tokenizer, reading
from kfade.runtime.files import remove

ADAPTER_CONFIG = "adapter_config.json"
_OWN_WEIGHTS = ("model*.safetensors*", "pytorch_model*.bin*")  # those that loaders read
_ANY_WEIGHTS = (
    *("*.safetensors*", "*.bin*", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx*"),
    *("*.ckpt*", "*.npz", "*.ot"),
)
# Weights, and what belongs to the hub, git or peft, or is half-written.
_NOT_COPIED = (*_ANY_WEIGHTS, "*.part", "*.writing", "adapter_*", ".*")


@dataclass(frozen=True)
class Source:
    """A model, as the user names it."""

    name: str
    """Hub id, local folder, GGUF file, or the folder or hub id of a LoRA adapter."""
    revision: str | None = None
    """Branch, tag or commit of the hub."""
    tokenizer: str | None = None
    """Hub id or folder of the tokenizer, if it is not with the model."""


@dataclass(frozen=True)
class Place:
    """A place of files, in the arguments of transformers' loaders."""

    location: str
    """Folder or hub id."""
    options: dict[str, Any] = field(default_factory=dict)
    """``revision``, ``gguf_file``."""

    @property
    def is_gguf(self) -> bool:
        """Whether it is a GGUF file."""
        return "gguf_file" in self.options

    @property
    def may_hold_tokenizer(self) -> bool:
        """Whether a tokenizer may lie there; of the hub and GGUF files, loading it will tell."""
        folder = Path(self.location)
        return self.is_gguf or not folder.is_dir() or has_tokenizer(folder)

    @property
    def folder(self) -> Path | None:
        """The folder of the files on this machine, such as the hub's cached snapshot."""
        if self.is_gguf:
            return None
        if Path(self.location).is_dir():
            return Path(self.location)
        return _snapshot(self.location, self.options.get("revision"))

    @property
    def commit(self) -> str | None:
        """The hub's commit that lies in the cache; None of local files."""
        folder = self.folder
        return None if folder is None or Path(self.location).is_dir() else folder.name


@dataclass(frozen=True)
class Resolved:
    """Where the parts of a model lie."""

    weights: Place
    tokenizer: Place
    adapter: Place | None = None
    """The LoRA adapter that is to be merged into the weights."""

    @property
    def provenance(self) -> dict[str, Any]:
        """For a manifest: the commits of the hub, and an adapter's base."""
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
    base = None if own.is_gguf else _base_of_adapter(source, own)
    adapter = own if base is not None else None
    weights = base or own
    if source.revision is not None and all(Path(p.location).exists() for p in (weights, own)):
        raise InputError(
            f"--revision {source.revision}: {source.name} is on this machine; revisions are "
            "of models of the hub"
        )
    tokenizer = weights
    if source.tokenizer is not None:
        is_folder = Path(source.tokenizer).is_dir()  # which need not hold a model
        tokenizer = Place(source.tokenizer) if is_folder else _place(source.tokenizer, None)
    elif own.folder is not None and has_tokenizer(own.folder):
        tokenizer = own
    return Resolved(weights, tokenizer, adapter)


def _place(name: str, revision: str | None) -> Place:
    """The place that a name means.

    Raises:
        InputError: a path with no model there.
    """
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
    if any(next(folder.glob(pattern), None) for pattern in _OWN_WEIGHTS):
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
    if Path(own.location).is_dir():  # the option --revision can only be meant for the base
        revision = source.revision or revision
    if not Path(name).exists() and (folder / name).is_dir():
        name = str(folder / name)
    try:
        base = _place(name, None if Path(name).exists() else revision)
    except InputError as error:
        raise InputError(
            f"{source.name}: an adapter, of which the base cannot be found ({error}); correct "
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
    """Copy into ``folder``, which holds an edited model, the further files of its original.

    These are processors, chat templates, code, licences, a generation configuration, and the files
    of the tokenizer, byte for byte. Weights, their index and the configuration are not copied. A
    GGUF file has no further files.
    """
    own, tokenizer = resolved.weights.folder, resolved.tokenizer.folder
    elsewhere = resolved.tokenizer != resolved.weights
    if own is not None:
        if not elsewhere and has_tokenizer(own):
            for path in [path for path in folder.iterdir() if _matches(path, TOKENIZER_FILES)]:
                remove(path)
        for path in own.iterdir():
            skipped = _matches(path, _NOT_COPIED) or path.name == "config.json"
            if not skipped and not (elsewhere and _matches(path, TOKENIZER_FILES)):
                _copy(path, folder / path.name)
    if elsewhere and tokenizer is not None:
        for path in tokenizer.iterdir():
            if _matches(path, TOKENIZER_FILES) and not (folder / path.name).exists():
                _copy(path, folder / path.name)


def other_weights(resolved: Resolved, folder: Path) -> list[str]:
    """Weights beside the model's in other formats or folders, which :func:`copy_companions` leaves
    out: they are not edited. Those in ``folder``, if it lies within the model's, do not count."""
    own = resolved.weights.folder
    if own is None:
        return []
    found = []
    for path in sorted(own.rglob("*")):
        inner = path.relative_to(own)
        hidden = any(part.startswith(".") for part in inner.parts)
        edited = inner.parent == Path() and _matches(inner, (*_OWN_WEIGHTS, "adapter_*"))
        new = path.resolve().is_relative_to(folder.resolve())
        if path.is_file() and _matches(inner, _ANY_WEIGHTS) and not (hidden or edited or new):
            found.append(str(inner))
    return found


def _matches(path: Path, patterns: tuple[str, ...]) -> bool:
    return any(path.match(pattern) for pattern in patterns)


def _copy(source: Path, target: Path) -> None:
    """Copy a file, or a folder without its weights; links are replaced by what they point to."""
    if source.is_dir():
        if target.resolve().is_relative_to(source.resolve()):  # a copy into itself
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
