"""Fine-tuning an unlearned model, and what comes back: from a request to a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from kfade.data.batches import draw_without_replacement
from kfade.data.examples import Example
from kfade.data.sequences import TokenSequence, digest_sequences
from kfade.evaluate.log import ItemLog, read_log
from kfade.evaluate.questions import Question, read_questions
from kfade.evaluate.relearning import AT, Examination, Tuning
from kfade.evaluate.relearning import attack as attack_model
from kfade.method.unlearn import MEASURED_SEQUENCES
from kfade.models.layers import digest_weights
from kfade.runs.config import RunConfig
from kfade.runs.evaluation import Judged, Subject, load_judged
from kfade.runs.inputs import inputs
from kfade.runs.session import Loaded, read_retain, read_source, to_tokens, with_length
from kfade.runs.template import as_used, dated
from kfade.runtime import progress
from kfade.runtime.provenance import git_sha, versions
from kfade.runtime.run_dir import RunDir
from kfade.runtime.stages import Clock, stage, timing

ATTACK = "attack.jsonl"
_FORGET, _HELD_OUT = "measured forget set", "held-out retain set"  # beside kinds of data


@dataclass(frozen=True)
class AttackRequest:
    """What is asked for."""

    run: RunConfig
    """Model and data."""
    sources: dict[str, str]
    """What to fine-tune on, by kind."""
    update: Path | None = None
    """Of the model; None to fine-tune it as it is."""
    questions: Path | None = None
    """Multiple choice on what was forgotten."""
    tuning: Tuning = field(default_factory=Tuning)
    """How to fine-tune."""
    at: Sequence[int] = AT
    """Numbers of steps after which to measure, rising."""

    @property
    def asked(self) -> dict[str, Any]:
        """What a manifest tells of it."""
        paths = {"update": self.update, "questions": self.questions}
        texts = {name: None if path is None else str(path) for name, path in paths.items()}
        return {**asdict(self), "at": list(self.at), **texts}


@dataclass(frozen=True)
class _Ready:
    """What is asked for, read and checked."""

    request: AttackRequest
    subject: Judged
    tokens: dict[str, list[TokenSequence]]
    """What is trained on, by kind."""
    examine: Examination
    base: dict[str, float]
    """Measured before the update."""
    header: dict[str, Any]
    """What log and manifest begin with."""


def attack(request: AttackRequest, out: Path, *, resume: bool = False) -> dict[str, Any]:
    """Fine-tune a model with an update on each kind of data, measure what comes back, and add the
    update once more; returns all measurements and the metrics.

    Raises:
        InputError: what is asked for cannot be done; or an interrupted attack in ``out`` that is
            resumed was asked for something else.
    """
    data = dated(request.run.data, out, resume=resume, update=request.update)
    request = replace(request, run=replace(request.run, data=data))
    examples = _read(request)
    questions = read_questions(request.questions) if request.questions else []
    clock = Clock()
    with timing(clock), RunDir(out, request.asked, resume=resume) as folder:
        ready = _prepare(request, examples, questions, folder)
        rows = _measure(ready, folder)
        folder.publish(ATTACK)
        metrics = {
            "base": ready.base,
            "last": _last(rows),
            "seconds": {**clock.seconds, "total": clock.total},
            "peak_bytes": max(clock.peak_bytes.values()),
        }
        manifest = {
            "kind": "attack",
            **ready.header,
            **ready.subject.provenance,
            "versions": versions(),
            "git_sha": git_sha(),
            "config": ready.request.asked,
        }
        folder.finish(manifest, metrics)
    return {"out": str(out), "measurements": rows, **metrics}


def _read(request: AttackRequest) -> dict[str, list[Example]]:
    """Everything to be read, before any long work: by kind what is trained on, then the rest."""
    run = request.run
    return {
        **{kind: read_source(source, "--data") for kind, source in request.sources.items()},
        _FORGET: read_source(run.data.forget, "--forget"),
        _HELD_OUT: read_retain(run.data, run.seed)[1] if run.data.retain else [],
    }


def _prepare(
    request: AttackRequest,
    examples: Mapping[str, Sequence[Example]],
    questions: Sequence[Question],
    folder: RunDir,
) -> _Ready:
    """Everything before the fine-tuning."""
    run = request.run
    subject = load_judged(Subject(run.model, request.update))
    loaded = Loaded(subject.model, subject.tokenizer, [])
    run = replace(run, data=as_used(with_length(run.data, loaded), loaded.tokenizer))
    request = replace(request, run=run)
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
        edited_digest = digest_weights(edited)
    sets = {**tokens, _FORGET: forget, _HELD_OUT: held_out}
    asked = request.asked
    header = {
        "benchmark": "attack",
        "model": run.model.model,
        "update": asked["update"],
        "base_sha256": digest_weights(subject.model),
        "edited_sha256": edited_digest,
        "data_sha256": {name: digest_sequences(some) for name, some in sets.items()},
        **{name: asked[name] for name in ("questions", "sources", "tuning", "at")},
    }
    read = inputs(header["base_sha256"], sets)
    folder.reads({**read, "the weights with --update": edited_digest})
    return _Ready(request, subject, tokens, examine, base, header)


def _measure(ready: _Ready, folder: RunDir) -> list[dict[str, Any]]:
    """All measurements, those of a kind in the log as soon as it is done."""
    request, subject = ready.request, ready.subject
    path = folder.state / ATTACK
    header = {**ready.header, "base": ready.base}
    if path.is_file():  # measured by the interrupted run, perhaps on another device
        header["base"] = read_log(path, partial=True).header["base"]
    again = bool(subject.update.deltas) and max(request.at) > 0
    with ItemLog(path, header) as log:
        try:
            for kind, sequences in ready.tokens.items():
                if f"{kind}/{'reapplied' if again else 'attacked'}/{max(request.at)}" in log.items:
                    continue
                with stage(kind):
                    found = attack_model(
                        subject.model,
                        subject.update,
                        sequences,
                        ready.examine,
                        tuning=request.tuning,
                        at=request.at,
                    )
                for one in found:
                    name = f"{kind}/{one.state}/{one.step}"
                    progress.say(f"{name}: {told(one.figures.values)}")
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


def told(values: Mapping[str, float]) -> str:
    """One measurement for a person."""
    return ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in values.items())
