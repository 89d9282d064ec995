"""What is done with updates: put into a model, taken out, added up, written as a LoRA adapter."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import combinations
from operator import add
from pathlib import Path
from typing import Annotated, Any

import torch

from kfade.errors import InputError
from kfade.export.lora import to_lora
from kfade.method.update import OTHER, Update
from kfade.models.layers import digest_names
from kfade.models.load import check_writable, default_device, load_skeleton, save_model
from kfade.models.sources import Source, resolve
from kfade.runs import options as o
from kfade.runs.config import ModelConfig
from kfade.runs.session import notes_on_base, open_model, source_of
from kfade.runtime import progress
from kfade.runtime.files import making, remove, write_text, writing
from kfade.runtime.provenance import git_sha, versions
from kfade.runtime.run_dir import RunDir, beside, check_free
from kfade.runtime.stages import Clock, stage, timing


@o.settings(o.RUN)
@dataclass(frozen=True)
class LoraRequest:
    """Which update is to become an adapter, and of which rank."""

    update: Annotated[Path, o.argument("update")]
    """Folder of a kfade run, or its update file."""
    rank: int = field(kw_only=True)
    """Rank of each weight's adapter."""
    out: Path | None = field(default=None, kw_only=True)
    """Folder to write. Unset: lora-RANK in the update's folder."""
    model: str | None = field(default=None, kw_only=True)
    """Where the model lies. Unset: as UPDATE says."""
    revision: str | None = field(default=None, kw_only=True)
    """Branch, tag or commit of the model on the hub. Unset: as UPDATE says."""
    trust_remote_code: Annotated[bool, o.FLAG] = field(default=False, kw_only=True)
    """Let code that comes with a hub model run."""
    device: str | None = field(default=None, kw_only=True)
    """Where the changes are decomposed. Unset: the GPU if there is one."""


def apply(model: ModelConfig, update: Path, out: Path) -> dict[str, Any]:
    """Write the model with the update added, as a folder that ``from_pretrained`` loads.

    Returns: among others ``norm``, ‖ΔW‖ over all weights, and ``lost_in_dtype``, the share of it
    that rounding takes away.

    Raises:
        InputError: no such model or update, one that does not fit the other, or ``out`` is taken.
    """
    return _edit(model, update, out, sign=1)


def revert(model: ModelConfig, update: Path, out: Path) -> dict[str, Any]:
    """Write the model with the update taken away: undoes :func:`apply`, up to one rounding.

    Raises:
        InputError: as :func:`apply`; or the update was computed on just these weights, so that it
            is not in them.
    """
    return _edit(model, update, out, sign=-1)


def _edit(config: ModelConfig, path: Path, out: Path, *, sign: int) -> dict[str, Any]:
    update, source = Update.load(path), source_of(config)
    check_free(out)
    part = beside(out, ".writing")  # not .part: an interrupted run may lie there
    with writing(out):
        remove(part)  # of a run that was killed
    with making(part):
        with stage("load"):
            # To add ΔW to weights takes no tokenizer.
            model, tokenizer = open_model(config, needs_tokenizer=False)
        check_writable(model, source)
        base, there = update.compare_base(model), update.is_in(model)
        if sign < 0 and there is False:
            raise InputError(
                f"{source.name}: has the weights that {path} was computed on, so that there is no "
                "such update to take away; give the model that it was added to"
            )
        change = update if sign > 0 else -update
        lost = change.lost_fraction(model)
        change.apply(model)
        save_model(model, tokenizer, part, source)
        with writing(out):
            part.replace(out)
    notes = []
    if sign > 0 and there:
        notes = [f"note: {source.name} held this update already; it has been added once more"]
    elif sign > 0:
        notes = notes_on_base(update, base, "applied", source.revision, source.tokenizer)
    elif there is None:
        notes = [f"note: nothing shows that {source.name} held this update; taken away anyway"]
    for note in notes:
        progress.say(note)
    return {
        "out": str(out),
        "weights": len(update.deltas),
        "norm": _norm(update),
        "lost_in_dtype": lost,
        "base_weights": base != OTHER,
        "base": base,
    }


def merge(updates: Sequence[Path], out: Path) -> dict[str, Any]:
    """Write the sum of several updates as one.

    Updates of different models, or of one model at different times, are added all the same, and it
    is said.

    Raises:
        InputError: fewer than two updates, or no model holds the weights of all.
    """
    if len(updates) < 2:
        given = f"{updates[0]}: one update only" if updates else "no update"
        raise InputError(f"{given}; give two or more to add up")
    clock = Clock()
    with timing(clock), RunDir(out, {"updates": [str(path) for path in updates]}) as folder:
        with stage("load"):
            loaded = [Update.load(path) for path in updates]
        notes = _compare(updates, loaded)
        merged = Update(reduce(add, loaded).deltas, _common(loaded))
        merged.save(folder.part / "update.safetensors")
        metrics: dict[str, Any] = {
            "weights": len(merged.deltas),
            "norm": _norm(merged),
            "norms": [_norm(update) for update in loaded],
            "seconds": {"total": clock.total},
        }
        manifest = {
            "kind": "merge",
            "updates": [str(path) for path in updates],
            "notes": notes,
            **merged.provenance,
            "versions": versions(),
            "git_sha": git_sha(),
        }
        folder.finish(manifest, metrics)
    for note in notes:
        progress.say(f"note: {note}")
    return {"out": str(out), **metrics, "notes": notes}


def _compare(paths: Sequence[Path], updates: Sequence[Update]) -> list[str]:
    """What is to be said of the updates' bases.

    Raises:
        InputError: they change one weight in different shapes, or are of architectures that have
            none of the changed weights in common.
    """
    notes = []
    for (path, one), (other_path, other) in combinations(zip(paths, updates, strict=True), 2):
        for name in one.deltas.keys() & other.deltas.keys():
            shapes = [tuple(update.deltas[name].shape) for update in (one, other)]
            if shapes[0] != shapes[1]:
                raise InputError(
                    f"{other_path} changes {name} of shape {shapes[1]}, {path} of {shapes[0]}: "
                    "they are of different models"
                )
        made = [update.provenance.get("architecture") for update in (one, other)]
        apart = one.deltas.keys().isdisjoint(other.deltas.keys())
        if apart and None not in made and made[0] != made[1]:
            raise InputError(
                f"{other_path} was computed on a {made[1]}, {path} on a {made[0]}, and they change "
                "no weight in common: no model holds the weights of both"
            )
        models = [update.provenance.get("model") for update in (one, other)]
        bases = [part.provenance for part in (one, other)]
        first, *rounded = digest_names("weights")
        same_base = bases[0].get(first) == bases[1].get(first) or any(
            digest in bases[0] and bases[0][digest] == bases[1].get(digest) for digest in rounded
        )
        if one.deltas.keys() == other.deltas.keys() and not same_base:
            notes.append(
                f"{other_path} was computed on other weights than {path}; their sum is exact if "
                "those were the other's result, and to first order otherwise"
            )
        elif models[0] != models[1]:
            notes.append(f"{path} was computed on {models[0]}, {other_path} on {models[1]}")
    return notes


def _common(updates: Sequence[Update]) -> dict[str, Any]:
    """Provenance of a sum: that of all parts, and what they agree on about their base."""
    parts = [update.provenance for update in updates]
    common: dict[str, Any] = {"merged": parts}
    for fact in ("model", "architecture"):
        if all(part.get(fact) == parts[0].get(fact) for part in parts):
            common[fact] = parts[0].get(fact)
    same_weights = all(update.deltas.keys() == updates[0].deltas.keys() for update in updates)
    own = digest_names("weights") if same_weights else []  # else none is over the sum's weights
    for digest in [*own, *digest_names("model")]:
        if len({part.get(digest) for part in parts}) == 1 and digest in parts[0]:
            common[digest] = parts[0][digest]
    return common


def export_lora(request: LoraRequest) -> dict[str, Any]:
    """Write the LoRA adapter that is nearest to an update, as the package peft loads it.

    Returns: among others ``relative_error``, ‖ΔW − BA‖ / ‖ΔW‖ over all weights, and
    ``relative_errors`` by weight.

    Raises:
        InputError: no such update or model, or one that peft puts no adapter on.
    """
    path, rank = request.update, request.rank
    update = Update.load(path)
    out = request.out or (path if path.is_dir() else path.parent) / f"lora-{rank}"
    name = request.model or update.provenance.get("model")
    if not name:
        raise InputError(f"{path}: does not say of which model it is; give --model")
    clock = Clock()
    with timing(clock), RunDir(out, {"update": str(path), "rank": rank}) as folder:
        with stage("load"):
            revision = request.revision or update.provenance.get("revision")
            _refuse_no_base(Source(name, revision))
            skeleton = load_skeleton(
                name, trust_remote_code=request.trust_remote_code, revision=revision
            )
        device = request.device or default_device()
        with stage("decompose"):
            lora = to_lora(update, skeleton, rank, base=name, device=device)
        lora.save(folder.part / "adapter_model.safetensors")
        config = json.dumps(lora.config, indent=2) + "\n"
        write_text(folder.part / "adapter_config.json", config)
        metrics = {
            "rank": rank,
            "relative_error": lora.error,
            "relative_errors": lora.errors,
            "parameters": sum(tensor.numel() for tensor in lora.tensors.values()),
            "seconds": {"total": clock.total},
        }
        manifest = {
            "kind": "lora",
            "update": str(path),
            "model": name,
            "versions": versions(),
            "git_sha": git_sha(),
        }
        folder.finish(manifest, metrics)
    if "adapter_base" in update.provenance:
        progress.say(
            f"note: the update was computed on the adapter {update.provenance['model']}; this one "
            f"holds the update alone, for a model that has that adapter merged"
        )
    return {"out": str(out), **metrics}


def _refuse_no_base(source: Source) -> None:
    """Raises InputError for a model that peft cannot put an adapter on."""
    place = resolve(source)
    what = "an adapter itself" if place.adapter is not None else "a GGUF file"
    if place.adapter is not None or "gguf_file" in place.weights.options:
        raise InputError(
            f"{source.name}: is {what}, on which peft puts no adapter; write the whole edited "
            "model with kfade apply, or save the model as a folder of its own (of an adapter after "
            "peft's merge_and_unload) and name that folder as --model"
        )


def _norm(update: Update) -> float:
    """‖ΔW‖ over all weights."""
    return sum(torch.linalg.vector_norm(d).item() ** 2 for d in update.deltas.values()) ** 0.5
