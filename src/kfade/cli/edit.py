"""What is done with updates: ``kfade apply`` and ``revert``, ``merge``, and ``export-lora``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kfade.cli import options as o
from kfade.cli.session import session, show
from kfade.runs import editing
from kfade.runs.config import ModelConfig

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
    config = o.request_of(ModelConfig, locals())
    with session():
        result = editing.apply(config, update, out)
    show(result, json, _lines(result, model, "added to"))


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
    config = o.request_of(ModelConfig, locals())
    with session():
        result = editing.revert(config, update, out)
    show(result, json, _lines(result, model, "taken from"))


def _lines(result: dict[str, Any], model: str, done: str) -> list[str]:
    return [
        f"update of {result['weights']} weights {done} {model}, written to {result['out']}",
        f"{100 * result['lost_in_dtype']:.2g} % of it is lost to rounding in this dtype",
    ]


def merge(updates: UpdatePaths, out: o.Out, json: o.Json = False) -> None:
    """Write the sum of several updates as one: `kfade apply` then makes all changes at once.

    Updates of different models, or of one model at different times, are added all the same, and it
    is said.
    """
    with session():
        result = editing.merge(updates, out)
    told = f"sum of {len(updates)} updates, {result['weights']} weights, written to {out}"
    show(result, json, [told])


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
    request = o.request_of(editing.LoraRequest, locals())
    with session():
        result = editing.export_lora(request)
    errors = result["relative_errors"]
    worst = max(errors, key=lambda weight: errors[weight])
    lines = [
        f"adapter of rank {rank} for {len(errors)} weights written to {result['out']}",
        f"{100 * result['relative_error']:.3g} % of the update's norm is left out; of {worst} "
        f"{100 * errors[worst]:.3g} %",
    ]
    show(result, json, lines)
