"""What a fit and a step need in memory and time, from a model's configuration alone."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any

import torch

from kfade.curvature.estimators import Estimator
from kfade.curvature.factors import factor_bytes
from kfade.curvature.groups import group_by_input, group_targets
from kfade.data.sequences import packed_length
from kfade.errors import InputError
from kfade.models.layers import find_targets
from kfade.models.lengths import model_window
from kfade.models.load import load_skeleton
from kfade.models.targets import Target
from kfade.planning.cost import Speed, flops, measure_speed, seconds
from kfade.planning.memory import (
    RUNTIME_BYTES,
    Work,
    Workload,
    examine,
    fit_overhead,
    on_shapes,
    peaks,
)
from kfade.runs import options as o
from kfade.runs.choices import bytes_of, estimator_of
from kfade.runs.config import BatchConfig, EstimatorConfig, ModelSource, RefinementConfig


@o.settings(o.DATA)
@dataclass(frozen=True, kw_only=True)
class AmountConfig(BatchConfig):
    """How much data."""

    tokens: int = Work.retain_tokens
    """Retain tokens that the curvature is fitted on. Unset: 4000 sequences of 512."""
    forget_tokens: int = Work.forget_tokens
    """Forget tokens of one step. Unset: 2500 sequences of 512."""


@o.settings(o.DEVICE)
@dataclass(frozen=True, kw_only=True)
class DeviceConfig:
    """On what."""

    memory: Annotated[list[str], o.REPEATED] = field(default_factory=list)
    """What a device may hold, as in 24GB. Repeat it, or write 24GB,80GB, where devices differ."""
    devices: int | None = None
    """Number of devices. Unset: one for each --memory."""
    shard: Annotated[bool, o.FLAG] = False
    """Spread the weights of the model's blocks over the devices."""
    speed: float | None = None
    """TFLOP/s that large products in the model's dtype reach."""
    float32_speed: float | None = None
    """The same in float32. Unset: as --speed."""
    bandwidth: float | None = None
    """GB/s of a device's memory. Unset: unlimited."""
    measure: Annotated[bool, o.FLAG] = False
    """Measure this machine's speed, in a few seconds."""


@o.settings()
@dataclass(frozen=True)
class PlanRequest:
    """What is to be unlearned with, and on what."""

    model: ModelSource = field(default_factory=ModelSource)
    """Which model."""
    data: AmountConfig = field(default_factory=AmountConfig, kw_only=True)
    """How much data."""
    fit: EstimatorConfig = field(default_factory=EstimatorConfig, kw_only=True)
    """Which curvature, of which weights."""
    refinement: RefinementConfig = field(default_factory=RefinementConfig, kw_only=True)
    """How each direction is improved."""
    device: DeviceConfig = field(default_factory=DeviceConfig, kw_only=True)
    """On what."""

    @property
    def work(self) -> Work:
        """Of what a run consists.

        Raises:
            InputError: a word that is no estimator, or a number that is out of range.
        """
        estimator = estimator_of(self.fit.estimator)
        if (self.data.sequence_length or 2) < 2 or self.data.batch_tokens < 1:
            raise InputError("--sequence-length must be 2 or more, --batch-tokens 1 or more")
        if self.data.tokens < 1 or self.data.forget_tokens < 1:
            raise InputError("--tokens and --forget-tokens must be 1 or more")
        if self.refinement.refine < 0 or self.refinement.refine_sequences < 1:
            raise InputError("--refine must be 0 or more, --refine-sequences 1 or more")
        length = self.data.sequence_length
        return Work(
            estimator=estimator,
            **({} if length is None else {"sequence_length": length}),
            batch_tokens=self.data.batch_tokens,
            recompute=self.fit.recompute,
            retain_tokens=self.data.tokens,
            forget_tokens=self.data.forget_tokens,
            refine=self.refinement.refine,
            refine_sequences=self.refinement.refine_sequences,
        )


def plan(request: PlanRequest) -> dict[str, Any]:
    """Bytes by stage, groups of layers, flops and seconds of a run; only the model's configuration
    is read.

    Raises:
        InputError: what is asked for cannot be done.
    """
    work, source, fit = request.work, request.model, request.fit
    machines = _machines(request.device)
    rates = _stated_speed(request.device)
    skeleton = load_skeleton(
        source.model,
        dtype=source.dtype,
        trust_remote_code=source.trust_remote_code,
        revision=source.revision,
    )
    length = packed_length(request.data.sequence_length, model_window(skeleton))
    work = replace(work, sequence_length=length)
    with on_shapes(skeleton):
        targets = find_targets(
            skeleton, layers=fit.layers, pattern=fit.target, joint_bias=fit.joint_bias
        )
    shards = machines.count if request.device.shard else 1
    subject = examine(skeleton, targets, work, shards)
    if request.device.measure:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        rates = measure_speed(device, targets[0].weight.dtype)
    parameters = sum(parameter.numel() for parameter in skeleton.parameters())
    return _result(source.model, parameters, subject, work, machines, rates)


@dataclass(frozen=True)
class _Machines:
    """The devices, all of which hold the model (or a part of it) and one group of layers."""

    count: int
    memory: int | None
    """Of the smallest."""


def _machines(config: DeviceConfig) -> _Machines:
    sizes = [bytes_of(size) for given in config.memory for size in given.split(",")]
    count = max(1, len(sizes)) if config.devices is None else config.devices
    if count < 1:
        raise InputError(f"--devices {config.devices}: give 1 or more")
    if len(sizes) > 1 and count != len(sizes):
        raise InputError(
            f"--devices {config.devices}, but {len(sizes)} sizes of --memory: give one size, or "
            "one for each device"
        )
    return _Machines(count, min(sizes, default=None))


def _stated_speed(config: DeviceConfig) -> Speed | None:
    """The speed that the options say."""
    products, float32, bandwidth = config.speed, config.float32_speed, config.bandwidth
    given = {"--speed": products, "--float32-speed": float32, "--bandwidth": bandwidth}
    for option, value in given.items():
        if value is None:
            continue
        if config.measure:
            raise InputError(f"give {option} or --measure, not both")
        if not (math.isfinite(value) and value > 0):
            raise InputError(f"{option} {value}: give a positive, finite number")
        if products is None:
            raise InputError(f"{option} says nothing without --speed: give both")
    if products is None:
        return None
    limit = {} if bandwidth is None else {"bandwidth": bandwidth * 1e9}
    return Speed(products * 1e12, (float32 or products) * 1e12, **limit)


def _result(
    name: str,
    parameters: int,
    subject: Workload,
    work: Work,
    machines: _Machines,
    speed: Speed | None,
) -> dict[str, Any]:
    """The plan as one JSON object."""
    whole = [list(subject.targets)]
    groups, problem = _groups(subject, work, machines)
    refine = work.refine > 0
    planned = peaks(subject, groups or whole, work.estimator, refine=refine)
    times = {}
    for count in sorted({1, machines.count}):
        if speed is None:
            break
        stages = seconds(subject, groups or whole, work, speed, count)
        times[str(count)] = {**stages, "total": sum(stages.values())}
    smallest = group_by_input(subject.targets)
    least = peaks(subject, smallest, work.estimator, refine=refine)
    over = [stage for stage, peak in planned.items() if machines.memory and peak > machines.memory]
    return {
        "model": name,
        "dtype": str(subject.targets[0].weight.dtype).removeprefix("torch."),
        "work": {**asdict(work), "estimator": work.estimator.name},
        "batch": work.shape,
        "parameters": {"all": parameters, "targeted": subject.targeted},
        "weights": len(subject.targets),
        "bytes": _sizes(subject, work.estimator),
        "memory": machines.memory,
        "devices": machines.count,
        "shards": subject.shards,
        "groups": len(groups) if groups else None,
        "passes": len(groups or whole) * len(work.estimator.passes),
        "peak_bytes": {
            "one_group": peaks(subject, whole, work.estimator, refine=refine),
            "planned": planned,
            "smallest_groups": least,
        },
        "over_memory": over,
        "problem": problem,
        "flops": flops(subject, groups or whole, work),
        "speed": {k: v for k, v in asdict(speed).items() if v < math.inf} if speed else None,
        "seconds": times,
    }


def _groups(
    subject: Workload, work: Work, machines: _Machines
) -> tuple[list[list[Target]] | None, str | None]:
    """Groups of layers that fit the smallest device; None and why, if there are none."""
    budget = None
    if machines.memory is not None:
        budget = machines.memory - fit_overhead(subject, work.estimator)
        if budget < 0:
            return None, (
                f"the model and a pass of {subject.cost.positions} positions are over it by "
                f"{-budget / 1e9:.3g} GB: lower --batch-tokens, or take fewer --layers"
            )
    try:
        return group_targets(
            subject.targets, work.estimator.peak_bytes, budget, subject.shards
        ), None
    except InputError as error:
        return None, str(error)


def _sizes(subject: Workload, estimator: Estimator) -> dict[str, int]:
    """Bytes of everything that a run holds at one time or another."""
    targets = subject.targets
    stored = estimator.stored_bytes(targets)
    factors = factor_bytes(targets) if estimator.has_eigenbases else 0
    return {
        "model": subject.model_bytes,
        "factors": factors,
        "bases": factors,
        "eigenvalues": stored - factors,
        "curvature": stored,
        "vector": subject.vector_bytes,
        "activations": subject.cost.held_bytes[targets[0].input_of],
        "inputs": subject.input_bytes(targets),
        "head": subject.head_bytes("fit"),
        "runtime": RUNTIME_BYTES,
    }
