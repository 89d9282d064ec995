"""``kfade eval tofu``: forget quality and model utility of a model, or of saved logs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from kfade.cli import options as o
from kfade.cli.session import console, session, show
from kfade.errors import InputError
from kfade.runs.eval_tofu import TofuRequest, aggregate_tofu, evaluate_tofu

LOGS = "Saved logs"

OptionalModel = Annotated[
    str | None,
    typer.Argument(help="Hub id, local folder, GGUF file, or LoRA adapter. [none with --from-log]"),
]
OptionalOut = Annotated[
    Path | None,
    typer.Option("--out", help="Folder to write; it must not exist yet.", rich_help_panel=o.RUN),
]
Split = Annotated[
    str,
    typer.Option("--split", help="forget01, forget05 or forget10.", rich_help_panel=o.DATA),
]
DataFolder = Annotated[
    Path | None,
    typer.Option(
        "--data",
        help="Folder with a copy of the data set. [the hub's locuslab/TOFU]",
        show_default=False,
        rich_help_panel=o.DATA,
    ),
]
Template = Annotated[
    str,
    typer.Option("--template", help="auto, chat, llama2, phi or plain.", rich_help_panel=o.DATA),
]
MaxNewTokens = Annotated[
    int, typer.Option(min=1, help="Longest generated answer.", rich_help_panel=o.DATA)
]
Legacy = Annotated[
    bool,
    typer.Option(
        "--tofu-legacy",
        help="As the reference code: the first 300 items of each set, and Phi's 'Answer: ' scored.",
        rich_help_panel=o.DATA,
    ),
]
FromLog = Annotated[
    Path | None,
    typer.Option(
        "--from-log",
        help="Aggregate this log instead of measuring: a folder of kfade eval tofu, or the "
        "reference code's eval_log_aggregated.json.",
        rich_help_panel=LOGS,
    ),
]
RetainLog = Annotated[
    Path | None,
    typer.Option(
        "--retain-log",
        help="The retain model's log, of either kind: what forget quality compares with.",
        rich_help_panel=LOGS,
    ),
]
RetainModel = Annotated[
    str | None,
    typer.Option(
        "--retain-model",
        help="Or measure the retain model itself, after MODEL.",
        rich_help_panel=o.JUDGED,
    ),
]


def tofu(
    model: OptionalModel = None,
    update: o.UpdateDir = None,
    quantise: o.Quantise = None,
    split: Split = "forget10",
    data: DataFolder = None,
    template: Template = "auto",
    template_file: o.TemplateFile = None,
    template_args: o.TemplateArgs = None,
    template_date: o.TemplateDate = None,
    max_new_tokens: MaxNewTokens = 200,
    tofu_legacy: Legacy = False,
    from_log: FromLog = None,
    retain_log: RetainLog = None,
    retain_model: RetainModel = None,
    limit: o.Limit = None,
    batch_tokens: o.Positions = 4096,
    dtype: o.Dtype = None,
    device: o.Device = None,
    trust_remote_code: o.TrustRemoteCode = None,
    revision: o.Revision = None,
    tokenizer: o.Tokenizer = None,
    out: OptionalOut = None,
    resume: o.Resume = False,
    json: o.Json = False,
) -> None:
    """Forget quality, model utility and its nine parts on TOFU.

    Forget quality needs the retain model (trained without what is to be forgotten): its log or
    itself. With `--from-log` no model is run.

    Example: `kfade eval tofu MODEL --update out/run --retain-log out/retain --out out/tofu`
    """
    if from_log:
        if model or update or out or retain_model:
            raise InputError("--from-log only reads saved logs: leave out MODEL, --update, --out")
        _show(aggregate_tofu(from_log, retain_log), json)
        return
    if model is None or out is None:
        raise InputError("give MODEL and --out, or --from-log with a saved log")
    request = o.request_of(TofuRequest, locals())
    with session():
        result = evaluate_tofu(request, out, resume=resume)
    _show(result, json)


def _show(result: Mapping[str, Any], as_json: bool) -> None:
    for note in result["notes"]:
        console.print(f"note: {note}")
    beside = result["retain_model"]
    said = "not measured: give --retain-log or --retain-model"
    if result["forget_quality"] is not None:
        said = (
            f"{result['forget_quality']:.3g} (p of a KS test against the retain model, D = "
            f"{result['ks_statistic']:.3f})"
        )
    lines = [f"forget quality {said}", _line("model utility", result, beside, "model_utility")]
    for name in result["parts"]:
        lines.append(_line(f"  {name}", result["parts"], beside["parts"] if beside else None, name))
    for name in result["forget"]:
        lines.append(
            _line(f"forget {name}", result["forget"], beside["forget"] if beside else None, name)
        )
    counts = ", ".join(f"{name} {count}" for name, count in result["items"].items())
    show(dict(result), as_json, [*lines, f"items: {counts}"])


def _line(title: str, values: Mapping[str, Any], beside: Mapping[str, Any] | None, key: str) -> str:
    """One figure, the retain model's beside it."""
    other = beside[key] if beside else None
    return f"{title:<28}{values[key]:.4f}" + (f"   retain {other:.4f}" if other is not None else "")
