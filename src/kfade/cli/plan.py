"""``kfade plan``: what a fit and a step need in memory and time, from the configuration alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

import torch
import typer

from kfade.cli import options as o
from kfade.cli.plan_page import page
from kfade.cli.session import console, session, show
from kfade.curvature.estimators import Estimator
from kfade.curvature.factors import factor_bytes
from kfade.curvature.groups import group_by_input, group_targets
from kfade.data.sequences import packed_length
from kfade.errors import InputError
from kfade.models.layers import find_targets
from kfade.models.load import load_skeleton, model_window
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
from kfade.runs.words import bytes_of, estimator_of

DEVICE = "Device"

Tokens = Annotated[
    int | None,
    typer.Option(
        help="Retain tokens that the curvature is fitted on. [4000 x 512]",
        rich_help_panel=o.DATA,
        show_default=False,
    ),
]
ForgetTokens = Annotated[
    int | None,
    typer.Option(
        help="Forget tokens of one step. [2500 x 512]", rich_help_panel=o.DATA, show_default=False
    ),
]
Memory = Annotated[
    list[str] | None,
    typer.Option(
        help="What a device may hold, as in 24GB; repeat it, or 24GB,80GB, where they differ.",
        rich_help_panel=DEVICE,
    ),
]
Devices = Annotated[
    int | None,
    typer.Option(help="Number of devices. [one for each --memory]", rich_help_panel=DEVICE),
]
Shard = Annotated[
    bool,
    typer.Option(
        "--shard",
        help="Spread the weights of the model's blocks over the devices.",
        rich_help_panel=DEVICE,
    ),
]
StatedSpeed = Annotated[
    float | None,
    typer.Option(
        "--speed",
        help="TFLOP/s that large products in the model's dtype reach.",
        rich_help_panel=DEVICE,
    ),
]
Float32Speed = Annotated[
    float | None,
    typer.Option(help="The same in float32. [as --speed]", rich_help_panel=DEVICE),
]
Bandwidth = Annotated[
    float | None,
    typer.Option(help="GB/s of a device's memory. [unlimited]", rich_help_panel=DEVICE),
]
Measure = Annotated[
    bool,
    typer.Option(
        "--measure", help="Measure this machine's speed, in a few seconds.", rich_help_panel=DEVICE
    ),
]


def plan(
    model: o.Model,
    estimator: o.Estimator = None,
    layers: o.Layers = None,
    target: o.Target = None,
    joint_bias: o.JointBias = None,
    sequence_length: o.SequenceLength = None,
    batch_tokens: o.BatchTokens = None,
    recompute: o.Recompute = None,
    tokens: Tokens = None,
    forget_tokens: ForgetTokens = None,
    refine: o.Refine = None,
    refine_sequences: o.RefineSequences = None,
    dtype: o.Dtype = None,
    memory: Memory = None,
    devices: Devices = None,
    shard: Shard = False,
    speed: StatedSpeed = None,
    float32_speed: Float32Speed = None,
    bandwidth: Bandwidth = None,
    measure: Measure = False,
    trust_remote_code: o.TrustRemoteCode = None,
    revision: o.Revision = None,
    json: o.Json = False,
) -> None:
    """Say what unlearning with MODEL will need: bytes, groups of layers, flops, seconds.

    Only MODEL's configuration is read. With `--memory`, says in how many groups the layers are
    fitted and whether each stage fits; with `--speed` or `--measure`, how long each takes.
    """
    given: dict[str, Any] = {
        "estimator": None if estimator is None else estimator_of(estimator),
        "sequence_length": sequence_length,
        "batch_tokens": batch_tokens,
        "recompute": recompute,
        "retain_tokens": tokens,
        "forget_tokens": forget_tokens,
        "refine": refine,
        "refine_sequences": refine_sequences,
    }
    work = Work(**{name: value for name, value in given.items() if value is not None})
    machines = _machines(memory, devices)
    _check(work)
    rates = _stated_speed(speed, float32_speed, bandwidth, measure)
    with session():
        skeleton = load_skeleton(
            model, dtype=dtype, trust_remote_code=bool(trust_remote_code), revision=revision
        )
        length = packed_length(sequence_length, model_window(skeleton))
        work = replace(work, sequence_length=length)
        with on_shapes(skeleton):
            targets = find_targets(
                skeleton, layers=layers, pattern=target, joint_bias=bool(joint_bias)
            )
        shards = machines.count if shard else 1
        subject = examine(skeleton, targets, work, shards)
        if measure:
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            rates = measure_speed(device, targets[0].weight.dtype)
    parameters = sum(parameter.numel() for parameter in skeleton.parameters())
    result = _result(model, parameters, subject, work, machines, rates)
    show(result, json, [])
    if not json:
        for part in page(result):
            console.print(part)


@dataclass(frozen=True)
class _Machines:
    """The devices, all of which hold the model (or a part of it) and one group of layers."""

    count: int
    memory: int | None
    """Of the smallest."""


def _machines(memory: Sequence[str] | None, devices: int | None) -> _Machines:
    sizes = [bytes_of(size) for given in memory or () for size in given.split(",")]
    count = max(1, len(sizes)) if devices is None else devices
    if count < 1:
        raise InputError(f"--devices {devices}: give 1 or more")
    if len(sizes) > 1 and count != len(sizes):
        raise InputError(
            f"--devices {devices}, but {len(sizes)} sizes of --memory: give one size, or one for "
            "each device"
        )
    return _Machines(count, min(sizes, default=None))


def _check(work: Work) -> None:
    if work.sequence_length < 2 or work.batch_tokens < 1:
        raise InputError("--sequence-length must be 2 or more, --batch-tokens 1 or more")
    if work.retain_tokens < 1 or work.forget_tokens < 1:
        raise InputError("--tokens and --forget-tokens must be 1 or more")
    if work.refine < 0 or work.refine_sequences < 1:
        raise InputError("--refine must be 0 or more, --refine-sequences 1 or more")


def _stated_speed(
    products: float | None, float32: float | None, bandwidth: float | None, measure: bool
) -> Speed | None:
    """The speed that the options say."""
    given = {"--speed": products, "--float32-speed": float32, "--bandwidth": bandwidth}
    for option, value in given.items():
        if value is None:
            continue
        if measure:
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
