"""``kfade unlearn``: the whole method, from files to an update."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from kfade.cli import options as o
from kfade.cli.inputs import SavedFit, inputs
from kfade.cli.session import (
    Loaded,
    console,
    load,
    read_retain,
    read_source,
    session,
    show,
    source_of,
    spread,
    to_tokens,
    with_length,
)
from kfade.cli.template import as_used, dated
from kfade.curvature.curvature import Curvature
from kfade.curvature.fit import Fit
from kfade.curvature.store import Store
from kfade.data.batches import Batch
from kfade.data.sequences import TokenSequence, digest_sequences
from kfade.errors import InputError
from kfade.method.objectives import Objective
from kfade.method.step import StepSize
from kfade.method.unlearn import DEFAULT_DAMPING, DEFAULT_KL
from kfade.method.unlearn import unlearn as unlearn_model
from kfade.method.update import Update
from kfade.models.layers import Target, digest_weights, parameter_names, weight_digests
from kfade.models.load import check_writable, provenance, save_model
from kfade.planning.memory import curvature_budget
from kfade.runs.config import RunConfig, deciding, override, read_config, write_config
from kfade.runtime import distributed
from kfade.runtime.files import reading_kept
from kfade.runtime.run_dir import RunDir
from kfade.runtime.stages import Clock, stage


def unlearn(
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
    estimator: o.Estimator = None,
    labels: o.Labels = None,
    layers: o.Layers = None,
    target: o.Target = None,
    joint_bias: o.JointBias = None,
    memory: o.Memory = None,
    recompute: o.Recompute = None,
    curvature: o.CurvatureDir = None,
    objective: o.ObjectiveName = None,
    later_objective: o.LaterObjective = None,
    steps: o.Steps = None,
    forget_batch: o.ForgetBatch = None,
    refit: o.Refit = None,
    damping: o.Damping = None,
    relative_damping: o.RelativeDamping = None,
    exact_norm: o.ExactNorm = None,
    refine: o.Refine = None,
    refine_sequences: o.RefineSequences = None,
    alpha: o.Alpha = None,
    kl: o.Kl = None,
    until: o.Until = None,
    max_kl: o.MaxKl = None,
    dtype: o.Dtype = None,
    device: o.Device = None,
    trust_remote_code: o.TrustRemoteCode = None,
    revision: o.Revision = None,
    tokenizer: o.Tokenizer = None,
    shard: o.Shard = None,
    seed: o.Seed = None,
    config: o.Config = None,
    resume: o.Resume = False,
    export_model: o.ExportModel = False,
    json: o.Json = False,
) -> None:
    """Compute an update that makes MODEL forget one set of texts and keep another.

    Writes `update.safetensors`, `manifest.json`, `metrics.json`, `config.yaml` and `log.jsonl`
    into OUT; MODEL itself is not changed.

    Example: `kfade unlearn HuggingFaceTB/SmolLM2-135M-Instruct --forget forget.jsonl
    --retain retain.jsonl --kl 0.01 --out out/run`
    """
    given = {name: value for name, value in locals().items() if name not in _NOT_SETTINGS}
    run = override(read_config(config) if config else RunConfig(), **given)
    saved = SavedFit.read(curvature) if curvature is not None else None
    run = saved.settled(run, given) if saved is not None else run
    result = run_unlearn(run, out, saved=saved, resume=resume, export_model=export_model)
    show(result, json, summary(result))


_NOT_SETTINGS = {"out", "curvature", "config", "resume", "export_model", "json"}
_UNLOGGED = {"relative_change", "probes"}  # too long for a line


def run_unlearn(
    run: RunConfig,
    out: Path,
    *,
    saved: SavedFit | None = None,
    resume: bool = False,
    export_model: bool = False,
    loaded: Loaded | None = None,
) -> dict[str, Any]:
    """One run of the method from its configuration to its folder; returns the metrics.

    ``saved``: the first step's curvature, whose settings are the configuration's. ``loaded`` is the
    configuration's model, where the caller has it already.
    """
    if export_model and run.model.shard:
        raise InputError("--export-model with --shard: apply the update afterwards, kfade apply")
    run = replace(run, data=dated(run.data, out, resume=resume))
    method, source = _method(run), source_of(run.model)
    fit = o.fit_of(run.fit.estimator)
    forget_examples = read_source(run.data.forget, "--forget")
    fit_examples, held_examples = read_retain(run.data, run.seed)
    given = {"curvature": str(saved.path) if saved is not None else None}
    with session() as clock, RunDir(out, {**deciding(run), **given}, resume=resume) as folder:
        loaded = loaded or load(run.model, run.fit)
        run = replace(run, data=as_used(with_length(run.data, loaded), loaded.tokenizer))
        budget = curvature_bytes(run, loaded)
        spread(run.model, loaded.model)
        forget, retain, held_out = (
            to_tokens(examples, loaded, run.data)
            for examples in (forget_examples, fit_examples, held_examples)
        )
        if export_model:
            check_writable(loaded.model, source)
        digests = weight_digests(loaded.model, "model")
        curvature = saved.of(loaded, digests["model_sha256"]) if saved is not None else None
        sets = {"forget": forget, "retain": retain, "held-out retain": held_out}
        folder.reads(inputs(digests["model_sha256"], sets, saved))
        if saved is not None:
            saved.note_other_texts(retain)
        made_for = {
            "model_sha256": digests["model_sha256"],
            "retain_sha256": digest_sequences(retain),
            "config": deciding(run)["fit"],
        }
        update = unlearn_model(
            loaded.model,
            forget=forget,
            retain=retain,
            held_out=held_out,
            targets=loaded.targets,
            fit=_kept(fit, folder, budget, made_for),
            curvature=curvature,
            start=_resume_from(folder),
            on_step=partial(_keep_step, folder, run.step.steps),
            **method,
        )
        update = Update(
            update.deltas,
            {
                **update.provenance,
                **digests,
                **update.edited_digest(loaded.model),
                **(saved.facts() if saved is not None else {}),
                "model": run.model.model,
                **provenance(source),
                "config": asdict(run),
            },
        )
        folder.put("update.safetensors", update.save)
        lost = update.lost_fraction(loaded.model)
        if export_model:
            with stage("export"), update.applied_to(loaded.model) as edited:
                folder.put("model", lambda path: save_model(edited, loaded.tokenizer, path, source))
        metrics = {**run_metrics(update, clock, forget, retain, held_out), "lost_in_dtype": lost}
        manifest = {
            "kind": "unlearn",
            **{k: v for k, v in update.provenance.items() if k not in ("steps", "config")},
            "seed": run.seed,
            "git_sha": git_sha(),
            "config": {**asdict(run), **given},
        }
        folder.finish(manifest, metrics, write_config(run))
    return {"out": str(out), **metrics}


def _method(run: RunConfig) -> dict[str, Any]:
    """What :func:`kfade.unlearn` is told of the method.

    Raises:
        InputError: settings that do not go together, or that there are not.
    """
    damping, relative = damping_of(run)
    return {
        **asdict(step_size(run)),
        **asdict(run.refinement),
        "objective": o.objective_of(run.step.objective),
        "later_objective": _later_objective(run),
        "draw": o.draw_of(run.fit.labels),
        "damping": damping,
        "relative": relative,
        "exact_norm": run.step.exact_norm,
        "steps": run.step.steps,
        "forget_batch": run.step.forget_batch,
        "refit": run.step.refit,
        "batch_tokens": run.data.batch_tokens,
        "recompute": run.fit.recompute,
        "seed": run.seed,
    }


def _later_objective(run: RunConfig) -> Objective | None:
    word = run.step.later_objective
    if word is not None and run.step.steps == 1:
        raise InputError(f"--later-objective {word} with one step: give --steps 2 or more")
    return o.objective_of(word, "--later-objective") if word is not None else None


def _keep_step(folder: RunDir, total: int, update: Update) -> None:
    """Write the update after a step, for a resumed run to go on from, and tell of the step."""
    steps = update.provenance["steps"]
    folder.keep(f"update-{len(steps):03}.safetensors", update.save)
    folder.log("step", **{k: v for k, v in steps[-1].items() if k not in _UNLOGGED})
    console.print(step_line(len(steps), total, steps[-1]))


def step_size(run: RunConfig) -> StepSize:
    """The step's size as asked, a measured KL of ``DEFAULT_KL`` where nothing is said."""
    until = o.until_of(run.size.until)
    kl = run.size.kl
    if run.size.alpha is None and kl is None and not until:
        kl = DEFAULT_KL
    return StepSize(run.size.alpha, kl, **until, max_kl=run.size.max_kl)


def curvature_bytes(run: RunConfig, loaded: Loaded) -> int | None:
    """What ``--memory`` leaves for the curvature beside the model, still whole, and a pass."""
    if run.fit.memory is None:
        return None
    total = o.bytes_of(run.fit.memory)
    refitted = run.step.refit and run.step.steps > 1
    length = with_length(run.data, loaded).sequence_length
    assert length is not None
    return curvature_budget(
        total,
        loaded.model,
        loaded.targets,
        run.data.batch_tokens,
        sequence_length=length,
        estimator=run.fit.estimator,
        recompute=run.fit.recompute,
        vectors=3 if refitted else 0,
        shards=distributed.count() if run.model.shard else 1,
    )


def damping_of(run: RunConfig) -> tuple[float, bool]:
    """(damping, relative)."""
    absolute, relative = run.step.damping, run.step.relative_damping
    if absolute is not None and relative is not None:
        raise InputError("give --damping or --relative-damping, not both")
    if absolute is not None:
        return absolute, False
    return (DEFAULT_DAMPING if relative is None else relative), True


def step_line(number: int, total: int, record: dict[str, Any]) -> str:
    """One step in a line."""
    refined = f", refined {record['refined']}" if record["refined"] else ""
    return (
        f"step {number}/{total}: forget loss {record['forget_loss_before']:.3f} -> "
        f"{record['forget_loss_after']:.3f}, retain KL {record['retain_kl']:.2e} nats/token "
        f"(this step: predicted {record['predicted_kl']:.2e}, exact quadratic "
        f"{record['exact_kl']:.2e}, measured {record['measured_kl']:.2e}{refined})"
    )


def summary(result: dict[str, Any]) -> list[str]:
    """What a person wants to see at the end."""
    seconds = ", ".join(f"{k} {v:.0f} s" for k, v in result["seconds"].items())
    loss, probability = result["forget_loss"], result["forget_probability"]
    return [
        f"forget loss {loss['before']:.3f} -> {loss['after']:.3f} nats/token, probability of the "
        f"forget texts {probability['before']:.3g} -> {probability['after']:.3g}",
        f"retain KL {result['retain_kl']:.2e} nats/token on {result['tokens']['held_out']} "
        "held-out tokens",
        f"{100 * result['lost_in_dtype']:.2g} % of the update is lost to rounding in this dtype",
        f"time: {seconds}",
        f"update written to {result['out']}/update.safetensors",
    ]


def git_sha() -> str | None:
    """The commit of the working directory, if it is one of git's."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() or None


def _kept(fit: Fit, folder: RunDir, memory: int | None, made_for: dict[str, Any]) -> Fit:
    """``fit``, kept in the run's state, finished or not, so that a resumed run goes on from it."""

    def kept(
        model: nn.Module, batches: Sequence[Batch], targets: Sequence[Target], **arguments: Any
    ) -> Curvature:
        digest = digest_weights(model, parameter_names(targets))
        place = folder.state / f"curvature-{digest[:16]}"
        if distributed.rank() == 0:
            for old in folder.state.glob("curvature-*"):
                if old != place:
                    shutil.rmtree(old)
            place.mkdir(exist_ok=True)
        distributed.barrier()
        store = Store(
            place, {"weights_sha256": digest, **made_for}, device=targets[0].weight.device
        )
        return fit(model, batches, targets, memory=memory, store=store, **arguments)

    return kept


def _resume_from(folder: RunDir) -> Update | None:
    done = sorted(folder.state.glob("update-*.safetensors"))
    if not done:
        return None
    with reading_kept(done[-1]):
        update = Update.load(done[-1])
    console.print(f"resuming after step {len(update.provenance['steps'])}")
    return update


def run_metrics(
    update: Update,
    clock: Clock,
    forget: Sequence[TokenSequence],
    retain: Sequence[TokenSequence],
    held_out: Sequence[TokenSequence],
) -> dict[str, Any]:
    """What ``metrics.json`` tells of an update that :func:`kfade.unlearn` made."""
    steps = update.provenance["steps"]
    stages = ["load", "fit", "gradient", "step", "check"]
    if "refine" in clock.seconds:
        stages.insert(4, "refine")
    seconds = {name: clock.seconds.get(name, 0.0) for name in stages}
    sets = {"forget": forget, "retain": retain, "held_out": held_out}
    return {
        "steps": steps,
        "retain_kl": steps[-1]["retain_kl"],
        "forget_loss": {
            "before": steps[0]["forget_loss_before"],
            "after": steps[-1]["forget_loss_after"],
        },
        "forget_probability": {
            "before": steps[0]["forget_probability_before"],
            "after": steps[-1]["forget_probability_after"],
        },
        "seconds": {**seconds, "total": clock.total},
        "fit_seconds": {k: clock.seconds.get(k, 0.0) for k in ("covariance", "eigh", "lambda")},
        "peak_bytes": max(clock.peak_bytes.values()),
        "peak_bytes_by_stage": clock.peak_bytes,
        "tokens": {name: sum(s.loss_tokens for s in data) for name, data in sets.items()},
    }
