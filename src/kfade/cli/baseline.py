"""``kfade baseline``: another method of unlearning, from files to an update like K-FADE's."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from kfade.baselines.checkpoint import Checkpoint
from kfade.baselines.loop import train
from kfade.cli import baseline_options as b
from kfade.cli import options as o
from kfade.cli.baseline_words import builder_of, settings_of, trainable_of
from kfade.cli.session import console, session, show
from kfade.data.sequences import TokenSequence
from kfade.errors import InputError
from kfade.method.update import Update
from kfade.models.layers import weight_digests
from kfade.models.load import check_writable, load_model, provenance, save_model
from kfade.runs.config import RunConfig, deciding, override
from kfade.runs.inputs import inputs
from kfade.runs.session import Loaded, read_retain, read_source, source_of, to_tokens, with_length
from kfade.runs.template import as_used, dated
from kfade.runtime.files import reading_kept
from kfade.runtime.provenance import git_sha
from kfade.runtime.run_dir import RunDir
from kfade.runtime.stages import Clock, stage

STATE = "training.safetensors"
SAVE_SECONDS = 300.0  # between two savings of what a resumed run needs: up to four times the model
LOSS = ("beta", "gamma", "coefficient", "retain_weight", "layer", "concept", "eta")
TRAINING = (
    "lr", "epochs", "steps", "batch", "accumulate", "warm_up", "decay", "weight_decay", "clip",
    "evaluate_every", "max_kl",
)  # fmt: skip
WEIGHTS = ("layers", "target", "lora", "lora_alpha", "lora_dropout")


def baseline(
    method: b.MethodName,
    model: o.Model,
    out: o.Out,
    forget: o.Forget = None,
    retain: o.Retain = None,
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
    beta: b.Beta = None,
    gamma: b.Gamma = None,
    coefficient: b.Coefficient = None,
    retain_weight: b.RetainWeight = None,
    layer: b.Layer = None,
    concept: b.Concept = None,
    eta: b.Eta = None,
    lr: b.Lr = None,
    epochs: b.Epochs = None,
    steps: b.Steps = None,
    batch: b.BatchSize = None,
    accumulate: b.Accumulate = None,
    warm_up: b.WarmUp = None,
    decay: b.Decay = None,
    weight_decay: b.WeightDecay = None,
    clip: b.Clip = None,
    evaluate_every: b.EvaluateEvery = None,
    max_kl: b.MaxKl = None,
    checkpoints: b.Checkpoints = False,
    layers: b.Layers = None,
    target: b.Target = None,
    lora: b.LoraRank = None,
    lora_alpha: b.LoraAlpha = 16.0,
    lora_dropout: b.LoraDropout = 0.05,
    dtype: o.Dtype = None,
    device: o.Device = None,
    trust_remote_code: o.TrustRemoteCode = None,
    revision: o.Revision = None,
    tokenizer: o.Tokenizer = None,
    seed: o.Seed = None,
    resume: o.Resume = False,
    export_model: o.ExportModel = False,
    json: o.Json = False,
) -> None:
    """Make MODEL forget by another METHOD, to compare with: the same data, the same kind of update.

    Writes `update.safetensors`, `manifest.json`, `metrics.json` and `log.jsonl` into OUT; MODEL
    itself is not changed. Defaults are those of each method's reference code, made for models of
    7 billion parameters; sweep `--lr` on any other.

    Example: `kfade baseline npo HuggingFaceTB/SmolLM2-135M-Instruct --forget forget.jsonl
    --retain retain.jsonl --lr 2e-5 --out out/npo`
    """
    options = locals()
    run = override(RunConfig(), **{k: v for k, v in options.items() if k in _SHARED})
    run = replace(run, data=dated(run.data, out, resume=resume))
    loss, training, weights = (
        {k: options[k] for k in names if options[k] is not None}
        for names in (LOSS, TRAINING, WEIGHTS)
    )
    asked = {
        "method": method,
        "model": asdict(run.model),
        "data": asdict(run.data),
        "loss": loss,
        "training": training,
        "weights": weights,
        "seed": run.seed,
    }
    build, source = builder_of(method, loss), source_of(run.model)
    forget_examples = read_source(run.data.forget, "--forget")
    fit_examples, held_examples = read_retain(run.data, run.seed)
    again = {**asked, **{part: deciding(run)[part] for part in ("model", "data")}}
    with session() as clock, RunDir(out, again, resume=resume) as folder:
        loaded = _load(run)
        run = replace(run, data=as_used(with_length(run.data, loaded), loaded.tokenizer))
        asked["data"] = asdict(run.data)
        chosen = build(loaded, run.seed)
        trainable = trainable_of(chosen, loaded, weights, run.seed)
        forget_tokens = to_tokens(forget_examples, loaded, run.data)
        retain_tokens = to_tokens(fit_examples, loaded, run.data)
        held_out = to_tokens(held_examples, loaded, run.data)
        settings = settings_of(chosen.defaults, training, len(forget_tokens))
        if export_model:
            check_writable(loaded.model, source)
        sets = {"forget": forget_tokens, "retain": retain_tokens, "held_out": held_out}
        digests = weight_digests(loaded.model, "model")
        called = dict(zip(("forget", "retain", "held-out retain"), sets.values(), strict=True))
        folder.reads(inputs(digests["model_sha256"], called))
        every = max(1, settings.steps // 10) if evaluate_every is None else evaluate_every
        count = sum(tensor.numel() for tensor in trainable.tensors.values())
        console.print(f"{count / 1e6:.1f} M parameters trained, {settings.steps} steps")
        try:
            update = train(
                loaded.model,
                chosen.terms,
                trainable,
                forget=forget_tokens,
                retain=retain_tokens,
                held_out=held_out,
                settings=settings,
                evaluate_every=every,
                max_kl=max_kl,
                batch_tokens=run.data.batch_tokens,
                seed=run.seed,
                start=_resume_from(folder),
                on_evaluation=_on_evaluation(folder, settings.steps, checkpoints),
            )
        except InputError:  # it would be met again: nothing to go on with
            (folder.state / STATE).unlink(missing_ok=True)
            raise
        made = {
            **update.provenance,
            **digests,
            **update.edited_digest(loaded.model),
            "model": run.model.model,
            **provenance(source),
            "method": method,
        }
        Update(update.deltas, {**made, "config": asked}).save(folder.part / "update.safetensors")
        if export_model:
            with stage("export"), update.applied_to(loaded.model) as edited:
                save_model(edited, loaded.tokenizer, folder.part / "model", source)
        metrics = {
            **_metrics(update, clock, sets),
            "lost_in_dtype": update.lost_fraction(loaded.model),
        }
        manifest = {
            "kind": "baseline",
            **{k: v for k, v in made.items() if k != "curve"},
            "seed": run.seed,
            "git_sha": git_sha(),
            "settings": {**asdict(settings), "optimizer": settings.optimizer.__name__},
            "config": asked,
        }
        folder.finish(manifest, metrics)
    result = {"out": str(out), **metrics}
    show(result, json, summary(result, max_kl))


_SHARED = {
    *("template", "template_file", "template_args", "template_date", "score_end"),
    *("pack", "truncate", "holdout", "batch_tokens", "seed", "revision", "tokenizer"),
    *("model", "dtype", "device", "trust_remote_code", "forget", "retain", "sequence_length"),
}


def curve_line(row: Mapping[str, float], steps: int) -> str:
    """One evaluation in a line."""
    return (
        f"step {row['step']:.0f}/{steps}: forget loss {row['forget_loss']:.3f}, retain loss "
        f"{row['retain_loss']:.3f}, retain KL {row['retain_kl']:.2e} nats/token"
    )


def summary(result: Mapping[str, Any], max_kl: float | None) -> list[str]:
    """What a person wants to see at the end."""
    loss, seconds = result["forget_loss"], result["seconds"]
    lines = [
        f"kept: step {result['kept_step']} of {result['curve'][-1]['step']}",
        f"forget loss {loss['before']:.3f} -> {loss['after']:.3f} nats/token",
        f"retain KL {result['retain_kl']:.2e} nats/token on {result['tokens']['held_out']} "
        "held-out tokens",
        f"{100 * result['lost_in_dtype']:.2g} % of the update is lost to rounding in this dtype",
        "time: " + ", ".join(f"{k} {v:.0f} s" for k, v in seconds.items()),
        f"update written to {result['out']}/update.safetensors",
    ]
    if max_kl is not None and result["retain_kl"] > max_kl:
        lines.insert(0, f"note: no evaluation was within --max-kl {max_kl}; the nearest is kept")
    return lines


def _load(run: RunConfig) -> Loaded:
    with stage("load"):
        model, tokenizer = load_model(
            run.model.model,
            dtype=run.model.dtype,
            device=run.model.device,
            trust_remote_code=run.model.trust_remote_code,
            revision=run.model.revision,
            tokenizer=run.model.tokenizer,
        )
    return Loaded(model, tokenizer, [])


def _on_evaluation(
    folder: RunDir, steps: int, every_update: bool
) -> Callable[[Checkpoint, Update], None]:
    """Log each evaluation, and now and then keep what a resumed run needs."""
    saved = -SAVE_SECONDS

    def on_evaluation(checkpoint: Checkpoint, update: Update) -> None:
        nonlocal saved
        row = checkpoint.curve[-1]
        folder.log("evaluation", **row)
        console.print(curve_line(row, steps))
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
    console.print(f"resuming after step {checkpoint.curve[-1]['step']}")
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
