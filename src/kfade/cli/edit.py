"""What is done with updates: ``kfade apply`` and ``revert``, ``merge``, and ``export-lora``."""

from __future__ import annotations

import json as json_text
from collections.abc import Sequence
from functools import reduce
from itertools import combinations
from operator import add
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from kfade.cli import options as o
from kfade.cli.session import console, session, show
from kfade.errors import InputError
from kfade.export.lora import to_lora
from kfade.method.update import OTHER, Update
from kfade.models.layers import digest_names
from kfade.models.load import check_writable, load_model, load_skeleton, save_model
from kfade.models.sources import Source, resolve
from kfade.runs.session import notes_on_base
from kfade.runtime.files import making, remove, write_text, writing
from kfade.runtime.provenance import git_sha, versions
from kfade.runtime.run_dir import RunDir, beside, check_free
from kfade.runtime.stages import stage

UpdatePath = Annotated[Path, typer.Argument(help="Folder of a kfade unlearn run, or its file.")]

UpdatePaths = Annotated[
    list[Path], typer.Argument(help="Folders of kfade runs, or their update files; two or more.")
]
Rank = Annotated[int, typer.Option("--rank", help="Rank of each weight's adapter.")]
BaseModel = Annotated[
    str | None,
    typer.Option("--model", help="Where the model lies. [as UPDATE says]", show_default=False),
]
LoraOut = Annotated[
    Path | None,
    typer.Option(
        "--out", help="Folder to write. [lora-RANK in the update's folder]", show_default=False
    ),
]


def apply(
    model: o.Model,
    update: UpdatePath,
    out: o.Out,
    dtype: o.Dtype = None,
    device: o.Device = None,
    trust_remote_code: o.TrustRemoteCode = None,
    revision: o.Revision = None,
    tokenizer: o.Tokenizer = None,
    json: o.Json = False,
) -> None:
    """Write MODEL with UPDATE added, as a folder that `from_pretrained` loads.

    MODEL may be the one that the update was computed on or a fine-tuned descendant of it; a model
    of other shapes is refused.
    """
    where = {"dtype": dtype, "device": device, "trust_remote_code": bool(trust_remote_code)}
    _edit(Source(model, revision, tokenizer), update, out, where, json, sign=1)


def revert(
    model: o.Model,
    update: UpdatePath,
    out: o.Out,
    dtype: o.Dtype = None,
    device: o.Device = None,
    trust_remote_code: o.TrustRemoteCode = None,
    revision: o.Revision = None,
    tokenizer: o.Tokenizer = None,
    json: o.Json = False,
) -> None:
    """Write MODEL with UPDATE taken away: undoes `kfade apply`, up to one rounding."""
    where = {"dtype": dtype, "device": device, "trust_remote_code": bool(trust_remote_code)}
    _edit(Source(model, revision, tokenizer), update, out, where, json, sign=-1)


def _edit(
    source: Source, path: Path, out: Path, where: dict[str, Any], as_json: bool, *, sign: int
) -> None:
    update = Update.load(path)
    check_free(out)
    part = beside(out, ".writing")  # not .part: an interrupted run may lie there
    with writing(out):
        remove(part)  # of a run that was killed
    with session(), making(part):
        with stage("load"):
            model, tokenizer = load_model(
                source.name,
                revision=source.revision,
                tokenizer=source.tokenizer,
                needs_tokenizer=False,  # to add ΔW to weights takes none
                **where,
            )
        check_writable(model, source)
        base = update.compare_base(model)
        there = update.is_in(model)
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
        console.print(note)
    result = {
        "out": str(out),
        "weights": len(update.deltas),
        "norm": _norm(update),
        "lost_in_dtype": lost,
        "base_weights": base != OTHER,
        "base": base,
    }
    verb = "added to" if sign > 0 else "taken from"
    lines = [
        f"update of {len(update.deltas)} weights {verb} {source.name}, written to {out}",
        f"{100 * lost:.2g} % of it is lost to rounding in this dtype",
    ]
    show(result, as_json, lines)


def merge(updates: UpdatePaths, out: o.Out, json: o.Json = False) -> None:
    """Write the sum of several updates as one: `kfade apply` then makes all changes at once.

    Updates of different models, or of one model at different times, are added all the same, and it
    is said.
    """
    if len(updates) < 2:
        raise InputError(f"{updates[0]}: one update only; give two or more to add up")
    with session() as clock, RunDir(out, {"updates": [str(path) for path in updates]}) as folder:
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
        console.print(f"note: {note}")
    lines = [f"sum of {len(updates)} updates, {len(merged.deltas)} weights, written to {out}"]
    show({"out": str(out), **metrics, "notes": notes}, json, lines)


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


def export_lora(
    update: UpdatePath,
    rank: Rank,
    out: LoraOut = None,
    model: BaseModel = None,
    device: o.Device = None,
    trust_remote_code: o.TrustRemoteCode = None,
    revision: o.Revision = None,
    json: o.Json = False,
) -> None:
    """Write the LoRA adapter that is nearest to UPDATE, as the package peft loads it.

    Each weight's change is cut to its largest singular values; the relative error, ‖ΔW − BA‖ /
    ‖ΔW‖, is told in all and, in `metrics.json`, by weight. MODEL's weights are not needed.
    """
    loaded = Update.load(update)
    folder_of = update if update.is_dir() else update.parent
    out = out or folder_of / f"lora-{rank}"
    name = model or loaded.provenance.get("model")
    if not name:
        raise InputError(f"{update}: does not say of which model it is; give --model")
    with session() as clock, RunDir(out, {"update": str(update), "rank": rank}) as folder:
        with stage("load"):
            revision = revision or loaded.provenance.get("revision")
            _refuse_no_base(Source(name, revision))
            skeleton = load_skeleton(
                name, trust_remote_code=bool(trust_remote_code), revision=revision
            )
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        with stage("decompose"):
            lora = to_lora(loaded, skeleton, rank, base=name, device=device)
        lora.save(folder.part / "adapter_model.safetensors")
        config = json_text.dumps(lora.config, indent=2) + "\n"
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
            "update": str(update),
            "model": name,
            "versions": versions(),
            "git_sha": git_sha(),
        }
        folder.finish(manifest, metrics)
    if "adapter_base" in loaded.provenance:
        console.print(
            f"note: the update was computed on the adapter {loaded.provenance['model']}; this one "
            f"holds the update alone, for a model that has that adapter merged"
        )
    worst = max(lora.errors, key=lambda weight: lora.errors[weight])
    lines = [
        f"adapter of rank {rank} for {len(lora.errors)} weights written to {out}",
        f"{100 * lora.error:.3g} % of the update's norm is left out; of {worst} "
        f"{100 * lora.errors[worst]:.3g} %",
    ]
    show({"out": str(out), **metrics}, json, lines)


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
