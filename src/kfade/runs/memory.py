"""The memory of a run: what it may hold, asked of the planner before any long work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kfade.curvature.estimators import Estimator
from kfade.curvature.vectors import InHostMemory, OnDevice, OnDisk, Storage
from kfade.errors import InputError
from kfade.models.experts import ExpertLayer, is_expert_layer
from kfade.models.load import load_skeleton
from kfade.models.targets import Target
from kfade.planning.arrange import Arrangement, Arranger, Kind
from kfade.planning.memory import Work, model_bytes
from kfade.planning.training import training_bytes
from kfade.runs.choices import bytes_of, offload_of
from kfade.runs.config import FitRequest, ModelConfig, RunConfig
from kfade.runs.session import Loaded
from kfade.runtime import distributed, progress
from kfade.runtime.run_dir import RunDir
from kfade.runtime.stages import free_bytes

AUTO = "auto"
SMALL = 0.01  # a model of less than this share of the free memory fits without a plan


@dataclass(frozen=True)
class Room:
    """What a run may hold in memory."""

    memory: int | None
    """Bytes of curvature that a fit may hold; None: no limit."""
    recompute: bool
    """Whether blocks run again in backward passes."""
    storage: Storage
    """Where gradient, direction, update and replaced weights are kept."""


def make_room(
    run: FitRequest, loaded: Loaded, estimator: Estimator, kind: Kind, folder: RunDir
) -> Room:
    """Arrange a run so that it fits ``--memory``, or check that it fits what is free.

    Without ``--memory`` the run stays as asked for. With ``--memory auto`` layers are fitted in
    groups, vectors are kept outside the device, and blocks run again in backward passes, as far as
    the free memory makes necessary; a resumed run repeats the choice.

    Raises:
        InputError: the run does not fit; names the options with which it would. An option is wrong.
    """
    limit = run.fit.memory
    word = offload_of(run.step.offload) if isinstance(run, RunConfig) else None
    device = loaded.targets[0].device
    if word == "cpu" and device.type == "cpu":
        raise InputError("--offload cpu: the model is on the CPU; give --offload disk")
    model, targets = loaded.model, loaded.targets
    if run.shard:  # passes through parts of weights cannot be traced
        model, targets = _skeleton(run, targets)
    arranger = Arranger(
        model,
        targets,
        _work(run, estimator, offload=word in ("cpu", "disk")),
        kind,
        refit=isinstance(run, RunConfig) and run.step.refits,
        shards=distributed.count() if run.shard else 1,
        device=device,
        may_recompute=limit == AUTO,
        may_offload=word is None,
    )
    if limit is None:
        _refuse_too_large(arranger, device)
        return Room(None, run.fit.recompute, _storage(word, folder.state, None))
    total = bytes_of(limit) if limit != AUTO else folder.settle("memory", lambda: _free(device))
    way = arranger.within(total)
    if way is None:
        raise InputError(f"--memory {limit}: {_too_little(arranger, total)}")
    if limit == AUTO:
        progress.say(f"memory: {total / 1e9:.4g} GB are free; as with {way.options(total)}")
    if way.work.offload and word is None:
        word = _place(way, device)
    return Room(way.budget, way.work.recompute, _storage(word, folder.state, way.vector_budget))


def refuse_untrainable(
    model: Any,
    config: ModelConfig,
    names: Sequence[str],
    shape: tuple[int, int],
    *,
    factors: int | None = None,
    shard: bool = False,
    advice: str,
) -> None:
    """Refuse to fine-tune a model where that does not fit the free memory of its device.

    Args:
        config: the configuration that ``model`` was loaded by.
        names: parameters that training changes.
        shape: (B, T) of the largest batch.
        factors: bytes of low-rank factors, see :func:`~kfade.planning.training.training_bytes`.
        advice: options that make it smaller.

    Raises:
        InputError: it does not fit.
    """
    device = next(model.parameters()).device
    free, shards = _free(device), distributed.count() if shard else 1
    if shard:  # passes through parts of weights cannot be traced
        model = _skeleton_of(config)
    if model_bytes(model, shards) < SMALL * free:
        return
    try:
        needed = training_bytes(model, names, shape, factors=factors, shards=shards)
    except InputError:  # it cannot be planned
        return
    if needed > free:
        raise InputError(
            f"{free / 1e9:.4g} GB are free on {device}, and training needs {needed / 1e9:.4g} GB: "
            f"{advice}"
        )


def _skeleton(run: FitRequest, targets: Sequence[Target]) -> tuple[Any, list[Target]]:
    """The run's model without weights, and the same targets in it."""
    model = _skeleton_of(run.model)
    maps = {
        f"{name}.{map_.name}": map_
        for name, module in model.named_modules()
        if is_expert_layer(module)
        for map_ in ExpertLayer(module).maps
    }

    def same(target: Target) -> Target:
        path = target.name.rpartition(".")[0]
        module = maps[target.name] if target.is_routed else model.get_submodule(path)
        return replace(target, module=module)

    return model, [same(target) for target in targets]


def _skeleton_of(config: ModelConfig) -> Any:
    """A configuration's model without weights."""
    return load_skeleton(
        config.required(),
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
        revision=config.revision,
    )


def _work(run: FitRequest, estimator: Estimator, *, offload: bool) -> Work:
    length = run.data.sequence_length
    assert length is not None, "complete_data sets the length"
    work = Work(
        estimator,
        sequence_length=length,
        batch_tokens=run.data.batch_tokens,
        recompute=run.fit.recompute,
        offload=offload,
    )
    if not isinstance(run, RunConfig):
        return work
    some, more = run.refinement, run.correction
    return replace(
        work,
        refine=some.refine,
        refine_sequences=some.refine_sequences,
        steps=run.step.steps or 1,
        chooses_at_prompts=run.step.at_prompts
        and run.step.damping is None
        and run.step.relative_damping is None,
        correct=more.correct or 0,
        correct_sequences=more.correct_sequences,
    )


def _refuse_too_large(arranger: Arranger, device: torch.device) -> None:
    """Raises InputError where a run that is not limited does not fit the free memory."""
    total = _free(device)
    stored = arranger.work.estimator.stored_bytes(arranger.targets)
    if model_bytes(arranger.model) + stored < SMALL * total:
        return
    try:
        way = arranger.at_once()
    except InputError:  # it cannot be planned
        return
    if not way.fits(total):
        problem = _too_little(arranger, total)
        raise InputError(f"{total / 1e9:.4g} GB are free on {device}: {problem}")


def _too_little(arranger: Arranger, total: int) -> str:
    """What a run needs that does not fit, and with what options it would."""
    freer = replace(arranger, may_recompute=True, may_offload=True)
    found = freer.within(total)
    if found is not None:
        return f"the run needs more; give {found.options(total)}"
    least = freer.least(total)
    need = least.peak_bytes[least.worst] / 1e9
    return (
        f"the run needs {need:.4g} GB at the least ({least.worst}): lower --batch-tokens, give "
        "fewer --layers, --dtype bfloat16, or --shard over several devices"
    )


def _place(way: Arrangement, device: torch.device) -> str:
    """Where vectors go: host memory if that is not the device's and has room, else disk."""
    vectors = max(3, 9 * bool(way.work.refine), 4 * bool(way.work.correct))
    needed = vectors * way.subject.vector_bytes + way.subject.replaced_bytes
    needed += way.subject.reference_bytes(way.work)
    if device.type == "cpu" or needed > _free(torch.device("cpu")):
        return "disk"
    return "cpu"


def _storage(word: str | None, folder: Path, memory: int | None) -> Storage:
    match word:
        case "cpu":
            return InHostMemory(memory)
        case "disk":
            return OnDisk(folder, memory)
    return OnDevice()


def _free(device: torch.device) -> int:
    """Bytes of ``device`` that each process may use, with those that it uses already: the same in
    all processes."""
    return -int(distributed.maximum(-free_bytes(device)))
