"""Another method of unlearning, from a request to a folder with an update like K-FADE's."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from kfade.baselines.checkpoint import Checkpoint
from kfade.baselines.loop import Settings, train
from kfade.baselines.methods import Method
from kfade.baselines.weights import Trainable
from kfade.data.examples import Example
from kfade.data.sequences import TokenSequence
from kfade.errors import InputError
from kfade.method.update import Update
from kfade.models.layers import weight_digests
from kfade.models.load import check_writable, provenance, save_model
from kfade.runs import options as o
from kfade.runs.baseline_choices import (
    LORA_ALPHA,
    LORA_DROPOUT,
    builder_of,
    settings_of,
    trainable_of,
)
from kfade.runs.config import DataConfig, ModelConfig, RunConfig, result_settings
from kfade.runs.inputs import input_digests
from kfade.runs.session import (
    Loaded,
    complete_data,
    open_model,
    read_retain,
    read_source,
    source_of,
    to_tokens,
)
from kfade.runs.template import with_date
from kfade.runtime import progress
from kfade.runtime.files import reading_kept
from kfade.runtime.provenance import git_sha
from kfade.runtime.run_dir import RunDir
from kfade.runtime.stages import Clock, stage, timing

STATE = "training.safetensors"
_IN_CONFIG = {"evaluate_every", "max_kl", "batch_tokens", "seed"}  # told by a manifest's config
SAVE_SECONDS = 300.0  # between two savings of what a resumed run needs: up to four times the model


@o.settings(o.LOSS)
@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The method's loss; what is unset is as in its reference code, what it lacks is refused."""

    beta: float | None = None
    """β of npo (unset: 0.1) and simnpo (2.5)."""
    gamma: float | None = None
    """γ of simnpo (unset: 0); the retain loss's weight in soul (2)."""
    coefficient: float | None = None
    """Forget term's weight in npo (unset: 1) and simnpo (0.1375); length c of rmu's control
    vector (6.5)."""
    retain_weight: float | None = None
    """Retain term's weight. Unset: 1, of rmu 1200."""
    layer: int | None = None
    """Block whose output rmu steers, from 0. Unset: 7."""
    concept: str | None = None
    """What elm erases, in words: 'Greek mythology, its gods'."""
    eta: float | None = None
    """Strength of elm's guidance. Unset: 1000."""


@o.settings(o.TRAINING)
@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The training loop; what is unset is as in the method's reference code."""

    lr: float | None = None
    """Highest learning rate."""
    epochs: float | None = None
    """Passes over the forget set."""
    steps: int | None = None
    """Optimiser steps, in place of --epochs."""
    batch: int | None = None
    """Sequences of each set in a batch. Unset: 32, of rmu 4, of elm 1."""
    accumulate: int | None = None
    """Batches in a step, their losses averaged. Unset: 1, of elm 4."""
    warm_up: int | None = None
    """Steps of rising learning rate. Unset: an epoch's; of soul a tenth of all; of rmu and elm
    none."""
    decay: bool | None = None
    """Let the rate fall to 0 after it. Unset: yes, of rmu and elm no."""
    weight_decay: float | None = None
    """The optimiser's weight decay. Unset: 0.01, of soul 0.1."""
    clip: float | None = None
    """Longest gradient; 0 for any. Unset: 1, of rmu and elm any."""
    evaluate_every: int | None = None
    """Steps between evaluations. Unset: a tenth of all."""
    max_kl: float | None = None
    """Keep the evaluation that forgot most within this retain KL. Unset: the last."""


@o.settings(o.WEIGHTS)
@dataclass(frozen=True, kw_only=True)
class WeightsConfig:
    """Which weights are trained; what is unset is as in the method's reference code."""

    layers: str | None = None
    """Blocks, counted from 0, as in 3-6 or 0,2,8-11."""
    target: str | None = None
    """Glob over parameter names."""
    lora: int | None = None
    """Rank of low-rank changes; 0 for whole weights. Unset: 0, of elm 256."""
    lora_alpha: float = LORA_ALPHA
    """Their scale is this over the rank."""
    lora_dropout: float = LORA_DROPOUT
    """Dropout of their inputs."""


@o.settings(o.RUN)
@dataclass(frozen=True)
class BaselineRequest:
    """Another method, and what it is to forget."""

    method: Annotated[str, o.argument("method")] = ""
    """ga, gd, kl-min, npo, simnpo, rmu, elm or soul."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Which model."""
    data: DataConfig = field(default_factory=DataConfig, kw_only=True)
    """Which data."""
    loss: LossConfig = field(default_factory=LossConfig, kw_only=True)
    """The method's loss."""
    training: TrainingConfig = field(default_factory=TrainingConfig, kw_only=True)
    """The training loop."""
    weights: WeightsConfig = field(default_factory=WeightsConfig, kw_only=True)
    """Which weights are trained."""
    seed: int = field(default=0, kw_only=True)
    """Seed of the order of batches, of dropout and of the held-out split."""
    checkpoints: Annotated[bool, o.FLAG, Parameter(group=o.TRAINING)] = field(
        default=False, kw_only=True
    )
    """Keep the update of every evaluation."""
    export_model: Annotated[bool, o.FLAG] = field(default=False, kw_only=True)
    """Also write the edited model, for from_pretrained."""

    @property
    def asked(self) -> dict[str, Any]:
        """What a manifest tells of it: all that decides the result."""
        return {
            "method": self.method,
            "model": asdict(self.model),
            "data": asdict(self.data),
            "loss": _given(self.loss),
            "training": _given(self.training),
            "weights": _given(self.weights),
            "seed": self.seed,
        }


@dataclass(frozen=True)
class _Ready:
    """What is asked for, read and checked."""

    request: BaselineRequest
    loaded: Loaded
    digests: dict[str, str]
    """Of all weights."""
    method: Method
    trainable: Trainable
    settings: Settings
    sets: dict[str, list[TokenSequence]]
    """forget, retain, held_out."""


def baseline(request: BaselineRequest, out: Path, *, resume: bool = False) -> dict[str, Any]:
    """Make a model forget by another method; returns the metrics.

    Raises:
        InputError: what is asked for cannot be done; or an interrupted run in ``out`` that is
            resumed was asked for something else.
    """
    request = replace(request, data=with_date(request.data, out, resume=resume))
    build = builder_of(request.method, _given(request.loss))
    examples = (
        read_source(request.data.forget, "--forget"),
        *read_retain(request.data, request.seed),
    )
    config = result_settings(RunConfig(model=request.model, data=request.data))
    again = {**request.asked, **{part: config[part] for part in ("model", "data")}}
    clock = Clock()
    with timing(clock), RunDir(out, again, resume=resume) as folder:
        ready = _prepare(request, examples, build, folder)
        update = _train(ready, folder)
        metrics = _finish(ready, update, clock, folder)
    return {"out": str(out), **metrics}


def _given(config: LossConfig | TrainingConfig | WeightsConfig) -> dict[str, Any]:
    return {name: value for name, value in asdict(config).items() if value is not None}


def _prepare(
    request: BaselineRequest,
    examples: Sequence[Sequence[Example]],
    build: Callable[[Loaded, int], Method],
    folder: RunDir,
) -> _Ready:
    """Everything before the training; ``examples`` to forget, to retain, and held out."""
    with stage("load"):
        loaded = Loaded(*open_model(request.model), [])
    data = complete_data(request.data, loaded)
    request = replace(request, data=data)
    method = build(loaded, request.seed)
    trainable = trainable_of(method, loaded, _given(request.weights), request.seed)
    forget, retain, held_out = (to_tokens(some, loaded, data) for some in examples)
    settings = replace(
        settings_of(method.defaults, _given(request.training), len(forget)),
        batch_tokens=data.batch_tokens,
        seed=request.seed,
    )
    if request.export_model:
        check_writable(loaded.model, source_of(request.model))
    digests = weight_digests(loaded.model, "model")
    called = {"forget": forget, "retain": retain, "held-out retain": held_out}
    folder.reads(input_digests(digests["model_sha256"], called))
    count = sum(tensor.numel() for tensor in trainable.tensors.values())
    progress.say(f"{count / 1e6:.1f} M parameters trained, {settings.steps} steps")
    sets = {"forget": forget, "retain": retain, "held_out": held_out}
    return _Ready(request, loaded, digests, method, trainable, settings, sets)


def _train(ready: _Ready, folder: RunDir) -> Update:
    try:
        return train(
            ready.loaded.model,
            ready.method.terms,
            ready.trainable,
            ready.sets,
            ready.settings,
            start=_resume_from(folder),
            on_evaluation=_on_evaluation(folder, ready.settings.steps, ready.request.checkpoints),
        )
    except InputError:  # it would be met again: nothing to go on with
        (folder.state / STATE).unlink(missing_ok=True)
        raise


def _finish(ready: _Ready, update: Update, clock: Clock, folder: RunDir) -> dict[str, Any]:
    """Write everything; returns the metrics."""
    request, model, settings = ready.request, ready.loaded.model, ready.settings
    source = source_of(request.model)
    made = {
        **update.provenance,
        **ready.digests,
        **update.edited_digest(model),
        "model": request.model.model,
        **provenance(source),
        "method": request.method,
    }
    told = {**made, "config": request.asked}
    Update(update.deltas, told).save(folder.part / "update.safetensors")
    if request.export_model:
        with stage("export"), update.applied_to(model) as edited:
            save_model(edited, ready.loaded.tokenizer, folder.part / "model", source)
    metrics = {
        **_metrics(update, clock, ready.sets),
        "lost_in_dtype": update.lost_fraction(model),
    }
    manifest = {
        "kind": "baseline",
        **{k: v for k, v in made.items() if k != "curve"},
        "seed": request.seed,
        "git_sha": git_sha(),
        "settings": {
            **{k: v for k, v in asdict(settings).items() if k not in _IN_CONFIG},
            "optimizer": settings.optimizer.__name__,
        },
        "config": request.asked,
    }
    folder.finish(manifest, metrics)
    return metrics


def curve_line(row: Mapping[str, float], steps: int) -> str:
    """One evaluation in a line."""
    return (
        f"step {row['step']:.0f}/{steps}: forget loss {row['forget_loss']:.3f}, retain loss "
        f"{row['retain_loss']:.3f}, retain KL {row['retain_kl']:.2e} nats/token"
    )


def _on_evaluation(
    folder: RunDir, steps: int, every_update: bool
) -> Callable[[Checkpoint, Update], None]:
    """Log each evaluation, and now and then keep what a resumed run needs."""
    saved = -SAVE_SECONDS

    def on_evaluation(checkpoint: Checkpoint, update: Update) -> None:
        nonlocal saved
        row = checkpoint.curve[-1]
        folder.log("evaluation", **row)
        progress.say(curve_line(row, steps))
        if every_update:
            path = folder.part / "checkpoints" / f"step-{row['step']:06.0f}.safetensors"
            path.parent.mkdir(exist_ok=True)
            update.save(path)
        if time.monotonic() - saved >= SAVE_SECONDS and row["step"] < steps:
            folder.keep(STATE, checkpoint.save)
            saved = time.monotonic()

    return on_evaluation


def _resume_from(folder: RunDir) -> Checkpoint | None:
    path = folder.state / STATE
    if not path.is_file():
        return None
    with reading_kept(path):
        checkpoint = Checkpoint.load(path)
    progress.say(f"resuming after step {checkpoint.curve[-1]['step']}")
    return checkpoint


def _metrics(
    update: Update, clock: Clock, sets: Mapping[str, Sequence[TokenSequence]]
) -> dict[str, Any]:
    curve, step = update.provenance["curve"], update.provenance["kept_step"]
    before, after = curve[0], next(row for row in curve if row["step"] == step)
    stages = ("load", "reference", "train", "check")
    return {
        "curve": curve,
        "kept_step": step,
        "retain_kl": after["retain_kl"],
        "forget_loss": {"before": before["forget_loss"], "after": after["forget_loss"]},
        "retain_loss": {"before": before["retain_loss"], "after": after["retain_loss"]},
        "seconds": {**{n: clock.seconds.get(n, 0.0) for n in stages}, "total": clock.total},
        "peak_bytes": max(clock.peak_bytes.values()),
        "peak_bytes_by_stage": clock.peak_bytes,
        "tokens": {name: sum(s.loss_tokens for s in data) for name, data in sets.items()},
    }
