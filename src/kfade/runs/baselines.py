"""Baseline: another unlearning method, from its settings to a folder with an update."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kfade.baselines.checkpoint import Checkpoint
from kfade.baselines.loop import train
from kfade.baselines.methods import Method
from kfade.baselines.settings import Settings
from kfade.baselines.weights import Dense, Trainable
from kfade.data.batches import largest_batch
from kfade.data.examples import Example
from kfade.data.sequences import TokenSequence
from kfade.errors import InputError
from kfade.method.update import Update
from kfade.models.load import check_writable, provenance, save_model
from kfade.models.weights import weight_digests
from kfade.runs.baseline_choices import builder_of, settings_of, trainable_of
from kfade.runs.baseline_config import BaselineRequest, given
from kfade.runs.config import RunConfig, result_settings
from kfade.runs.inputs import input_digests
from kfade.runs.memory import refuse_untrainable
from kfade.runs.session import (
    Loaded,
    complete_data,
    division,
    open_model,
    read_retain,
    read_source,
    refuse_sharded_experts,
    refuse_sharded_export,
    say_sets,
    source_of,
    to_tokens,
)
from kfade.runs.template import with_date
from kfade.runtime import distributed, progress
from kfade.runtime.counts import counted, rounded
from kfade.runtime.files import reading_kept
from kfade.runtime.provenance import git_sha
from kfade.runtime.run_dir import RunDir
from kfade.runtime.stages import Clock, stage, timing

STATE = "training.safetensors"
_IN_CONFIG = {"evaluate_every", "max_kl", "batch_tokens", "seed"}  # in the manifest's config
SAVE_SECONDS = 300.0  # between two training checkpoints, each up to four times the model's size


@dataclass(frozen=True)
class _Ready:
    """Everything that a baseline run needs, read and checked."""

    request: BaselineRequest
    loaded: Loaded
    digests: dict[str, str]
    """Digests of all the model's weights."""
    method: Method
    trainable: Trainable
    settings: Settings
    sets: dict[str, list[TokenSequence]]
    """Token sequences by set: forget, retain, held_out."""


def baseline(request: BaselineRequest, out: Path, *, resume: bool = False) -> dict[str, Any]:
    """Unlearn with another method and write its update to the folder ``out``; returns the metrics.

    Raises:
        InputError: a setting or a file is wrong, or a resumed run has other settings than the
            interrupted one in ``out``.
    """
    _refuse_sharded(request)
    request = replace(request, data=with_date(request.data, out, resume=resume))
    build = builder_of(request.method, given(request.loss))
    examples = (
        read_source(request.data.forget, "--forget"),
        *read_retain(request.data, request.seed),
    )
    config = result_settings(RunConfig(model=request.model, data=request.data))
    settings = {**request.asked, **{part: config[part] for part in ("model", "data")}}
    clock = Clock()
    with timing(clock), RunDir(out, settings, resume=resume) as folder:
        ready = _prepare(request, examples, build, folder)
        update = _train(ready, folder)
        metrics = _finish(ready, update, clock, folder)
    return {"out": str(out), **metrics}


def _refuse_sharded(request: BaselineRequest) -> None:
    """Raises InputError where --shard is given with what does not work with it."""
    if not request.shard:
        return
    if request.method == "elm":
        raise InputError(
            "--shard does not work with elm: each process writes continuations of its own, token "
            "by token, but a sharded model needs all processes in every pass; leave --shard out"
        )
    if request.method == "repselect":
        raise InputError(
            "--shard does not work with repselect, which decomposes whole gradients: leave it out"
        )
    if request.export_model:
        refuse_sharded_export(request.shard)


def _prepare(
    request: BaselineRequest,
    examples: Sequence[Sequence[Example]],
    build: Callable[[Loaded, int], Method],
    folder: RunDir,
) -> _Ready:
    """Load and encode everything that the training needs.

    Args:
        examples: those to forget, to retain, and held out.
    """
    divide = division(request.model, request.shard)
    with stage("load"):
        loaded = Loaded(*open_model(request.model, divide=divide), [])
    data = complete_data(request.data, loaded)
    request = replace(request, data=data)
    method = build(loaded, request.seed)
    trainable = trainable_of(method, loaded, given(request.weights), request.seed)
    if isinstance(trainable, Dense):
        refuse_sharded_experts(loaded.model)
    forget, retain, held_out = (to_tokens(some, loaded, data) for some in examples)
    settings = replace(
        settings_of(method.defaults, given(request.training), len(forget)),
        batch_tokens=data.batch_tokens,
        seed=request.seed,
    )
    if request.export_model:
        check_writable(loaded.model, source_of(request.model))
    dense = isinstance(trainable, Dense)
    refuse_untrainable(
        loaded.model,
        request.model,
        trainable.names,
        largest_batch([forget, retain], settings.batch, settings.batch_tokens),
        factors=None if dense else sum(t.nbytes for t in trainable.tensors.values()),
        shard=request.shard,
        advice="lower --batch-tokens, give fewer --layers, --lora 8, --dtype bfloat16, or --shard "
        "over several devices",
    )
    digests = weight_digests(loaded.model, "model")
    names = {"forget": forget, "retain": retain, "held-out retain": held_out}
    say_sets(names, examples, data)
    folder.reads(input_digests(digests["model_sha256"], names))
    count = sum(tensor.numel() for tensor in trainable.parameters.values())
    progress.say(f"{rounded(count)} parameters trained, {counted(settings.steps, 'step')}")
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
    except InputError:  # a resumed run would raise it again
        (folder.state / STATE).unlink(missing_ok=True)
        raise


def _finish(ready: _Ready, update: Update, clock: Clock, folder: RunDir) -> dict[str, Any]:
    """Write update, model, metrics and manifest; returns the metrics."""
    request, model, settings = ready.request, ready.loaded.model, ready.settings
    source = source_of(request.model)
    about = {
        **update.provenance,
        **ready.digests,
        **update.edited_digest(model),
        "model": request.model.model,
        **provenance(source),
        "method": request.method,
    }
    made = Update(update.deltas, {**about, "config": request.asked})
    folder.put("update.safetensors", made.save, made.read)
    if request.export_model:
        with stage("export"), update.applied_to(model) as edited:
            tokenizer = ready.loaded.tokenizer
            folder.put("model", lambda path: save_model(edited, tokenizer, path, source))
    metrics = {
        **_metrics(update, clock, ready.sets),
        "lost_in_dtype": update.lost_fraction(model),
    }
    unset = set() if settings.selection else {"selection"}
    manifest = {
        "kind": "baseline",
        **{k: v for k, v in about.items() if k != "curve"},
        "seed": request.seed,
        "git_sha": git_sha(),
        "settings": {
            **{k: v for k, v in asdict(settings).items() if k not in _IN_CONFIG | unset},
            "optimizer": settings.optimizer.__name__,
        },
        "config": request.asked,
    }
    folder.finish(manifest, metrics)
    return metrics


def curve_line(row: Mapping[str, float], steps: int) -> str:
    """One line of text about an evaluation."""
    return (
        f"step {row['step']:.0f}/{steps}: forget loss {row['forget_loss']:.3f}, retain loss "
        f"{row['retain_loss']:.3f}, retain KL {row['retain_kl']:.2e} nats/token"
    )


def _on_evaluation(
    folder: RunDir, steps: int, every_update: bool
) -> Callable[[Checkpoint, Update], None]:
    """A callback that logs each evaluation and regularly keeps a training checkpoint."""
    saved = -SAVE_SECONDS

    def on_evaluation(checkpoint: Checkpoint, update: Update) -> None:
        nonlocal saved

        def save_update(path: Path) -> None:
            path.parent.mkdir(exist_ok=True)
            update.save(path)

        row = checkpoint.curve[-1]
        folder.log("evaluation", **row)
        progress.say(curve_line(row, steps))
        if every_update:
            name = f"checkpoints/step-{row['step']:06.0f}.safetensors"
            folder.put(name, save_update, update.read)
        due = distributed.any_of(time.monotonic() - saved >= SAVE_SECONDS)
        if due and row["step"] < steps:
            folder.keep(STATE, checkpoint.save, checkpoint.read)
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
