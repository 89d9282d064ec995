"""Sweep: a grid of steps from one saved curvature, and the update of the best one, in a folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from kfade.curvature.curvature import Curvature
from kfade.curvature.vectors import FileVector, Storage, Vector, keep, on_device
from kfade.data.batches import Batch
from kfade.data.sequences import TokenSequence, digest_sequences
from kfade.method.gradient import forget_gradient
from kfade.method.grid import ALL, RULE, Outcome, Point, pareto, pick
from kfade.method.objectives import Objective
from kfade.method.settings import Correction, Direction, Run
from kfade.method.size import StepSize
from kfade.method.sweep import Shared, cut, targets_within
from kfade.method.sweep import sweep as sweep_model
from kfade.method.unlearn import unlearn
from kfade.method.update import Update
from kfade.models.load import provenance
from kfade.models.targets import Target
from kfade.models.weights import digest_weights, parameter_names, weight_digests
from kfade.runs.choices import estimator_of, objective_of
from kfade.runs.config import RunConfig, result_settings, write_config
from kfade.runs.evaluation import item_log
from kfade.runs.experts import leave_out_unfitted
from kfade.runs.inputs import SavedFit, input_digests
from kfade.runs.memory import Room, make_room
from kfade.runs.session import (
    Loaded,
    complete_data,
    load,
    read_retain,
    read_source,
    say_sets,
    source_of,
    to_tokens,
)
from kfade.runs.step_config import SizeConfig
from kfade.runs.sweep_config import SweepRequest
from kfade.runs.template import with_date
from kfade.runs.unlearning import run_metrics
from kfade.runtime import progress
from kfade.runtime.files import reading_kept
from kfade.runtime.provenance import git_sha, versions
from kfade.runtime.run_dir import RunDir
from kfade.runtime.stages import Clock, timing
from kfade.runtime.tensors import write_tensors

POINTS = "points.jsonl"


@dataclass(frozen=True)
class _Ready:
    """Everything that a sweep needs, read and checked."""

    points: Sequence[Point]
    run: RunConfig
    saved: SavedFit
    loaded: Loaded
    room: Room
    digests: dict[str, str]
    """Digests of all the model's weights."""
    curvature: Curvature
    objectives: dict[str, Objective]
    forget: list[TokenSequence]
    retain: list[TokenSequence]
    held_out: list[TokenSequence]


def sweep(request: SweepRequest, out: Path, *, resume: bool = False) -> dict[str, Any]:
    """Measure all points and write the update of the best one; returns the metrics.

    The best point has the highest forget loss of all points with a measured KL up to ``max_kl``.

    Raises:
        InputError: a setting or a file is wrong, or a resumed sweep has other settings than the
            interrupted one in ``out``.
    """
    points, max_kl, saved = request.points(), request.max_kl, SavedFit.read(request.curvature)
    run = request.run(saved.settings)
    run = replace(run, data=with_date(run.data, out, resume=resume))
    objectives = {name: objective_of(name) for name in {point.objective for point in points}}
    forget_examples = read_source(run.data.forget, "--forget")
    fit_examples, held_examples = read_retain(run.data, run.seed)
    asked = {
        **result_settings(run),
        "curvature": str(saved.path),
        "points": [point.id for point in points],
        "max_kl": max_kl,
    }
    clock = Clock()
    with timing(clock), RunDir(out, asked, resume=resume) as folder:
        loaded = leave_out_unfitted(load(run.model, run.fit), saved)
        run = replace(run, data=complete_data(run.data, loaded))
        asked = {**asked, "data": result_settings(run)["data"]}
        sets = (forget_examples, fit_examples, held_examples)
        tokens = [to_tokens(examples, loaded, run.data) for examples in sets]
        sets_by_name = dict(zip(("forget", "retain", "held-out retain"), tokens, strict=True))
        limited = replace(run, fit=replace(run.fit, memory=request.memory))
        room = make_room(limited, loaded, estimator_of(run.fit.estimator), "steps", folder)
        say_sets(sets_by_name, sets, run.data)
        digests = weight_digests(loaded.model, "model")
        curvature = saved.of(loaded, digests["model_sha256"])
        folder.reads(input_digests(digests["model_sha256"], sets_by_name, saved))
        ready = _Ready(points, run, saved, loaded, room, digests, curvature, objectives, *tokens)
        saved.note_other_texts(ready.retain)
        outcomes = _measure(ready, max_kl, folder)
        best = pick(outcomes, max_kl)
        metrics: dict[str, Any] = {"sweep": _aggregate(outcomes, max_kl)}
        manifest: dict[str, Any] = {"kind": "sweep", "versions": versions()}
        if best is not None:
            run = _settings(run, best)
            update = _update(ready, best, run)
            update.save(folder.part / "update.safetensors")
            metrics.update(run_metrics(update, clock, *tokens))
            metrics["lost_in_dtype"] = update.lost_fraction(loaded.model)
            provenance = {k: v for k, v in update.provenance.items() if k != "steps"}
            # The folder holds an update, so that evaluations read it as one of unlearn.
            manifest = {"kind": "unlearn", "made_by": "sweep", **provenance}
        metrics["seconds"] = {**metrics.get("seconds", clock.seconds), "total": clock.total}
        about = {"seed": run.seed, "git_sha": git_sha(), "config": asdict(run), "asked": asked}
        folder.publish(POINTS)
        folder.finish({**manifest, **about}, metrics, write_config(run))
    rows = {outcome.point.id: outcome.values for outcome in outcomes}
    return {"out": str(out), **metrics, "points": rows}


def _measure(ready: _Ready, max_kl: float, folder: RunDir) -> list[Outcome]:
    """Measure all points that the log does not have; each outcome is logged at once."""
    model, run, points = ready.loaded.model, ready.run, ready.points
    header = {
        "benchmark": "sweep",
        "model": run.model.model,
        "curvature": str(ready.saved.path),
        "weights_sha256": digest_weights(model, parameter_names(ready.loaded.targets)),
        "forget_sha256": digest_sequences(ready.forget),
        "held_out_sha256": digest_sequences(ready.held_out),
        "seed": run.seed,
    }
    label = {"method": "K-FADE", "estimator": ready.curvature.provenance.get("estimator")}
    path = folder.state / POINTS
    with item_log(path, header) as log:
        known = {point: log.items[point.id] for point in points if point.id in log.items}
        if known:
            progress.say(f"resuming after {len(known)} of {len(points)} points")

        def note(outcome: Outcome) -> None:
            log.add(outcome.point.id, **label, **outcome.values)
            progress.say(point_line(outcome.point.id, outcome.values))

        outcomes = sweep_model(
            model,
            points,
            Shared(
                ready.curvature,
                ready.loaded.targets,
                ready.objectives,
                forget_batch=run.step.forget_batch,
                refine_sequences=run.refinement.refine_sequences,
                batch_tokens=run.data.batch_tokens,
                recompute=ready.room.recompute,
                storage=ready.room.storage,
                seed=run.seed,
                gradient=_cached_gradient(folder, header),
                seconds=_fit_seconds(ready.saved.path),
            ),
            forget=ready.forget,
            held_out=ready.held_out,
            retain=ready.retain,
            done={point: _outcome(point, values) for point, values in known.items()},
            on_point=note,
        )
        log.finish(_aggregate(outcomes, max_kl))
    return outcomes


def _cached_gradient(folder: RunDir, header: Mapping[str, Any]) -> Callable[..., Vector]:
    """:func:`forget_gradient` with its results kept in the run's state, for a resumed run."""
    digest = f"{header['weights_sha256'][:16]}-{header['forget_sha256'][:16]}"

    def gradient(
        model: nn.Module,
        batches: Sequence[Batch],
        targets: Sequence[Target],
        objective: Objective,
        *,
        storage: Storage,
        **options: Any,
    ) -> Vector:
        name = f"gradient-{objective.__name__}-{digest}.safetensors"
        if (folder.state / name).is_file():
            with reading_kept(folder.state / name):
                kept = FileVector(folder.state / name)
                return keep(on_device(kept, targets[0].device), storage)
        found = forget_gradient(model, batches, targets, objective, storage=storage, **options)
        folder.keep(name, lambda path: write_tensors(path, found))
        return found

    return gradient


def _update(ready: _Ready, best: Outcome, run: RunConfig) -> Update:
    """Compute the update of the picked point with :func:`kfade.method.unlearn.unlearn`."""
    point = best.point
    targets = targets_within(ready.loaded.targets, point.layers)
    update = unlearn(
        ready.loaded.model,
        forget=ready.forget,
        retain=ready.retain,
        held_out=ready.held_out,
        direction=Direction(
            objective=ready.objectives[point.objective],
            damping=point.damping,
            refine=point.refine,
            refine_sequences=run.refinement.refine_sequences,
        ),
        size=StepSize(alpha=best.alpha),
        run=Run(
            targets=targets,
            curvature=cut(ready.curvature, targets),
            steps=1,
            correction=Correction(count=0),
            forget_batch=run.step.forget_batch,
            batch_tokens=run.data.batch_tokens,
            recompute=ready.room.recompute,
            storage=ready.room.storage,
            seed=run.seed,
        ),
    )
    about = {
        **ready.digests,
        **update.edited_digest(ready.loaded.model, ready.room.storage),
        **ready.saved.facts(),
        "model": run.model.model,
        **provenance(source_of(run.model)),
        "config": asdict(run),
    }
    return Update(update.deltas, {**update.provenance, **about})


def _settings(run: RunConfig, best: Outcome) -> RunConfig:
    """The settings with which ``kfade unlearn --curvature`` computes the picked point."""
    point, damping = best.point, best.point.damping
    layers = run.fit.layers if point.layers == ALL else point.layers
    step = replace(
        run.step,
        objective=point.objective,
        damping=None if damping.relative else damping.value,
        relative_damping=damping.value if damping.relative else None,
        exact_norm=False,
    )
    return replace(
        run,
        fit=replace(run.fit, layers=layers),
        step=step,
        refinement=replace(run.refinement, refine=point.refine),
        size=SizeConfig(alpha=best.alpha),
    ).decided


def _aggregate(outcomes: Sequence[Outcome], max_kl: float) -> dict[str, Any]:
    best = pick(outcomes, max_kl)
    return {
        "points": len(outcomes),
        "failed": sum(outcome.failure is not None for outcome in outcomes),
        "pareto": [outcome.point.id for outcome in pareto(outcomes)],
        "picked": best.point.id if best else None,
        "rule": RULE,
        "max_kl": max_kl,
    }


def _outcome(point: Point, values: Mapping[str, Any]) -> Outcome:
    """The outcome with these :attr:`Outcome.values`."""
    names = [one.name for one in fields(Outcome) if one.name in values]
    return Outcome(point, **{name: values[name] for name in names})


def _fit_seconds(folder: Path) -> float:
    """Seconds that the fit in ``folder`` took; 0 if they are not recorded."""
    path = folder / "metrics.json"
    return json.loads(path.read_text())["seconds"]["total"] if path.is_file() else 0.0


def point_line(name: str, values: Mapping[str, Any]) -> str:
    """One line of text about a point."""
    if "failure" in values:
        return f"{name}: {values['failure']}"
    return (
        f"{name}: forget loss {values['forget_loss']:.3f}, probability "
        f"{values['forget_probability']:.3f}, retain KL {values['retain_kl']:.2e} nats/token "
        f"(alpha {values['alpha']:.3g}, predicted {values['predicted_kl']:.2e})"
    )
