"""``kfade attack``: fine-tune an unlearned model and see what comes back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from kfade.cli import options as o
from kfade.cli.eval import Judged, digest_model, load_judged
from kfade.cli.session import console, session, show
from kfade.data.batches import draw_without_replacement
from kfade.data.examples import Example
from kfade.data.sequences import TokenSequence, digest_sequences
from kfade.errors import InputError
from kfade.evaluate.log import ItemLog, read_log
from kfade.evaluate.questions import read_questions
from kfade.evaluate.relearning import (
    AT,
    BATCH,
    LEARNING_RATE,
    STEPS,
    WEIGHT_DECAY,
    Examination,
    Tuning,
)
from kfade.evaluate.relearning import attack as attack_model
from kfade.method.unlearn import MEASURED_SEQUENCES
from kfade.runs.config import RunConfig, override
from kfade.runs.inputs import inputs
from kfade.runs.session import Loaded, read_retain, read_source, to_tokens, with_length
from kfade.runs.template import as_used, dated
from kfade.runtime.provenance import git_sha, versions
from kfade.runtime.run_dir import RunDir
from kfade.runtime.stages import stage

ATTACK = "attack.jsonl"
KINDS = ("benign", "related", "forget")
TUNING = "Fine-tuning"
_FORGET, _HELD_OUT = "measured forget set", "held-out retain set"  # beside kinds of data
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


@dataclass(frozen=True)
class _Request:
    """What is asked for."""

    run: RunConfig
    """Model and data."""
    update: Path | None
    sources: dict[str, str]
    """What to fine-tune on, by kind."""
    questions: Path | None
    tuning: Tuning
    at: list[int]


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
    request = _Request(run, update, _by_kind(data, kind), questions, tuning, _steps(at, steps))
    result = _run(request, out, resume)
    show(result, json, _lines(result))


def _run(request: _Request, out: Path, resume: bool) -> dict[str, Any]:
    run = request.run
    dates = dated(run.data, out, resume=resume, update=request.update)
    run = replace(run, data=dates)
    request = replace(request, run=run)
    examples = _read(request)
    questions = read_questions(request.questions) if request.questions else []
    asked = {**asdict(request), "update": _text(request.update)}
    asked["questions"] = _text(request.questions)
    with session() as clock, RunDir(out, asked, resume=resume) as folder:
        subject = load_judged(
            run.model.model,
            update=request.update,
            dtype=run.model.dtype,
            device=run.model.device,
            trust_remote_code=run.model.trust_remote_code,
            revision=run.model.revision,
            tokenizer=run.model.tokenizer,
        )
        loaded = Loaded(subject.model, subject.tokenizer, [])
        run = replace(run, data=as_used(with_length(run.data, loaded), loaded.tokenizer))
        asked["run"] = asdict(run)
        tokens = {name: to_tokens(some, loaded, run.data) for name, some in examples.items()}
        # Those that a kfade unlearn with the same data and seed measures: figures agree with it.
        forget = tokens.pop(_FORGET)
        chosen = draw_without_replacement(len(forget), MEASURED_SEQUENCES, 0, run.seed)
        forget, held_out = [forget[i] for i in chosen], tokens.pop(_HELD_OUT)
        with stage("check"):
            examine = Examination(
                subject.model,
                forget=forget,
                held_out=held_out,
                questions=questions,
                tokenizer=subject.tokenizer,
                batch_tokens=run.data.batch_tokens,
                seed=run.seed,
            )
            base = examine(subject.model).values
        with subject.edited() as edited:
            edited_digest = digest_model(edited)
        sets = {**tokens, _FORGET: forget, _HELD_OUT: held_out}
        header = {
            "benchmark": "attack",
            "model": run.model.model,
            "update": asked["update"],
            "base_sha256": digest_model(subject.model),
            "edited_sha256": edited_digest,
            "data_sha256": {name: digest_sequences(some) for name, some in sets.items()},
            "questions": asked["questions"],
            "sources": request.sources,
            "tuning": asdict(request.tuning),
            "at": request.at,
        }
        read = inputs(header["base_sha256"], sets)
        folder.reads({**read, "the weights with --update": edited_digest})
        rows = _measure(request, subject, tokens, examine, folder, {**header, "base": base})
        folder.publish(ATTACK)
        metrics = {
            "base": base,
            "last": _last(rows),
            "seconds": {**clock.seconds, "total": clock.total},
            "peak_bytes": max(clock.peak_bytes.values()),
        }
        manifest = {
            "kind": "attack",
            **header,
            **subject.provenance,
            "versions": versions(),
            "git_sha": git_sha(),
            "config": asked,
        }
        folder.finish(manifest, metrics)
    return {"out": str(out), "measurements": rows, **metrics}


def _read(request: _Request) -> dict[str, list[Example]]:
    """Everything to be read, before any long work: by kind what is trained on, then the rest."""
    run = request.run
    return {
        **{kind: read_source(source, "--data") for kind, source in request.sources.items()},
        _FORGET: read_source(run.data.forget, "--forget"),
        _HELD_OUT: read_retain(run.data, run.seed)[1] if run.data.retain else [],
    }


def _measure(
    request: _Request,
    subject: Judged,
    tokens: Mapping[str, Sequence[TokenSequence]],
    examine: Examination,
    folder: RunDir,
    header: dict[str, Any],
) -> list[dict[str, Any]]:
    """All measurements, those of a kind in the log as soon as it is done."""
    path = folder.state / ATTACK
    if path.is_file():  # measured by the interrupted run, perhaps on another device
        header["base"] = read_log(path, partial=True).header["base"]
    again = bool(subject.update.deltas) and max(request.at) > 0
    with ItemLog(path, header) as log:
        try:
            for kind, sequences in tokens.items():
                if f"{kind}/{'reapplied' if again else 'attacked'}/{max(request.at)}" in log.items:
                    continue
                with stage(kind):
                    found = attack_model(
                        subject.model,
                        subject.update,
                        sequences,
                        examine,
                        tuning=request.tuning,
                        at=request.at,
                    )
                for one in found:
                    name = f"{kind}/{one.state}/{one.step}"
                    console.print(f"{name}: {_told(one.figures.values)}")
                    if name not in log.items:  # cut off in writing
                        row = {"data": kind, "state": one.state, "step": one.step}
                        log.add(name, **row, **asdict(one.figures))
            rows = list(log.items.values())
            log.finish({"last": _last(rows)})
        finally:
            if not log.items:  # nothing worth keeping
                path.unlink(missing_ok=True)
    return rows


def _last(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Values after the last step, by kind and state."""
    last: dict[str, dict[str, dict[str, float]]] = {}
    for row in sorted(rows, key=lambda row: row["step"]):
        last.setdefault(row["data"], {})[row["state"]] = row["values"]
    return last


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


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _told(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in values.items())


def _lines(result: Mapping[str, Any]) -> list[str]:
    lines = [f"before unlearning: {_told(result['base'])}"]
    for kind, states in result["last"].items():
        lines += [f"{kind}, {state}: {_told(values)}" for state, values in states.items()]
    return [*lines, f"every measurement in {result['out']}/{ATTACK}"]
