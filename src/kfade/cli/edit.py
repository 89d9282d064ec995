"""What is done with updates: ``kfade apply`` and ``revert``, ``merge``, and ``export-lora``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from kfade.cli import options as o
from kfade.cli.session import session, show
from kfade.runs import editing
from kfade.runs.config import ModelConfig
from kfade.runs.options import MODEL, argument

UpdatePath = Annotated[
    Path,
    argument("update"),
    Parameter(required=True, help="Folder of a kfade run, or its update file."),
]
UpdatePaths = Annotated[
    list[Path],
    Parameter(
        name="UPDATES",
        group=MODEL,
        help="Folders of kfade runs, or their update files; two or more.",
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

    MODEL may be the one that the update was computed on or a fine-tuned descendant of it; a model
    of other shapes is refused.
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
    """Write MODEL with UPDATE taken away: undoes `kfade apply`, up to one rounding."""
    with session():
        result = editing.revert(model, update, out)
    show(result, json, _lines(result, model.model, "taken from"))


def _lines(result: dict[str, Any], model: str, done: str) -> list[str]:
    return [
        f"update of {result['weights']} weights {done} {model}, written to {result['out']}",
        f"{100 * result['lost_in_dtype']:.2g} % of it is lost to rounding in this dtype",
    ]


def merge(updates: UpdatePaths, /, *, out: o.Out, json: o.Json = False) -> None:
    """Write the sum of several updates as one: `kfade apply` then makes all changes at once.

    Updates of different models, or of one model at different times, are added all the same, with
    a note that says so.
    """
    with session():
        result = editing.merge(updates, out)
    told = f"sum of {len(updates)} updates, {result['weights']} weights, written to {out}"
    show(result, json, [told])


def export_lora(request: editing.LoraRequest, *, json: o.Json = False) -> None:
    """Write the LoRA adapter that is nearest to UPDATE, as the package peft loads it.

    Each weight's change is cut to its largest singular values. The relative error, ‖ΔW − BA‖ /
    ‖ΔW‖, is told in all and, in `metrics.json`, by weight. MODEL's weights are not needed.
    """
    with session():
        result = editing.export_lora(request)
    errors = result["relative_errors"]
    worst = max(errors, key=lambda weight: errors[weight])
    lines = [
        f"adapter of rank {request.rank} for {len(errors)} weights written to {result['out']}",
        f"{100 * result['relative_error']:.3g} % of the update's norm is left out; of {worst} "
        f"{100 * errors[worst]:.3g} %",
    ]
    show(result, json, lines)
