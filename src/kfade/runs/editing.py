"""Apply, revert and merge updates, and export one as a LoRA adapter."""

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
from kfade.models.load import check_writable, default_device, load_skeleton, save_model
from kfade.models.sources import Source, resolve
from kfade.models.weights import digest_names
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
    """The update to export as an adapter, and the rank."""

    update: Annotated[Path, o.argument("update")]
    """Folder of a kfade run, or an update file."""
    rank: int = field(kw_only=True)
    """Rank of the adapter of each weight."""
    out: Path | None = field(default=None, kw_only=True)
    """Folder to write. Unset: lora-RANK in the folder of the update."""
    model: str | None = field(default=None, kw_only=True)
    """Hub id or folder of the model. Unset: the one recorded in UPDATE."""
    revision: str | None = field(default=None, kw_only=True)
    """Branch, tag or commit of the model on the hub. Unset: the one recorded in UPDATE."""
    trust_remote_code: Annotated[bool, o.FLAG] = field(default=False, kw_only=True)
    """Run Python code that comes with the model."""
    device: str | None = field(default=None, kw_only=True)
    """PyTorch device for the decompositions: cpu, cuda or cuda:1. Unset: the GPU if there is
    one."""


def apply(model: ModelConfig, update: Path, out: Path) -> dict[str, Any]:
    """Write the model with the update added, as a folder that ``from_pretrained`` loads.

    Returns: among others ``norm``, ‖ΔW‖ over all weights, and ``lost_in_dtype``, the fraction of
    the update that is lost to rounding.

    Raises:
        InputError: the model or the update does not exist, they do not match, or ``out`` exists.
    """
    return _edit(model, update, out, sign=1)


def revert(model: ModelConfig, update: Path, out: Path) -> dict[str, Any]:
    """Write the model with the update subtracted: undoes :func:`apply`, up to one rounding.

    Raises:
        InputError: as :func:`apply`; or the update was computed on these weights, so that they do
            not contain it.
    """
    return _edit(model, update, out, sign=-1)


def _edit(config: ModelConfig, path: Path, out: Path, *, sign: int) -> dict[str, Any]:
    """Write the model with ``sign`` times the update added."""
    update, source = Update.load(path), source_of(config)
    check_free(out)
    part = beside(out, ".writing")  # not .part, which may hold an interrupted run
    with writing(out):
        remove(part)  # of a run that was killed
    with making(part):
        with stage("load"):
            # Adding ΔW to weights needs no tokenizer.
            model, tokenizer = open_model(config, needs_tokenizer=False)
        check_writable(model, source)
        base, contained = update.compare_base(model), update.is_in(model)
        if sign < 0 and contained is False:
            raise InputError(
                f"{source.name}: has the weights that {path} was computed on, so it does not "
                "contain the update; give the model that the update was added to"
            )
        change = update if sign > 0 else -update
        lost = change.lost_fraction(model)
        change.apply(model)
        save_model(model, tokenizer, part, source)
        with writing(out):
            part.replace(out)
    notes = []
    if sign > 0 and contained:
        notes = [f"note: {source.name} contained this update already; it has been added again"]
    elif sign > 0:
        notes = notes_on_base(update, base, "applied", source.revision, source.tokenizer)
    elif contained is None:
        notes = [
            f"note: no record shows that {source.name} contains this update; it was subtracted"
            " anyway"
        ]
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

    Updates of different models, or of one model at different times, are added too, with a note.

    Raises:
        InputError: there are fewer than two updates, or no model has the weights of all.
    """
    if len(updates) < 2:
        given = f"{updates[0]}: only one update" if updates else "no update"
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
    """Notes about differences between the base models of the updates.

    Raises:
        InputError: two updates change a weight in different shapes, or belong to different
            architectures and change no weight in common.
    """
    notes = []
    for (path, one), (other_path, other) in combinations(zip(paths, updates, strict=True), 2):
        for name in one.deltas.keys() & other.deltas.keys():
            shapes = [tuple(update.deltas[name].shape) for update in (one, other)]
            if shapes[0] != shapes[1]:
                raise InputError(
                    f"{other_path} changes {name} of shape {shapes[1]}, {path} of {shapes[0]}: "
                    "they belong to different models; merge updates of one model"
                )
        kinds = [update.provenance.get("architecture") for update in (one, other)]
        disjoint = one.deltas.keys().isdisjoint(other.deltas.keys())
        if disjoint and None not in kinds and kinds[0] != kinds[1]:
            raise InputError(
                f"{other_path} was computed on a {kinds[1]}, {path} on a {kinds[0]}, and they "
                "change no weight in common: no model has the weights of both"
            )
        models = [update.provenance.get("model") for update in (one, other)]
        bases = [part.provenance for part in (one, other)]
        first, *rounded = digest_names("weights")
        same_base = bases[0].get(first) == bases[1].get(first) or any(
            digest in bases[0] and bases[0][digest] == bases[1].get(digest) for digest in rounded
        )
        if one.deltas.keys() == other.deltas.keys() and not same_base:
            notes.append(
                f"{other_path} was computed on other weights than {path}; their sum is exact "
                "if one was computed on the result of the other, else correct to first order"
            )
        elif models[0] != models[1]:
            notes.append(f"{path} was computed on {models[0]}, {other_path} on {models[1]}")
    return notes


def _common(updates: Sequence[Update]) -> dict[str, Any]:
    """Provenance of a sum: that of all parts, and the entries about the base that are equal."""
    parts = [update.provenance for update in updates]
    common: dict[str, Any] = {"merged": parts}
    for fact in ("model", "architecture"):
        if all(part.get(fact) == parts[0].get(fact) for part in parts):
            common[fact] = parts[0].get(fact)
    same_weights = all(update.deltas.keys() == updates[0].deltas.keys() for update in updates)
    own = digest_names("weights") if same_weights else []  # else no digest covers the sum's weights
    for digest in [*own, *digest_names("model")]:
        if len({part.get(digest) for part in parts}) == 1 and digest in parts[0]:
            common[digest] = parts[0][digest]
    return common


def export_lora(request: LoraRequest) -> dict[str, Any]:
    """Write the LoRA adapter that is nearest to an update, in the format of the package peft.

    Returns: among others ``relative_error``, ‖ΔW − BA‖ / ‖ΔW‖ over all weights, and
    ``relative_errors`` by weight.

    Raises:
        InputError: the update or the model does not exist, or peft cannot add an adapter to it.
    """
    path, rank = request.update, request.rank
    update = Update.load(path)
    out = request.out or (path if path.is_dir() else path.parent) / f"lora-{rank}"
    name = request.model or update.provenance.get("model")
    if not name:
        raise InputError(f"{path}: the name of its model is not recorded; give --model")
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
            f"note: the update was computed on the adapter {update.provenance['model']}; the "
            "new one contains only the update, for a model with that adapter merged"
        )
    return {"out": str(out), **metrics}


def _refuse_no_base(source: Source) -> None:
    """Raises InputError for a model to which peft cannot add an adapter."""
    place = resolve(source)
    what = "an adapter itself" if place.adapter is not None else "a GGUF file"
    if place.adapter is not None or "gguf_file" in place.weights.options:
        raise InputError(
            f"{source.name}: is {what}, to which peft cannot add an adapter; write the edited "
            "model with kfade apply, or save the model as a folder (an adapter after peft's "
            "merge_and_unload) and give that folder as --model"
        )


def _norm(update: Update) -> float:
    """‖ΔW‖ over all weights."""
    return sum(torch.linalg.vector_norm(d).item() ** 2 for d in update.deltas.values()) ** 0.5
