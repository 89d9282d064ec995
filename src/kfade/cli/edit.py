"""``kfade apply`` and ``kfade revert``: write a model with an update added or taken away."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import torch
import typer

from kfade.cli import options as o
from kfade.cli.session import console, session, show
from kfade.errors import InputError
from kfade.models import load_model, save_model
from kfade.run_dir import check_free
from kfade.stages import stage
from kfade.update import Update

UpdatePath = Annotated[Path, typer.Argument(help="Folder of a kfade unlearn run, or its file.")]


def apply(
    model: o.Model,
    update: UpdatePath,
    out: o.Out,
    dtype: o.Dtype = None,
    device: o.Device = None,
    trust_remote_code: o.TrustRemoteCode = None,
    json: o.Json = False,
) -> None:
    """Write MODEL with UPDATE added, as a folder that `from_pretrained` loads.

    MODEL may be the one that the update was computed on or a fine-tuned descendant of it; a model
    of other shapes is refused.
    """
    _edit(model, update, out, dtype, device, bool(trust_remote_code), json, sign=1)


def revert(
    model: o.Model,
    update: UpdatePath,
    out: o.Out,
    dtype: o.Dtype = None,
    device: o.Device = None,
    trust_remote_code: o.TrustRemoteCode = None,
    json: o.Json = False,
) -> None:
    """Write MODEL with UPDATE taken away: undoes `kfade apply`, up to one rounding."""
    _edit(model, update, out, dtype, device, bool(trust_remote_code), json, sign=-1)


def _edit(
    name: str,
    path: Path,
    out: Path,
    dtype: str | None,
    device: str | None,
    trust: bool,
    as_json: bool,
    *,
    sign: int,
) -> None:
    update = Update.load(path)
    part = out.with_name(out.name + ".writing")  # not .part: an interrupted run may lie there
    check_free(out)
    with session():
        with stage("load"):
            model, tokenizer = load_model(name, dtype=dtype, device=device, trust_remote_code=trust)
        is_base = update.fits_base(model)
        change = update if sign > 0 else -update
        lost = change.lost_fraction(model)
        change.apply(model)
        try:
            part.mkdir(parents=True, exist_ok=True)
            save_model(model, tokenizer, part)
            part.replace(out)
        except OSError as error:
            raise InputError(f"{out}: cannot be written ({error.strerror})") from None
        finally:
            shutil.rmtree(part, ignore_errors=True)
    if sign > 0 and not is_base:
        console.print(
            "note: these are not the weights that the update was computed on; applied as to a "
            "fine-tuned descendant"
        )
    size = sum(torch.linalg.vector_norm(d).item() ** 2 for d in update.deltas.values()) ** 0.5
    result = {
        "out": str(out),
        "weights": len(update.deltas),
        "norm": size,
        "lost_in_dtype": lost,
        "base_weights": is_base,
    }
    verb = "added to" if sign > 0 else "taken from"
    lines = [
        f"update of {len(update.deltas)} weights {verb} {name}, written to {out}",
        f"{100 * lost:.2g} % of it is lost to rounding in this dtype",
    ]
    show(result, as_json, lines)
