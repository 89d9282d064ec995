"""``kfade eval quantisation``: how much of an update is left after the weights are rounded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from kfade.cli import options as o
from kfade.cli.session import session, show
from kfade.runs.config import ModelConfig
from kfade.runs.eval_quantisation import evaluate_quantisation
from kfade.runs.options import EVALUATED
from kfade.runtime.counts import counted

Update = Annotated[
    Path, Parameter(group=EVALUATED, help="Folder of a kfade run, or an update file.")
]


def quantisation(
    model: ModelConfig = ModelConfig(),
    *,
    update: Update,
    out: o.Out,
    resume: o.Resume = False,
    json: o.Json = False,
) -> None:
    """How much of an update survives bfloat16, int8 and int4 round-to-nearest, weight by weight.

    To measure the effect on a metric, use `--quantise int8` or `int4` with the other evaluations.
    """
    with session():
        result = evaluate_quantisation(model, update, out, resume=resume)
    show(result, json, _lines(result))


def _lines(result: Mapping[str, Any]) -> list[str]:
    lines = [f"update of {counted(result['weights'], 'weight')}"]
    for name, figures in result["rounding"].items():
        lines.append(
            f"{name}: {100 * figures['surviving']:.1f} % survives; the rounding error is "
            f"{100 * figures['lost']:.3g} % of the update's norm"
        )
    return [*lines, f"every weight in {result['out']}/items.jsonl"]
