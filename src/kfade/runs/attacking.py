"""Relearning attack: fine-tune an unlearned model and measure how much of the forgotten returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from kfade.data.batches import draw_without_replacement, largest_batch
from kfade.data.examples import Example
from kfade.data.sequences import TokenSequence, digest_sequences
from kfade.errors import InputError
from kfade.evaluate.log import read_log
from kfade.evaluate.questions import Question, read_questions
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
from kfade.method.gauges import MEASURED_SEQUENCES
from kfade.models.weights import digest_weights
from kfade.runs import options as o
from kfade.runs.config import DataConfig, ModelConfig
from kfade.runs.evaluation import EvaluatedModel, Subject, item_log, load_evaluated
from kfade.runs.inputs import input_digests
from kfade.runs.memory import refuse_untrainable
from kfade.runs.session import (
    Loaded,
    complete_data,
    read_retain,
    read_source,
    refuse_sharded_experts,
    to_tokens,
)
from kfade.runs.template import with_date
from kfade.runtime import progress
from kfade.runtime.provenance import git_sha, versions
from kfade.runtime.run_dir import RunDir
from kfade.runtime.stages import Clock, stage, timing

ATTACK = "attack.jsonl"
KINDS = ("benign", "related", "forget")
_FORGET, _HELD_OUT = (
    "measured forget set",
    "held-out retain set",
)  # sets that are no kind of data


@o.settings(o.TRAINING)
@dataclass(frozen=True)
class AttackRequest:
    """The model to fine-tune, the data, and the measurements."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The model."""
    data: DataConfig = field(default_factory=DataConfig, kw_only=True)
    """The forget set, whose loss is measured; the retain set, on whose held-out part KL is
    measured; and how text becomes token sequences."""
    sources: Annotated[
        list[str], Parameter(name="--data", group=o.DATA, required=True), o.REPEATED
    ] = field(default_factory=list, kw_only=True)
    """Data to fine-tune on, in the same formats as --retain. May be given several times: each one
    is a separate attack."""
    kinds: Annotated[list[str], Parameter(name="--kind", group=o.DATA), o.REPEATED] = field(
        default_factory=list, kw_only=True
    )
    """Kind of each --data: benign, related or forget. Unset: benign, for a single --data."""
    update: Annotated[Path | None, Parameter(group=o.EVALUATED)] = field(default=None, kw_only=True)
    """Attack MODEL with this update: folder of a run, or an update file. Unset: MODEL itself."""
    questions: Annotated[Path | None, Parameter(group=o.DATA)] = field(default=None, kw_only=True)
    """Multiple-choice questions about the forgotten texts, in the formats of kfade eval choice.
    Unset: none."""
    steps: int = field(default=STEPS, kw_only=True)
    """Number of optimiser steps."""
    lr: float = field(default=LEARNING_RATE, kw_only=True)
    """Learning rate of AdamW."""
    batch: int = field(default=BATCH, kw_only=True)
    """Number of sequences in each step."""
    warmup: Annotated[int, o.at_least(0)] = field(default=0, kw_only=True)
    """Number of steps of linear learning-rate warm-up."""
    weight_decay: Annotated[float, o.at_least(0)] = field(default=WEIGHT_DECAY, kw_only=True)
    """Weight decay of AdamW."""
    at: Annotated[list[int], o.separated(int)] = field(
        default_factory=lambda: list(AT), kw_only=True
    )
    """Steps after which to measure, separated by commas."""
    seed: Annotated[int, Parameter(group=o.RUN)] = field(default=0, kw_only=True)
    """Random seed of the batches and the held-out split."""

    shard: Annotated[bool, o.FLAG, Parameter(group=o.RUN)] = field(default=False, kw_only=True)
    """Shard the weights of the model's blocks, their copies and the optimiser's state over the
    processes of torchrun."""

    @property
    def by_kind(self) -> dict[str, str]:
        """Sources of the data to fine-tune on, by kind.

        Raises:
            InputError: a kind is unknown, or the sources do not have one different kind each.
        """
        kinds = self.kinds or (["benign"] if len(self.sources) == 1 else [])
        if len(kinds) != len(self.sources) or len(set(kinds)) < len(kinds):
            raise InputError("give each --data a --kind of its own: benign, related or forget")
        for kind in kinds:
            if kind not in KINDS:
                raise InputError(f"--kind {kind}: give benign, related or forget")
        return dict(zip(kinds, self.sources, strict=True))

    @property
    def measured_at(self) -> list[int]:
        """Steps after which to measure, in ascending order.

        Raises:
            InputError: a number is not between 0 and ``steps``.
        """
        if not self.at or not all(0 <= number <= self.steps for number in self.at):
            given = ",".join(map(str, self.at))
            raise InputError(
                f"--at {given}: give numbers from 0 to --steps {self.steps}, separated by commas"
            )
        return sorted(set(self.at))

    @property
    def tuning(self) -> Tuning:
        """The settings of the fine-tuning."""
        return Tuning(
            self.steps,
            self.lr,
            self.batch,
            self.warmup,
            self.weight_decay,
            self.data.batch_tokens,
            self.seed,
        )

    @property
    def asked(self) -> dict[str, Any]:
        """The request as JSON values, for the manifest."""
        return {
            "run": {"model": asdict(self.model), "data": asdict(self.data), "seed": self.seed},
            "sources": self.by_kind,
            "update": None if self.update is None else str(self.update),
            "questions": None if self.questions is None else str(self.questions),
            "tuning": asdict(self.tuning),
            "at": self.measured_at,
        }


@dataclass(frozen=True)
class _Ready:
    """Everything that an attack needs, read and checked."""

    request: AttackRequest
    subject: EvaluatedModel
    tokens: dict[str, list[TokenSequence]]
    """Sequences to fine-tune on, by kind."""
    examine: Examination
    base: dict[str, float]
    """Measurements of the model without the update."""
    header: dict[str, Any]
    """First entries of the log and the manifest."""


def attack(request: AttackRequest, out: Path, *, resume: bool = False) -> dict[str, Any]:
    """Fine-tune a model with an update on each kind of data, and measure how much it relearns.

    After the fine-tuning the update is added again and the model is measured once more. Returns
    all measurements and the metrics.

    Raises:
        InputError: a setting or a file is wrong, or a resumed attack has other settings than the
            interrupted one in ``out``.
    """
    data = with_date(request.data, out, resume=resume, update=request.update)
    request = replace(request, data=data)
    asked = request.asked
    examples = _read(request)
    questions = read_questions(request.questions) if request.questions else []
    clock = Clock()
    with timing(clock), RunDir(out, asked, resume=resume) as folder:
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
    """Read all examples before any long work: the data of each kind, and the measured sets."""
    data = request.data
    return {
        **{kind: read_source(source, "--data") for kind, source in request.by_kind.items()},
        _FORGET: read_source(data.forget, "--forget"),
        _HELD_OUT: read_retain(data, request.seed)[1] if data.retain else [],
    }


def _prepare(
    request: AttackRequest,
    examples: Mapping[str, Sequence[Example]],
    questions: Sequence[Question],
    folder: RunDir,
) -> _Ready:
    """Load the model, encode the data and measure the model without the update."""
    subject = load_evaluated(Subject(request.model, update=request.update), shard=request.shard)
    refuse_sharded_experts(subject.model)
    loaded = Loaded(subject.model, subject.tokenizer, [])
    data = complete_data(request.data, loaded)
    request = replace(request, data=data)
    tokens = {name: to_tokens(some, loaded, data) for name, some in examples.items()}
    # kfade unlearn with the same data and seed measures the same sequences.
    forget = tokens.pop(_FORGET)
    chosen = draw_without_replacement(len(forget), MEASURED_SEQUENCES, 0, request.seed)
    forget, held_out = [forget[i] for i in chosen], tokens.pop(_HELD_OUT)
    refuse_untrainable(
        subject.model,
        request.model,
        [name for name, _ in subject.model.named_parameters()],
        largest_batch(list(tokens.values()), request.tuning.batch, data.batch_tokens),
        shard=request.shard,
        advice="lower --batch-tokens, give --dtype bfloat16, or --shard over several devices",
    )
    with stage("check"):
        examine = Examination(
            subject.model,
            forget=forget,
            held_out=held_out,
            questions=questions,
            tokenizer=subject.tokenizer,
            batch_tokens=data.batch_tokens,
            seed=request.seed,
        )
        base = examine(subject.model).values
    with subject.edited() as edited:
        edited_digest = digest_weights(edited)
    sets = {**tokens, _FORGET: forget, _HELD_OUT: held_out}
    asked = request.asked
    header = {
        "benchmark": "attack",
        "model": request.model.model,
        "update": asked["update"],
        "base_sha256": digest_weights(subject.model),
        "edited_sha256": edited_digest,
        "data_sha256": {name: digest_sequences(some) for name, some in sets.items()},
        **{name: asked[name] for name in ("questions", "sources", "tuning", "at")},
    }
    read = input_digests(header["base_sha256"], sets)
    folder.reads({**read, "the weights with --update": edited_digest})
    return _Ready(request, subject, tokens, examine, base, header)


def _measure(ready: _Ready, folder: RunDir) -> list[dict[str, Any]]:
    """Attack with each kind that the log does not have; its measurements are logged at the end."""
    request, subject = ready.request, ready.subject
    path = folder.state / ATTACK
    header = {**ready.header, "base": ready.base}
    if path.is_file():  # use the measurements of the interrupted run
        header["base"] = read_log(path, partial=True).header["base"]
    at = request.measured_at
    reapplied = bool(subject.update.deltas) and at[-1] > 0
    with item_log(path, header) as log:
        for kind, sequences in ready.tokens.items():
            if f"{kind}/{'reapplied' if reapplied else 'attacked'}/{at[-1]}" in log.items:
                continue
            with stage(kind):
                found = attack_model(
                    subject.model,
                    subject.update,
                    sequences,
                    ready.examine,
                    tuning=request.tuning,
                    at=at,
                )
            for one in found:
                name = f"{kind}/{one.state}/{one.step}"
                progress.say(f"{name}: {values_line(one.figures.values)}")
                if name not in log.items:  # an interruption may leave some of a kind
                    row = {"data": kind, "state": one.state, "step": one.step}
                    log.add(name, **row, **asdict(one.figures))
        rows = list(log.items.values())
        log.finish({"last": _last(rows)})
    return rows


def _last(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Measurements after the last step, by kind and state."""
    last: dict[str, dict[str, dict[str, float]]] = {}
    for row in sorted(rows, key=lambda row: row["step"]):
        last.setdefault(row["data"], {})[row["state"]] = row["values"]
    return last


def values_line(values: Mapping[str, float]) -> str:
    """One line of text about a measurement."""
    return ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in values.items())
