"""Plan: memory and time of a fit and a step, predicted from the model's configuration alone."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any

import torch

from kfade.curvature.estimators import Estimator
from kfade.curvature.factors import factor_bytes
from kfade.curvature.groups import group_by_input
from kfade.data.sequences import packed_length
from kfade.errors import InputError
from kfade.method.settings import DEFAULT_KL, Direction, at_least
from kfade.method.size import StepSize
from kfade.models.layers import find_targets
from kfade.models.lengths import model_window
from kfade.models.load import load_skeleton
from kfade.planning.arrange import Arranger, usable
from kfade.planning.cost import Speed, flops, measure_speed, seconds
from kfade.planning.memory import (
    RUNTIME_BYTES,
    Work,
    Workload,
    on_shapes,
    peaks,
)
from kfade.runs import options as o
from kfade.runs.choices import bytes_of, estimator_of, offload_of, quality_of
from kfade.runs.config import BatchConfig, EstimatorConfig, ModelSource
from kfade.runs.session import check_divides, selection
from kfade.runs.step_config import CorrectionAmount, RefinementConfig


@o.settings(o.DATA)
@dataclass(frozen=True, kw_only=True)
class AmountConfig(BatchConfig):
    """Amounts of data and sizes of batches."""

    tokens: int = Work.retain_tokens
    """Number of retain tokens for the fit; the default is 4000 sequences of 512."""
    forget_tokens: int = Work.forget_tokens
    """Number of forget tokens in one step; the default is 2500 sequences of 512."""
    steps: int | None = None
    """Number of Gauss-Newton steps by one fit. Unset: as kfade unlearn takes by default."""
    noise: float | None = None
    """Share of tokens that are replaced in copies of the forget texts, which double a gradient; 0
    is no copies, as with --alpha. Unset: as kfade unlearn takes by default of texts that are known
    by heart."""


@o.settings(o.DEVICE)
@dataclass(frozen=True, kw_only=True)
class DeviceConfig:
    """The devices: number, memory and speed."""

    memory: Annotated[list[str], o.REPEATED] = field(default_factory=list)
    """Memory of a device, as in 24GB. For several different devices, repeat the option or write
    24GB,80GB. Unset: no limit."""
    devices: int | None = None
    """Number of devices. Unset: one for each --memory."""
    shard: Annotated[bool, o.FLAG] = False
    """Shard the weights of the model's blocks over the devices."""
    offload: str | None = None
    """Where the gradient, the direction, the update and the weights that it replaces are kept:
    device, cpu (host memory), disk, or auto. Unset: auto, which means outside the device only as
    far as --memory makes it necessary."""
    speed: float | None = None
    """Speed of large matrix products in the model's dtype, in TFLOP/s. Unset: no times are
    estimated."""
    float32_speed: float | None = None
    """Speed of large matrix products in float32, in TFLOP/s. Unset: as --speed."""
    bandwidth: float | None = None
    """Bandwidth of a device's memory, in GB/s. Unset: unlimited."""
    measure: Annotated[bool, o.FLAG] = False
    """Measure the speed of this machine, which takes a few seconds, instead of --speed."""


@o.settings()
@dataclass(frozen=True)
class PlanRequest:
    """The model, the amounts of data, the method and the devices of a planned run."""

    model: ModelSource = field(default_factory=ModelSource)
    """The model."""
    data: AmountConfig = field(default_factory=AmountConfig, kw_only=True)
    """Amounts of data and sizes of batches."""
    fit: EstimatorConfig = field(default_factory=EstimatorConfig, kw_only=True)
    """The estimator, and the weights to change."""
    refinement: RefinementConfig = field(default_factory=RefinementConfig, kw_only=True)
    """Refinement of each direction."""
    correction: CorrectionAmount = field(default_factory=CorrectionAmount, kw_only=True)
    """Corrections after the last step."""
    device: DeviceConfig = field(default_factory=DeviceConfig, kw_only=True)
    """The devices."""

    @property
    def work(self) -> Work:
        """The settings that the cost depends on.

        Raises:
            InputError: the estimator is unknown, or a number is out of range.
        """
        estimator = estimator_of(self.fit.estimator)
        if (self.data.sequence_length or 2) < 2 or self.data.batch_tokens < 1:
            raise InputError("--sequence-length must be 2 or more, --batch-tokens 1 or more")
        if self.data.tokens < 1 or self.data.forget_tokens < 1:
            raise InputError("--tokens and --forget-tokens must be 1 or more")
        if self.refinement.refine < 0 or self.refinement.refine_sequences < 1:
            raise InputError("--refine must be 0 or more, --refine-sequences 1 or more")
        amount = quality_of("default").unless(self.data.steps, self.correction.correct)
        correct, sequences = amount.corrections, self.correction.correct_sequences
        at_least("--steps", amount.steps, 1)
        if correct < 0 or (sequences is not None and sequences < 1):
            raise InputError("--correct must be 0 or more, --correct-sequences 1 or more")
        # As of texts that are known by heart: others have no copies, and cost less.
        size, direction = StepSize(kl=DEFAULT_KL), Direction(noise=self.data.noise)
        spread = direction.decided(size, amount.steps, loss=0.0)
        length = self.data.sequence_length
        return Work(
            estimator=estimator,
            sequence_length=Work.sequence_length if length is None else length,
            batch_tokens=self.data.batch_tokens,
            recompute=self.fit.recompute,
            retain_tokens=self.data.tokens,
            forget_tokens=self.data.forget_tokens,
            refine=self.refinement.refine,
            refine_sequences=self.refinement.refine_sequences,
            steps=amount.steps,
            has_noise=bool(spread.noise),
            correct=correct,
            correct_sequences=sequences,
            offload=offload_of(self.device.offload) in ("cpu", "disk"),
        )


def plan(request: PlanRequest) -> dict[str, Any]:
    """Predict bytes by stage, groups of layers, flops and seconds of a run.

    Only the model's configuration is read.

    Raises:
        InputError: a setting is wrong, or the model cannot be planned.
    """
    work, source, fit = request.work, request.model, request.fit
    devices = _devices(request.device)
    rates = _stated_speed(request.device)
    skeleton = load_skeleton(
        source.required(),
        dtype=source.dtype,
        trust_remote_code=source.trust_remote_code,
        revision=source.revision,
    )
    length = packed_length(request.data.sequence_length, model_window(skeleton))
    work = replace(work, sequence_length=length)
    with on_shapes(skeleton):
        targets = find_targets(skeleton, **selection(fit))
    shards = devices.count if request.device.shard else 1
    check_divides(skeleton, targets, shards)
    arranger = Arranger(
        skeleton,
        targets,
        work,
        "unlearn",
        shards=shards,
        may_recompute=False,
        may_offload=offload_of(request.device.offload) is None,
    )
    if request.device.measure:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        rates = measure_speed(device, targets[0].dtype)
    parameters = sum(parameter.numel() for parameter in skeleton.parameters())
    return _result(source.model, parameters, arranger, devices, rates)


@dataclass(frozen=True)
class _Devices:
    """The devices. Each holds the model (or a shard of it) and one group of layers."""

    count: int
    memory: int | None
    """Bytes of the smallest device; None: no limit."""


def _devices(config: DeviceConfig) -> _Devices:
    sizes = [bytes_of(size) for given in config.memory for size in given.split(",")]
    count = max(1, len(sizes)) if config.devices is None else config.devices
    if count < 1:
        raise InputError(f"--devices {config.devices}: give 1 or more")
    if len(sizes) > 1 and count != len(sizes):
        raise InputError(
            f"--devices {config.devices}, but {len(sizes)} sizes of --memory: give one size, or "
            "one for each device"
        )
    return _Devices(count, min(sizes, default=None))


def _stated_speed(config: DeviceConfig) -> Speed | None:
    """The speed in the options; None if it is not given."""
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
            raise InputError(f"{option} has no effect without --speed: give both")
    if products is None:
        return None
    limit = {} if bandwidth is None else {"bandwidth": bandwidth * 1e9}
    return Speed(products * 1e12, (float32 or products) * 1e12, **limit)


def _result(
    name: str,
    parameters: int,
    arranger: Arranger,
    devices: _Devices,
    speed: Speed | None,
) -> dict[str, Any]:
    """The plan as JSON values."""
    plain, memory = arranger.at_once(), devices.memory
    way = plain if memory is None else arranger.within(memory) or arranger.least(memory)
    subject, work, groups = way.subject, way.work, way.groups
    one_group = [list(subject.targets)]
    planned = way.peak_bytes if groups else plain.peak_bytes
    advice = None
    if memory is not None and not way.fits(memory):
        found = replace(arranger, may_recompute=True, may_offload=True).within(memory)
        advice = found and found.options(memory)
    times = {}
    for count in sorted({1, devices.count}):
        if speed is None:
            break
        stages = seconds(subject, groups or one_group, work, speed, count)
        times[str(count)] = {**stages, "total": sum(stages.values())}
    smallest = group_by_input(subject.targets)
    least = peaks(subject, smallest, work, gradient_groups=smallest if work.offload else None)
    over = [stage for stage, peak in planned.items() if memory and peak > usable(subject, memory)]
    return {
        "model": name,
        "dtype": str(subject.targets[0].dtype).removeprefix("torch."),
        "work": {**asdict(work), "estimator": work.estimator.name},
        "batch": work.shape,
        "parameters": {"all": parameters, "targeted": subject.targeted},
        "weights": len(subject.targets),
        "bytes": _sizes(subject, work.estimator),
        "memory": memory,
        "offload": work.offload,
        "devices": devices.count,
        "shards": subject.shards,
        "groups": len(groups) if groups else None,
        "passes": len(groups or one_group) * len(work.estimator.passes),
        "peak_bytes": {
            "one_group": plain.peak_bytes,
            "planned": planned,
            "smallest_groups": least,
        },
        "over_memory": over,
        "problem": way.problem,
        "advice": advice,
        "flops": flops(subject, groups or one_group, work),
        "speed": {k: v for k, v in asdict(speed).items() if v < math.inf} if speed else None,
        "seconds": times,
    }


def _sizes(subject: Workload, estimator: Estimator) -> dict[str, int]:
    """Bytes of each object that a run holds at some time."""
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
        "activations": subject.cost.held_bytes[targets[0].tensor_of],
        "inputs": subject.input_bytes(targets),
        "head": subject.head_bytes("fit"),
        "runtime": RUNTIME_BYTES,
    }
