"""What ``kfade sweep`` does between its options and its folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from kfade.curvature.curvature import Curvature, Matrices
from kfade.data.batches import Batch
from kfade.data.sequences import TokenSequence, digest_sequences
from kfade.evaluate.log import ItemLog
from kfade.method.gradient import forget_gradient
from kfade.method.grid import ALL, RULE, Outcome, Point, pareto, pick
from kfade.method.objectives import Objective
from kfade.method.settings import Direction, Run
from kfade.method.step import StepSize
from kfade.method.sweep import Shared, cut, targets_within
from kfade.method.sweep import sweep as sweep_model
from kfade.method.unlearn import unlearn
from kfade.method.update import Update
from kfade.models.layers import digest_weights, parameter_names, weight_digests
from kfade.models.load import provenance
from kfade.models.targets import Target
from kfade.runs.config import RunConfig, SizeConfig, deciding, write_config
from kfade.runs.inputs import SavedFit, inputs
from kfade.runs.session import (
    Loaded,
    load,
    read_retain,
    read_source,
    source_of,
    to_tokens,
    with_length,
)
from kfade.runs.template import as_used
from kfade.runs.unlearning import run_metrics
from kfade.runs.words import objective_of
from kfade.runtime import progress
from kfade.runtime.files import reading_kept, write_tensors
from kfade.runtime.provenance import git_sha, versions
from kfade.runtime.run_dir import RunDir
from kfade.runtime.stages import Clock, timing

POINTS = "points.jsonl"


@dataclass(frozen=True)
class Request:
    """What is asked for."""

    run: RunConfig
    """Model, data, and the settings of the fit."""
    points: Sequence[Point]
    saved: SavedFit
    """The curvature."""
    max_kl: float
    """A point is picked within this measured KL."""


@dataclass(frozen=True)
class _Ready:
    """What is asked for, read and checked."""

    request: Request
    loaded: Loaded
    digests: dict[str, str]
    """Of all weights."""
    curvature: Curvature
    objectives: dict[str, Objective]
    forget: list[TokenSequence]
    retain: list[TokenSequence]
    held_out: list[TokenSequence]


def sweep(request: Request, out: Path, *, resume: bool = False) -> dict[str, Any]:
    """From a request to its folder; returns what is told about it."""
    run, saved, max_kl = request.run, request.saved, request.max_kl
    objectives = {name: objective_of(name) for name in {p.objective for p in request.points}}
    forget_examples = read_source(run.data.forget, "--forget")
    fit_examples, held_examples = read_retain(run.data, run.seed)
    asked = {
        **deciding(run),
        "curvature": str(saved.path),
        "points": [point.id for point in request.points],
        "max_kl": max_kl,
    }
    clock = Clock()
    with timing(clock), RunDir(out, asked, resume=resume) as folder:
        loaded = load(run.model, run.fit)
        run = replace(run, data=as_used(with_length(run.data, loaded), loaded.tokenizer))
        request = replace(request, run=run)
        asked = {**asked, "data": deciding(run)["data"]}
        sets = (forget_examples, fit_examples, held_examples)
        tokens = [to_tokens(examples, loaded, run.data) for examples in sets]
        sets_by_name = dict(zip(("forget", "retain", "held-out retain"), tokens, strict=True))
        digests = weight_digests(loaded.model, "model")
        curvature = saved.of(loaded, digests["model_sha256"])
        folder.reads(inputs(digests["model_sha256"], sets_by_name, saved))
        ready = _Ready(request, loaded, digests, curvature, objectives, *tokens)
        saved.note_other_texts(ready.retain)
        outcomes = _measure(ready, folder)
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
            # Of the kind of the update that lies there: it is a run to whoever evaluates it.
            manifest = {"kind": "unlearn", "made_by": "sweep", **provenance}
        metrics["seconds"] = {**metrics.get("seconds", clock.seconds), "total": clock.total}
        about = {"seed": run.seed, "git_sha": git_sha(), "config": asdict(run), "asked": asked}
        folder.publish(POINTS)
        folder.finish({**manifest, **about}, metrics, write_config(run))
    rows = {outcome.point.id: outcome.values for outcome in outcomes}
    return {"out": str(out), **metrics, "points": rows}


def _measure(ready: _Ready, folder: RunDir) -> list[Outcome]:
    """All outcomes, each in the log as soon as it is there."""
    request, model = ready.request, ready.loaded.model
    run, points = request.run, request.points
    header = {
        "benchmark": "sweep",
        "model": run.model.model,
        "curvature": str(request.saved.path),
        "weights_sha256": digest_weights(model, parameter_names(ready.loaded.targets)),
        "forget_sha256": digest_sequences(ready.forget),
        "held_out_sha256": digest_sequences(ready.held_out),
        "seed": run.seed,
    }
    label = {"method": "K-FADE", "estimator": ready.curvature.provenance.get("estimator")}
    path = folder.state / POINTS
    with ItemLog(path, header) as log:
        known = {point: log.items[point.id] for point in points if point.id in log.items}
        if known:
            progress.say(f"resuming after {len(known)} of {len(points)} points")

        def note(outcome: Outcome) -> None:
            log.add(outcome.point.id, **label, **outcome.values)
            progress.say(point_line(outcome.point.id, outcome.values))

        try:
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
                    recompute=run.fit.recompute,
                    seed=run.seed,
                    gradient=_kept(folder, header),
                    seconds=_fit_seconds(request.saved.path),
                ),
                forget=ready.forget,
                held_out=ready.held_out,
                retain=ready.retain,
                done={point: _outcome(point, values) for point, values in known.items()},
                on_point=note,
            )
            log.finish(_aggregate(outcomes, request.max_kl))
        finally:
            if not log.items:  # nothing worth keeping
                path.unlink(missing_ok=True)
    return outcomes


def _kept(folder: RunDir, header: Mapping[str, Any]) -> Callable[..., Matrices]:
    """:func:`forget_gradient`, kept in the run's state: a resumed run need not repeat it."""
    digest = f"{header['weights_sha256'][:16]}-{header['forget_sha256'][:16]}"

    def kept(
        model: nn.Module,
        batches: Sequence[Batch],
        targets: Sequence[Target],
        objective: Objective,
        **options: Any,
    ) -> Matrices:
        name = f"gradient-{objective.__name__}-{digest}.safetensors"
        if (folder.state / name).is_file():
            with reading_kept(folder.state / name):
                return load_file(folder.state / name, str(targets[0].weight.device))
        matrices = forget_gradient(model, batches, targets, objective, **options)
        folder.keep(name, lambda path: write_tensors(path, matrices))
        return matrices

    return kept


def _update(ready: _Ready, best: Outcome, run: RunConfig) -> Update:
    """The picked point, made by the method itself."""
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
            relative=point.relative,
            refine=point.refine,
            refine_sequences=run.refinement.refine_sequences,
        ),
        size=StepSize(alpha=best.alpha),
        run=Run(
            targets=targets,
            curvature=cut(ready.curvature, targets),
            forget_batch=run.step.forget_batch,
            batch_tokens=run.data.batch_tokens,
            recompute=run.fit.recompute,
            seed=run.seed,
        ),
    )
    about = {
        **ready.digests,
        **update.edited_digest(ready.loaded.model),
        **ready.request.saved.facts(),
        "model": run.model.model,
        **provenance(source_of(run.model)),
        "config": asdict(run),
    }
    return Update(update.deltas, {**update.provenance, **about})


def _settings(run: RunConfig, best: Outcome) -> RunConfig:
    """With these ``kfade unlearn --curvature`` makes the picked point."""
    point = best.point
    layers = run.fit.layers if point.layers == ALL else point.layers
    step = replace(
        run.step,
        objective=point.objective,
        damping=None if point.relative else point.damping,
        relative_damping=point.damping if point.relative else None,
        exact_norm=False,
    )
    return replace(
        run,
        fit=replace(run.fit, layers=layers),
        step=step,
        refinement=replace(run.refinement, refine=point.refine),
        size=SizeConfig(alpha=best.alpha),
    )


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
    """What :attr:`Outcome.values` told."""
    own = [field.name for field in fields(Outcome) if field.name in values]
    return Outcome(point, **{name: values[name] for name in own})


def _fit_seconds(folder: Path) -> float:
    path = folder / "metrics.json"
    return json.loads(path.read_text())["seconds"]["total"] if path.is_file() else 0.0


def point_line(name: str, values: Mapping[str, Any]) -> str:
    """One point for a person."""
    if "failure" in values:
        return f"{name}: {values['failure']}"
    return (
        f"{name}: forget loss {values['forget_loss']:.3f}, probability "
        f"{values['forget_probability']:.3f}, retain KL {values['retain_kl']:.2e} nats/token "
        f"(alpha {values['alpha']:.3g}, predicted {values['predicted_kl']:.2e})"
    )
