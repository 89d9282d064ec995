"""``kfade eval tofu``: forget quality and model utility of a model, or of saved logs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from kfade.cli import options as o
from kfade.cli.session import console, session, show
from kfade.errors import InputError
from kfade.runs.eval_tofu import TofuRequest, aggregate_tofu, evaluate_tofu
from kfade.runs.options import LOGS

FromLog = Annotated[
    Path | None,
    Parameter(
        group=LOGS,
        help="Aggregate this log instead of measuring: a folder of kfade eval tofu, or the "
        "reference code's eval_log_aggregated.json.",
    ),
]


def tofu(
    request: TofuRequest = TofuRequest(),
    *,
    from_log: FromLog = None,
    out: o.Out | None = None,
    resume: o.Resume = False,
    json: o.Json = False,
) -> None:
    """Forget quality, model utility and its nine parts on TOFU.

    Forget quality needs the retain model, which was trained without the forget set: give its log or
    the model itself. With `--from-log` no model is run.

    Example: `kfade eval tofu MODEL --update out/run --retain-log out/retain --out out/tofu`
    """
    subject = request.subject
    if from_log:
        if subject.model.model or subject.update or out or request.retain_model:
            raise InputError("--from-log only reads saved logs: leave out MODEL, --update, --out")
        _show(aggregate_tofu(from_log, request.retain_log), json)
        return
    if not subject.model.model or out is None:
        raise InputError("give MODEL and --out, or --from-log with a saved log")
    with session():
        result = evaluate_tofu(request, out, resume=resume)
    _show(result, json)


def _show(result: Mapping[str, Any], as_json: bool) -> None:
    for note in result["notes"]:
        console.print(f"note: {note}")
    beside = result["retain_model"]
    quality = "not measured: give --retain-log or --retain-model"
    if result["forget_quality"] is not None:
        quality = (
            f"{result['forget_quality']:.3g} (p of a KS test against the retain model, D = "
            f"{result['ks_statistic']:.3f})"
        )
    lines = [f"forget quality {quality}", _line("model utility", result, beside, "model_utility")]
    for name in result["parts"]:
        lines.append(_line(f"  {name}", result["parts"], beside["parts"] if beside else None, name))
    for name in result["forget"]:
        lines.append(
            _line(f"forget {name}", result["forget"], beside["forget"] if beside else None, name)
        )
    counts = ", ".join(f"{name} {count}" for name, count in result["items"].items())
    show(dict(result), as_json, [*lines, f"items: {counts}"])


def _line(title: str, values: Mapping[str, Any], beside: Mapping[str, Any] | None, key: str) -> str:
    """One figure, with that of the retain model next to it."""
    other = beside[key] if beside else None
    return f"{title:<28}{values[key]:.4f}" + (f"   retain {other:.4f}" if other is not None else "")
