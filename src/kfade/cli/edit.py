"""``kfade apply``, ``revert``, ``merge`` and ``export-lora``: commands on updates."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from kfade.cli import options as o
from kfade.cli.session import session, show
from kfade.runs import editing
from kfade.runs.config import ModelConfig
from kfade.runs.options import MODEL, argument
from kfade.runtime.counts import counted

UpdatePath = Annotated[
    Path,
    argument("update"),
    Parameter(required=True, help="Folder of a kfade run, or an update file."),
]
UpdatePaths = Annotated[
    list[Path],
    Parameter(
        name="UPDATES",
        group=MODEL,
        help="Two or more folders of kfade runs, or update files.",
    ),
]


def apply(
    model: ModelConfig = ModelConfig(),
    update: UpdatePath = Path(),
    *,
    out: o.Out,
    json: o.Json = False,
) -> None:
    """Write MODEL with UPDATE added, as a folder that `from_pretrained` loads.

    MODEL may be the one that the update was computed on, or a fine-tuned version of it. A model
    with weights of other shapes is an error.
    """
    with session():
        result = editing.apply(model, update, out)
    show(result, json, _lines(result, model.model, "added to"))


def revert(
    model: ModelConfig = ModelConfig(),
    update: UpdatePath = Path(),
    *,
    out: o.Out,
    json: o.Json = False,
) -> None:
    """Write MODEL with UPDATE subtracted: undoes `kfade apply`, up to one rounding."""
    with session():
        result = editing.revert(model, update, out)
    show(result, json, _lines(result, model.model, "subtracted from"))


def _lines(result: dict[str, Any], model: str, done: str) -> list[str]:
    return [
        f"update of {counted(result['weights'], 'weight')} {done} {model}, written to "
        f"{result['out']}",
        f"{100 * result['lost_in_dtype']:.2g} % of it is lost to rounding in this dtype",
    ]


def merge(updates: UpdatePaths, /, *, out: o.Out, json: o.Json = False) -> None:
    """Write the sum of several updates as one: `kfade apply` then makes all changes at once.

    Updates of different models, or of one model at different times, are added too, with a note.
    """
    with session():
        result = editing.merge(updates, out)
    parts = f"{counted(len(updates), 'update')}, {counted(result['weights'], 'weight')}"
    line = f"sum of {parts}, written to {out}"
    show(result, json, [line])


def export_lora(request: editing.LoraRequest, *, json: o.Json = False) -> None:
    """Write the LoRA adapter that is nearest to UPDATE, in the format of the package peft.

    The change of each weight keeps only its largest singular values. The relative error,
    ‖ΔW − BA‖ / ‖ΔW‖, is printed for all weights together and is in `metrics.json` for each one. The
    weights of the model are not needed.
    """
    with session():
        result = editing.export_lora(request)
    errors = result["relative_errors"]
    worst = max(errors, key=lambda weight: errors[weight])
    lines = [
        f"adapter of rank {request.rank} for {counted(len(errors), 'weight')} written to "
        f"{result['out']}",
        f"relative error {100 * result['relative_error']:.3g} %; largest for {worst}: "
        f"{100 * errors[worst]:.3g} %",
    ]
    show(result, json, lines)
