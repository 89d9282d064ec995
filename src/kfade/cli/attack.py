"""``kfade attack``: fine-tune an unlearned model and see what comes back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from kfade.cli import options as o
from kfade.cli.session import session, show
from kfade.errors import InputError
from kfade.evaluate.relearning import AT, BATCH, LEARNING_RATE, STEPS, WEIGHT_DECAY, Tuning
from kfade.runs.attacking import ATTACK, AttackRequest, told
from kfade.runs.attacking import attack as run_attack
from kfade.runs.config import RunConfig, override

KINDS = ("benign", "related", "forget")
TUNING = "Fine-tuning"
DEFAULT_AT = ",".join(map(str, AT))


def _option(panel: str, name: str, text: str, **more: Any):
    return typer.Option(name, help=text, rich_help_panel=panel, **more)


Data = Annotated[
    list[str],
    _option(o.DATA, "--data", "What to fine-tune on; each one given is an attack from the start."),
]
Kinds = Annotated[
    list[str] | None,
    _option(
        o.DATA, "--kind", "What each --data is: benign, related or forget. [a single one: benign]",
        show_default=False,
    ),
]  # fmt: skip
Forget = Annotated[str, _option(o.DATA, "--forget", "What was forgotten: its loss is measured.")]
Retain = Annotated[
    str | None,
    _option(
        o.DATA, "--retain", "The run's retain set: KL is measured on what it holds out.",
        show_default=False,
    ),
]  # fmt: skip
Questions = Annotated[
    Path | None,
    _option(
        o.DATA, "--questions", "Multiple choice on it, as for kfade eval choice.",
        show_default=False,
    ),
]  # fmt: skip
Steps = Annotated[int, _option(TUNING, "--steps", "Optimiser steps.")]
Rate = Annotated[float, _option(TUNING, "--lr", "Learning rate of AdamW.")]
BatchSize = Annotated[int, _option(TUNING, "--batch", "Sequences a step.")]
Warmup = Annotated[int, _option(TUNING, "--warmup", "Steps of linear warm-up.", min=0)]
Decay = Annotated[float, _option(TUNING, "--weight-decay", "AdamW's.", min=0)]
At = Annotated[str, _option(TUNING, "--at", "Numbers of steps after which to measure.")]
_SETTINGS = {
    *("model", "forget", "retain", "sequence_length", "pack", "truncate", "holdout"),
    *("template", "template_file", "template_args", "template_date", "score_end"),
    *("batch_tokens", "dtype", "device", "trust_remote_code", "revision", "tokenizer"),
    "seed",
}


def attack(
    model: o.Model,
    data: Data,
    forget: Forget,
    out: o.Out,
    update: o.UpdateDir = None,
    kind: Kinds = None,
    retain: Retain = None,
    questions: Questions = None,
    steps: Steps = STEPS,
    lr: Rate = LEARNING_RATE,
    batch: BatchSize = BATCH,
    warmup: Warmup = 0,
    weight_decay: Decay = WEIGHT_DECAY,
    at: At = DEFAULT_AT,
    sequence_length: o.SequenceLength = None,
    template: o.Template = None,
    template_file: o.TemplateFile = None,
    template_args: o.TemplateArgs = None,
    template_date: o.TemplateDate = None,
    score_end: o.ScoreEnd = None,
    pack: o.Pack = None,
    truncate: o.Truncate = None,
    holdout: o.Holdout = None,
    batch_tokens: o.BatchTokens = None,
    dtype: o.Dtype = None,
    device: o.Device = None,
    trust_remote_code: o.TrustRemoteCode = None,
    revision: o.Revision = None,
    tokenizer: o.Tokenizer = None,
    seed: o.Seed = None,
    resume: o.Resume = False,
    json: o.Json = False,
) -> None:
    """Fine-tune MODEL with an update, measure what comes back, and add the update once more.

    Without --update MODEL itself is fine-tuned: the control. All weights are trained; MODEL is not
    changed. Writes `attack.jsonl`, `metrics.json` and `manifest.json` into OUT; --resume goes on
    after the kinds of data that are done.

    Example: `kfade attack MODEL --update out/run --forget forget.jsonl --data wikitext.jsonl
    --kind benign --data few.jsonl --kind forget --out out/attack`
    """
    given = {name: value for name, value in locals().items() if name in _SETTINGS}
    run = override(RunConfig(), **given)
    tuning = Tuning(steps, lr, batch, warmup, weight_decay, run.data.batch_tokens, run.seed)
    kinds = _by_kind(data, kind)
    request = AttackRequest(run, kinds, update, questions, tuning, _steps(at, steps))
    with session():
        result = run_attack(request, out, resume=resume)
    show(result, json, _lines(result))


def _by_kind(data: Sequence[str], kinds: Sequence[str] | None) -> dict[str, str]:
    kinds = list(kinds or [])
    if len(data) == 1 and not kinds:
        kinds = ["benign"]
    if len(kinds) != len(data) or len(set(kinds)) < len(kinds):
        raise InputError("give each --data a --kind of its own: benign, related or forget")
    for kind in kinds:
        if kind not in KINDS:
            raise InputError(f"--kind {kind}: give benign, related or forget")
    return dict(zip(kinds, data, strict=True))


def _steps(at: str, most: int) -> list[int]:
    words = [word.strip() for word in at.split(",")]
    if not all(word.isdecimal() and int(word) <= most for word in words):
        raise InputError(f"--at {at}: give numbers from 0 to --steps {most}, parted by commas")
    return sorted({int(word) for word in words})


def _lines(result: Mapping[str, Any]) -> list[str]:
    lines = [f"before unlearning: {told(result['base'])}"]
    for kind, states in result["last"].items():
        lines += [f"{kind}, {state}: {told(values)}" for state, values in states.items()]
    return [*lines, f"every measurement in {result['out']}/{ATTACK}"]
