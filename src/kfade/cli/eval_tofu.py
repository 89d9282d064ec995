"""``kfade eval tofu``: forget quality and model utility of a model, or of saved logs."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from kfade.cli import options as o
from kfade.cli.eval import (
    Evaluation,
    Judged,
    digest_model,
    evaluation,
    load_judged,
    settings_of,
)
from kfade.cli.session import console, show
from kfade.data.chat import ChatTemplate
from kfade.errors import InputError
from kfade.evaluate.log import ItemLog, digest
from kfade.evaluate.rouge import load_rouge_l_recall
from kfade.evaluate.tofu import (
    LEGACY_ITEMS,
    TofuQuestion,
    evaluate_tofu,
    read_tofu,
    template_for,
)
from kfade.evaluate.tofu_logs import (
    TofuLog,
    aggregate,
    load_ks_test,
    notes_on,
)
from kfade.evaluate.tofu_read import log_of, read_tofu_log
from kfade.models.load import load_tokenizer
from kfade.runs.template import rendering_of
from kfade.runtime.stages import stage

RETAIN_ITEMS = "retain.jsonl"
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
    settings = settings_of(locals())
    if retain_log and retain_model:
        raise InputError("give --retain-log or --retain-model, not both")
    if retain_log or retain_model:
        load_ks_test()
    retain = read_tofu_log(retain_log) if retain_log else None
    if retain:
        retain.items("forget")  # it has what forget quality needs: said before the long work
    if from_log:
        if model or update or out or retain_model:
            raise InputError("--from-log only reads saved logs: leave out MODEL, --update, --out")
        _show_logs(read_tofu_log(from_log), retain, json)
        return
    if model is None or out is None:
        raise InputError("give MODEL and --out, or --from-log with a saved log")
    load_rouge_l_recall()
    if retain_model:
        load_tokenizer(  # is it there?
            retain_model, trust_remote_code=bool(trust_remote_code), tokenizer=tokenizer
        )
    chat = rendering_of(settings, out, resume=resume, update=update, word=template)
    limits = [n for n in (limit, LEGACY_ITEMS if tofu_legacy else None) if n is not None]
    questions = read_tofu(split, folder=data, limit=min(limits, default=None))
    where: dict[str, Any] = {
        "dtype": dtype,
        "device": device,
        "trust_remote_code": trust_remote_code,
        "tokenizer": tokenizer,
    }
    how = {
        "template": template,
        "chat": chat,
        "max_new_tokens": max_new_tokens,
        "batch_tokens": batch_tokens,
        "legacy": tofu_legacy,
    }
    with evaluation("tofu", out, resume, settings) as run:
        subject = run.load(model, update=update, quantise=quantise, revision=revision, **where)
        about = _about(subject, questions, how)
        with run.items(**about) as log:
            _measure(subject, questions, log, how)
            if retain_model:
                del subject
                gc.collect()  # a model holds references to itself
                other = load_judged(retain_model, **where)
                retain = _measure_retain(run, other, questions, how)
            measured = log_of(log.items, str(out), {**settings, **about})
            result = aggregate(measured, retain)
            run.finish(log, result, **about)
    _show({**run.result, "notes": notes_on(measured, retain)}, json)


def _about(
    subject: Judged, questions: list[TofuQuestion], how: Mapping[str, Any]
) -> dict[str, Any]:
    """What decides the numbers besides the options.

    The date is there if the prompts hold it.
    """
    with subject.edited() as edited:
        about: dict[str, Any] = {
            "weights_sha256": digest_model(edited),
            "data_sha256": digest(questions),
            "prompt_format": template_for(how["template"], edited, subject.tokenizer),
        }
    chat: ChatTemplate = how["chat"]
    if about["prompt_format"] == "chat" and chat.reads_date(subject.tokenizer):
        about["prompt_date"] = str(chat.now)
    return about


def _measure(
    subject: Judged, questions: list[TofuQuestion], log: ItemLog, how: Mapping[str, Any]
) -> None:
    with stage("items"), subject.edited() as edited:
        evaluate_tofu(edited, subject.tokenizer, questions, log, **how)


def _measure_retain(
    run: Evaluation, subject: Judged, questions: list[TofuQuestion], how: Mapping[str, Any]
) -> TofuLog:
    """The retain model's items, kept beside MODEL's: a log that --retain-log takes."""
    header = {
        "benchmark": "tofu",
        "model": subject.name,
        "max_new_tokens": how["max_new_tokens"],
        **{name: run.settings[name] for name in ("template_args", "template_sha256")},
        **_about(subject, questions, how),
    }
    with ItemLog(run.folder.state / RETAIN_ITEMS, header) as log:
        _measure(subject, questions, log, how)
        retain = log_of(log.items, RETAIN_ITEMS, header)
        log.finish(aggregate(retain))
    run.folder.publish(RETAIN_ITEMS)
    return retain


def _show_logs(log: TofuLog, retain: TofuLog | None, as_json: bool) -> None:
    result = aggregate(log, retain)  # first: it says what a log lacks
    _show({**result, "notes": notes_on(log, retain)}, as_json)


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
