"""Unlearn: the complete method, from a configuration to a folder with its update."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from kfade.curvature.damping import Damping, check_damping
from kfade.curvature.store import Store
from kfade.curvature.vectors import Storage
from kfade.data.sequences import TokenSequence, digest_sequences
from kfade.errors import InputError
from kfade.evaluate.routing import rerouted_share, routing_line
from kfade.method.gauges import MEASURED_SEQUENCES
from kfade.method.objectives import Objective
from kfade.method.sampling import Sampler
from kfade.method.settings import DEFAULT_KL, Correction, Direction, Run
from kfade.method.size import StepSize
from kfade.method.unlearn import unlearn as unlearn_model
from kfade.method.update import Update
from kfade.models.experts import expert_modules
from kfade.models.load import check_writable, provenance, save_model
from kfade.models.targets import Target
from kfade.models.weights import digest_weights, parameter_names, weight_digests
from kfade.runs.choices import (
    draw_of,
    estimator_of,
    objective_of,
    top_of,
    until_of,
)
from kfade.runs.config import RunConfig, result_settings, write_config
from kfade.runs.experts import leave_out_rare, leave_out_unfitted
from kfade.runs.inputs import SavedFit, input_digests
from kfade.runs.memory import make_room
from kfade.runs.session import (
    Loaded,
    complete_data,
    load,
    read_retain,
    read_source,
    refuse_sharded_export,
    say_sets,
    source_of,
    to_tokens,
)
from kfade.runs.template import with_date
from kfade.runtime import distributed, progress
from kfade.runtime.files import reading_kept
from kfade.runtime.provenance import git_sha
from kfade.runtime.run_dir import RunDir
from kfade.runtime.stages import Clock, stage, timing

_UNLOGGED = {"relative_change", "probes"}  # too long for a line of the log


def unlearn(
    run: RunConfig,
    out: Path,
    *,
    saved: SavedFit | None = None,
    resume: bool = False,
    export_model: bool = False,
    loaded: Loaded | None = None,
) -> dict[str, Any]:
    """Compute an update and write it to the folder ``out``; returns the metrics.

    Args:
        saved: a curvature for the first step. None: it is fitted.
        resume: continue the interrupted run in ``out``.
        export_model: also write the edited model.
        loaded: the configuration's model, if it is loaded already.

    Raises:
        InputError: a setting or a file is wrong, ``saved`` was fitted with other settings, or a
            resumed run has other settings than the interrupted one in ``out``.
    """
    run = run.decided
    if saved is not None:
        saved.check(run)
    if export_model:
        refuse_sharded_export(run.shard)
    run = replace(run, data=with_date(run.data, out, resume=resume))
    source = source_of(run.model)
    estimator = estimator_of(run.fit.estimator, draw_of(run.fit.labels))
    direction, size, settings = _direction_of(run), _step_size(run), _run_of(run)
    forget_examples = read_source(run.data.forget, "--forget")
    fit_examples, held_examples = read_retain(run.data, run.seed)
    given = {"curvature": str(saved.path) if saved is not None else None}
    clock = Clock()
    asked = {**result_settings(run), **given}
    # The first fit depends on none of these, except that --memory is shared out by --steps.
    free = ("size",) if run.fit.memory else ("size", "step", "refinement", "correction")
    with (
        timing(clock),
        RunDir(out, asked, resume=resume, free=dict.fromkeys(free, "update-*")) as folder,
    ):
        loaded = loaded or load(run.model, run.fit, shard=run.shard)
        run = replace(run, data=complete_data(run.data, loaded))
        fits = saved is None or run.step.refits
        room = make_room(run, loaded, estimator, "unlearn" if fits else "steps", folder)
        forget, retain, held_out = (
            to_tokens(examples, loaded, run.data)
            for examples in (forget_examples, fit_examples, held_examples)
        )
        if saved is not None:
            loaded = leave_out_unfitted(loaded, saved)
        else:
            loaded = leave_out_rare(loaded, retain, run.fit, run.data.batch_tokens)
        if export_model:
            check_writable(loaded.model, source)
        digests = weight_digests(loaded.model, "model")
        curvature = saved.of(loaded, digests["model_sha256"]) if saved is not None else None
        sets = {"forget": forget, "retain": retain, "held-out retain": held_out}
        say_sets(sets, (forget_examples, fit_examples, held_examples), run.data)
        folder.reads(input_digests(digests["model_sha256"], sets, saved))
        if saved is not None:
            saved.note_other_texts(retain)
        made_for = {
            "model_sha256": digests["model_sha256"],
            "retain_sha256": digest_sequences(retain),
            "config": result_settings(run)["fit"],
        }
        update = unlearn_model(
            loaded.model,
            forget=forget,
            retain=retain,
            held_out=held_out,
            fit=estimator,
            direction=direction,
            size=size,
            run=replace(
                settings,
                targets=loaded.targets,
                curvature=curvature,
                memory=room.memory,
                recompute=room.recompute,
                storage=room.storage,
                store=partial(_store, folder, made_for),
                start=_resume_from(folder),
                on_step=partial(_keep_step, folder, settings.steps),
            ),
        )
        update = Update(
            update.deltas,
            {
                **update.provenance,
                **digests,
                **update.edited_digest(loaded.model, room.storage),
                **(saved.facts() if saved is not None else {}),
                "model": run.model.model,
                **provenance(source),
                "config": asdict(run),
            },
        )
        folder.put("update.safetensors", update.save, update.read)
        routing = _routing(loaded, update, run, room.storage, forget, held_out)
        lost = update.lost_fraction(loaded.model)
        if export_model:
            with stage("export"), update.applied_to(loaded.model, room.storage) as edited:
                folder.put("model", lambda path: save_model(edited, loaded.tokenizer, path, source))
        figures = run_metrics(update, clock, forget, retain, held_out)
        metrics = {**figures, **routing, "lost_in_dtype": lost}
        manifest = {
            "kind": "unlearn",
            **{k: v for k, v in update.provenance.items() if k not in ("steps", "config")},
            "seed": run.seed,
            "git_sha": git_sha(),
            "config": {**asdict(run), **given},
        }
        folder.finish(manifest, metrics, write_config(run))
    return {"out": str(out), **metrics}


def _keep_step(folder: RunDir, total: int, update: Update) -> None:
    """Keep the update after a step, for a resumed run; log the step and print a line about it."""
    steps = update.provenance["steps"]
    folder.keep(f"update-{len(steps):03}.safetensors", update.save, update.read)
    folder.log("step", **{k: v for k, v in steps[-1].items() if k not in _UNLOGGED})
    progress.say(step_line(len(steps), total, steps[-1]))
    for number, record in enumerate(steps[-1]["corrections"], 1):
        progress.say(correction_line(number, record))


def _routing(
    loaded: Loaded,
    update: Update,
    run: RunConfig,
    storage: Storage,
    forget: Sequence[TokenSequence],
    held_out: Sequence[TokenSequence],
) -> dict[str, Any]:
    """``rerouted``: the share of positions that the update sends to other experts, on held-out
    retain data and on the forget set. Empty for a model without routed experts."""
    model = loaded.model
    if not expert_modules(model):
        return {}  # before any pass
    sampler = Sampler(model, loaded.targets, batch_tokens=run.data.batch_tokens, seed=run.seed)
    sets = {"held_out": sampler.all(held_out), "forget": sampler.draw(forget, MEASURED_SEQUENCES)}
    shares: dict[str, float] = {}
    with stage("check"):
        for name, batches in sets.items():
            edited = partial(update.applied_to, model, storage)
            share = rerouted_share(model, batches, edited)
            if share is None:
                return {}
            shares[name] = share
    progress.say(routing_line(**shares))
    return {"rerouted": shares}


def step_line(number: int, total: int, record: dict[str, Any]) -> str:
    """One line of text about a step, before its corrections."""
    loss, kl = record["forget_loss_after"], record["retain_kl"]
    if record["corrections"]:
        first = record["corrections"][0]
        loss, kl = first["forget_loss_before"], first["retain_kl_before"]
    refined = f", refined {record['refined']}" if record["refined"] else ""
    on = record.get("measured_on")  # records of older versions lack it
    data = f"; on {on['forget']} forget and {on['held_out']} held-out sequences" if on else ""
    if record.get("confirmed"):
        data += ", the result on all"
    return (
        f"step {number}/{total}: forget loss {record['forget_loss_before']:.3f} -> "
        f"{loss:.3f}, retain KL {kl:.2e} nats/token "
        f"(this step: predicted {record['predicted_kl']:.2e}, exact quadratic "
        f"{record['exact_kl']:.2e}, measured {record['measured_kl']:.2e}{refined}{data})"
    )


def correction_line(number: int, record: dict[str, Any]) -> str:
    """One line of text about a correction."""
    what = f"correction {number}" if record["accepted"] else f"correction {number}, dropped"
    return (
        f"{what}: forget loss {record['forget_loss_before']:.3f} -> "
        f"{record['forget_loss_after']:.3f}, retain KL {record['retain_kl_before']:.2e} -> "
        f"{record['retain_kl_after']:.2e} nats/token"
    )


def _store(
    folder: RunDir, made_for: dict[str, Any], model: nn.Module, targets: Sequence[Target]
) -> Store:
    """The store for the fit at the model's current weights, in the run's state.

    The stores of earlier fits are deleted.
    """
    digest = digest_weights(model, parameter_names(targets))
    place = folder.state / f"curvature-{digest[:16]}"
    if distributed.rank() == 0:
        for old in folder.state.glob("curvature-*"):
            if old != place:
                shutil.rmtree(old)
        place.mkdir(exist_ok=True)
    distributed.barrier()
    return Store(place, {"weights_sha256": digest, **made_for}, device=targets[0].device)


def _resume_from(folder: RunDir) -> Update | None:
    """The update after the last step of the interrupted run, if there is one."""
    done = sorted(folder.state.glob("update-*.safetensors"))
    if not done:
        return None
    with reading_kept(done[-1]):
        update = Update.load(done[-1])
    progress.say(f"resuming after step {len(update.provenance['steps'])}")
    return update


def run_metrics(
    update: Update,
    clock: Clock,
    forget: Sequence[TokenSequence],
    retain: Sequence[TokenSequence],
    held_out: Sequence[TokenSequence],
) -> dict[str, Any]:
    """The metrics of an update from :func:`kfade.unlearn`, as in ``metrics.json``."""
    steps = update.provenance["steps"]
    stages = ["load", "fit", "gradient", "step", "check"]
    if "refine" in clock.seconds:
        stages.insert(4, "refine")
    if "correct" in clock.seconds:
        stages.append("correct")
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


def _step_size(run: RunConfig) -> StepSize:
    """The step's size. If no size is set, a measured KL of ``DEFAULT_KL``."""
    until = until_of(run.size.until)
    kl = run.size.kl
    if run.size.alpha is None and kl is None and not until:
        kl = DEFAULT_KL
    return StepSize(run.size.alpha, kl, **until, max_kl=run.size.max_kl)


def _damping_of(run: RunConfig) -> Damping | None:
    """The damping of each layer; None if it is to be chosen."""
    absolute, relative = run.step.damping, run.step.relative_damping
    if absolute is not None and relative is not None:
        raise InputError("give --damping or --relative-damping, not both")
    if absolute is not None:
        return Damping(absolute, relative=False)
    return None if relative is None else Damping(relative)


def _correction_damping_of(run: RunConfig) -> Damping:
    """The damping of each layer in a correction."""
    value = run.correction.correct_damping
    check_damping("--correct-damping", value)
    return Damping(value)


def _direction_of(run: RunConfig) -> Direction:
    """The settings of each step's direction.

    Raises:
        InputError: an unknown objective, a number out of range, or conflicting settings.
    """
    return Direction(
        objective_of(run.step.objective),
        _later_objective_of(run),
        run.step.bound,
        run.step.weigh_texts,
        run.step.noise,
        run.step.at_prompts,
        _damping_of(run),
        run.step.bands,
        run.step.exact_norm,
        run.refinement.refine,
        run.refinement.refine_sequences,
        top_of(run.fit.experts),
    )


def _run_of(run: RunConfig) -> Run:
    """The settings of the steps, without those that need the model (targets, curvature)."""
    steps, correct = run.step.steps, run.correction.correct
    assert steps is not None, "the settings are decided"
    assert correct is not None, "the settings are decided"
    return Run(
        steps=steps,
        first_share=run.step.first_share,
        forget_batch=run.step.forget_batch,
        refit=run.step.refit,
        correction=Correction(
            correct,
            _correction_damping_of(run),
            run.correction.correct_sequences,
        ),
        batch_tokens=run.data.batch_tokens,
        recompute=run.fit.recompute,
        seed=run.seed,
    )


def _later_objective_of(run: RunConfig) -> Objective | None:
    """The objective of all steps after the first; None if it is that of the first step."""
    word = run.step.later_objective
    if word is not None and run.step.steps == 1:
        raise InputError(f"--later-objective {word} needs a second step: give --steps 2 or more")
    return objective_of(word, "--later-objective") if word is not None else None
