"""Flops and seconds of each stage of unlearning, predicted before the run.

A multiplication and an addition count as two flops.

Shapes: O outputs, I inputs of a layer, D hidden width, V vocabulary, T positions of a sequence.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from kfade.curvature.estimators import Estimator
from kfade.curvature.factors import PANEL, factor_bytes, rows_first, widths
from kfade.curvature.groups import assign_to_processes
from kfade.models.targets import Target
from kfade.planning.memory import Work, Workload
from kfade.runtime.distributed import assign_by_cost

HELD_OUT, MEASURED, TRIALS = 64, 256, 2
"""In the search for a step's size: held-out sequences, forget sequences, trials."""
PART = 4
"""The trials of steps before the last are measured on one in so many of these sequences."""
DAMPINGS = 3
"""Dampings that are tried at the first step."""
BANDS = 3
"""Bands of layers in a direction, each with a pass of its own in the exact quadratic form."""
LENGTHS = 4
"""Trials of a correction's length, and of the size after it."""
EIGH_FLOPS = 12
"""Flops of an eigendecomposition of width d, divided by d³. Measured as the time of LAPACK's
``syevd`` in float32 times the speed of matrix products (0.22 s for d = 1536, 0.014 s for d = 576 at
190 GFLOP/s)."""
EIGH_LIMIT = 2e12
"""Upper limit of the FLOP/s of an eigendecomposition. Half of it is bound by memory bandwidth, and
GPU solvers reach less than 3 % of the peak of an H100 (Wang et al., "Extracting the potential of
emerging hardware accelerators for symmetric eigenvalue decomposition")."""
EFFICIENCY = {"forward": 0.78, "backward": 0.93, "head": 0.84, "products": 0.93}
"""Speed of each kind of work divided by the speed of large matrix products, measured with
SmolLM2-135M in float32 on two cores. It includes the time of other operations (norms, activations,
label draws). The flops of causal attention include its masked half."""


@dataclass(frozen=True)
class Speed:
    """The speed of a device, in FLOP/s and bytes/s."""

    products: float
    """FLOP/s of large matrix products in the model's dtype."""
    float32: float
    """The same in float32, for the forget gradient, the step and decompositions."""
    bandwidth: float = math.inf
    """Bandwidth of the device's memory, which limits the squares of Λ."""
    link: float = 10e9
    """Bandwidth to and from another device."""


def measure_speed(device: torch.device, dtype: torch.dtype) -> Speed:
    """The speed of ``device``, measured for a few seconds with products and squares."""
    rates = {kind: _product_rate(device, kind) for kind in {dtype, torch.float32}}
    entries = 2**25  # too many for a cache
    sum_, product = torch.zeros(entries, device=device), torch.ones(entries, device=device)
    squares = _typical(lambda: sum_.addcmul_(product, product), device)
    return Speed(rates[dtype], rates[torch.float32], 12 * entries / squares)


def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a product of square matrices that takes at least 0.05 s, or has width 16384.

    Of random numbers: on constant ones a GPU draws less power and is faster.
    """
    size = 1024
    while True:
        left = torch.randn(size, size, dtype=dtype, device=device)
        taken = _typical(lambda: left @ left, device)  # noqa: B023
        if taken > 0.05 or size >= 16384:
            return 2 * size**3 / taken
        size *= 2


def _typical(work: Callable[[], object], device: torch.device) -> float:
    """Median seconds of one call, of at least four calls and at least two seconds of calls.

    The fastest call would be misleading: a shared machine does not sustain its speed.
    """
    taken: list[float] = []
    while len(taken) < 4 or sum(taken) < 2:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def symmetric_flops(width: int) -> int:
    """Flops per row of Σ rowᵀ row: only the lower triangle, in panels of ``PANEL`` columns."""
    starts = range(0, width, PANEL)
    return sum(2 * (width - start) * min(PANEL, width - start) for start in starts)


def _whole(target: Target) -> float:
    return 1.0


def lambda_flops(
    group: Sequence[Target], work: Work, share: Callable[[Target], float] = _whole
) -> tuple[float, float]:
    """(flops of products, flops of squares) of Λ over the retain tokens.

    Λ = Σ_sequences (Q_Oᵀ (Σ_t g_t a_tᵀ) Q_I)∘². For each sequence, each side (of width D = O or I)
    is rotated either in its rows (2·T·D², once for all targets with the same input) or in the
    product (2·O·I·D), as ``rows_first`` decides. The product costs 2·T·O·I, and its squares 2·O·I.

    Args:
        share: of the positions that a target reads. T counts those of a sequence that has any.
    """
    readers = Counter(target.tensor_of for target in group)
    sequences = work.retain_tokens / work.sequence_length
    rotated: dict[str, bool] = {}
    products = squares = 0.0
    for target in group:
        outputs, inputs = target.shape
        rows = work.length * share(target)
        length = max(1.0, rows)
        own = 0.0
        if work.estimator.has_eigenbases:
            first = target.tensor_of not in rotated
            if first:
                by_rows = rows_first(length, outputs, readers[target.tensor_of])
                rotated[target.tensor_of] = by_rows
            if not rotated[target.tensor_of]:
                own += 2 * outputs * inputs * inputs
            elif first:
                own += 2 * length * inputs**2
            by_rows = rows_first(length, inputs)
            own += 2 * (length if by_rows else inputs) * outputs**2
        own += 2 * outputs * inputs * length
        with_rows = rows / length  # share of the sequences
        products += own * with_rows
        squares += 2 * outputs * inputs * with_rows
    return products * sequences, squares * sequences


def flops(
    subject: Workload, groups: Sequence[Sequence[Target]], work: Work
) -> dict[str, dict[str, float]]:
    """Flops of each stage of a run by one fit, by kind of work.

    Kinds: forward (with blocks that run again), backward (activation gradients, down to a group's
    lowest target), head (2·D·V per token forward, as much backward), products (in the model's
    dtype), float32 (products in float32), squares, decompositions, rotations (of the direction).

    An expert counts by the rows that it reads. Each group of layers has its own passes. An exact
    quadratic form costs three forward passes over the held-out tokens, and for bands of layers as
    much for each, less the layers below it. Each trial of a step's size costs a forward pass over
    them and one over the measured forget sequences, as does the slope of each band in all steps but
    the first. Copies with noise double the forget gradient. Steps before the last do all this on a
    part of the data, and so does the choice of the damping; what a step begins with is measured on
    all. A refined direction has its own trials,
    and an exact product with the Gauss-Newton matrix costs four forward passes and a backward pass.
    A correction costs a gradient on the forget set, one on retain data with a forward pass of the
    original model more, one on held-out data, two directions, and the measurements of one step.
    """
    tally = _Tally(subject)
    add, one_pass, forward, head = tally.add, tally.one_pass, tally.forward, tally.head
    retain, forget = work.positions(work.retain_tokens), work.positions(work.forget_tokens)
    measured = min(float(MEASURED * work.length), forget)
    passes = work.estimator.passes
    for group in groups:
        if "covariance" in passes:
            one_pass("covariance", group, retain)
            add("covariance", products=retain * _by_rows(subject, group, symmetric_flops))
            add("eigh", decompositions=sum(_decompositions(group)))
        if "lambda" in passes:
            one_pass("lambda", group, retain)
            products, squares = lambda_flops(group, work, subject.share)
            add("lambda", products=products, squares=squares)
    with_copies = forget * (1 + work.has_noise)
    one_pass("gradient", subject.targets, with_copies)
    outer = tally.outer
    add("gradient", float32=outer * with_copies)
    per_solve = 4 if work.estimator.has_eigenbases else 0
    rotations = sum(per_solve * o * i * (o + i) for o, i in (t.shape for t in subject.targets))
    held_out = float(HELD_OUT * work.length)
    directions = work.refine + 1
    # In whole sets of what is measured: each step's trials, and what they begin with.
    way = (work.steps - 1) / PART
    trials = TRIALS * directions * (way + 1)
    begins = work.steps + way  # each step's on all, and those before the last on a part, too
    for bands, exact in (
        (BANDS, held_out * directions * (way + 1)),
        (1, held_out * DAMPINGS / (PART if work.steps > 1 else 1)),
    ):
        add("step", forward=(2 * bands + 1) * forward * exact, head=(bands + 1) * head * exact)
    slopes = BANDS * way * measured  # of bands, measured in all steps but the first
    add("step", forward=forward * slopes, head=head * slopes)
    add("step", rotations=(work.steps + DAMPINGS) * rotations)
    tokens = (begins + trials) * (held_out + measured)
    edited = begins - 1 - (1 / PART if work.steps > 1 else 0)  # the first beginnings have no KL
    twice = (edited + trials) * held_out  # the original model's logits, too
    add("check", forward=forward * tokens, head=head * (tokens + twice))
    if work.refine:
        sequences = min(work.refine_sequences, work.retain_tokens / work.sequence_length)
        positions = directions * sequences * work.length
        one_pass("refine", subject.targets, positions)
        add("refine", forward=3 * forward * positions, head=2 * head * positions)
        add("refine", float32=outer * positions)
        add("refine", rotations=1.5 * work.refine * rotations)  # one solve and one norm
    for stage in ("gradient", "refine"):
        tally.repeat(stage, work.steps)
    if work.correct:
        _add_corrections(tally, work, held_out + measured, rotations)
    return tally.found


@dataclass
class _Tally:
    """Flops by stage and by kind of work."""

    subject: Workload
    found: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def forward(self) -> float:
        """Flops of a forward pass per position."""
        return self.subject.cost.forward_flops / self.subject.cost.positions

    @property
    def head(self) -> float:
        """Flops of the head per position."""
        vocabulary, width = self.subject.head
        return 2.0 * vocabulary * width

    @property
    def outer(self) -> float:
        """Flops of a gradient's sums per position."""
        targets = self.subject.targets
        return 2 * sum(self.subject.share(t) * t.shape[0] * t.shape[1] for t in targets)

    def add(self, stage: str, **kinds: float) -> None:
        """Add flops of some kinds to a stage."""
        row = self.found.setdefault(stage, {})
        for kind, amount in kinds.items():
            row[kind] = row.get(kind, 0.0) + amount

    def repeat(self, stage: str, times: int) -> None:
        """Multiply the flops of a stage, if there are any."""
        for kind in self.found.get(stage, {}):
            self.found[stage][kind] *= times

    def one_pass(self, stage: str, group: Sequence[Target], positions: float) -> None:
        """Add a forward and a backward pass down to the lowest target of ``group``."""
        cost = self.subject.cost
        backward = cost.backward_flops[group[0].tensor_of] / cost.positions
        repeated = cost.repeated_flops[group[0].tensor_of] / cost.positions
        self.add(
            stage,
            forward=(self.forward + repeated) * positions,
            backward=backward * positions,
            head=2 * self.head * positions,
        )


def _add_corrections(tally: _Tally, work: Work, tried: float, rotations: float) -> None:
    """Add the corrections after the last step.

    Args:
        tried: positions of a trial, on held-out and on forget sequences.
        rotations: flops of one direction.
    """
    held_out, retain = float(HELD_OUT * work.length), work.correct_positions
    for _ in range(work.correct):
        for positions in (work.positions(work.forget_tokens), retain, held_out):
            tally.one_pass("correct", tally.subject.targets, positions)
            tally.add("correct", float32=tally.outer * positions)
        # The original model's outputs, the exact quadratic form, and the trials.
        forward = retain + 3 * held_out + LENGTHS * tried
        heads = retain + 2 * held_out + LENGTHS * (tried + held_out)
        tally.add("correct", forward=tally.forward * forward, head=tally.head * heads)
        tally.add("correct", rotations=2 * rotations)


def seconds(
    subject: Workload,
    groups: Sequence[Sequence[Target]],
    work: Work,
    speed: Speed,
    devices: int = 1,
) -> dict[str, float]:
    """Seconds of each stage of a run by one fit on ``devices`` devices.

    Data are split evenly. Decompositions are assigned by cost, and the slowest device counts. Every
    device computes the complete direction. "exchange" is the communication between devices.
    """
    rates = {kind: share * speed.products for kind, share in EFFICIENCY.items()}
    rates["float32"] = rates["rotations"] = EFFICIENCY["products"] * speed.float32
    rates["decompositions"] = min(speed.float32, EIGH_LIMIT)
    rates["squares"] = speed.bandwidth / 6  # 12 bytes moved for 2 flops
    found = {}
    for stage, kinds in flops(subject, groups, work).items():
        taken = {kind: amount / rates[kind] for kind, amount in kinds.items()}
        alone = taken.pop("rotations", 0.0)
        found[stage] = alone + sum(taken.values()) / devices
    if devices == 1:
        return found
    if "eigh" in found:
        slowest = sum(_slowest(subject, group, work.estimator, devices) for group in groups)
        found["eigh"] = slowest / rates["decompositions"]
    found["exchange"] = exchanged_bytes(subject, work) / speed.link
    return found


def exchanged_bytes(subject: Workload, work: Work) -> int:
    """Bytes that each of several devices sends in a run by one fit.

    A factor goes to the device that decomposes it, and its eigenbasis is sent back. Λ and the
    gradient are summed over all devices, which sends twice their size. If layers are sharded, the
    inputs and gradients of every token are sent in each pass instead of factors, bases and Λ,
    unless the device that owns the layer has computed them.
    """
    vector = subject.size * subject.targeted
    gradients = work.steps + 3 * work.correct
    if subject.shards > 1:
        row = subject.targets[0].dtype.itemsize * _by_rows(subject, subject.targets, lambda d: d)
        passes = len(work.estimator.passes) * work.positions(work.retain_tokens) / subject.shards
        return round(passes * row * (1 - 1 / subject.shards)) + 2 * gradients * vector
    factors = factor_bytes(subject.targets) if work.estimator.has_eigenbases else 0
    grids = vector if "lambda" in work.estimator.passes else 0
    return 2 * factors + 2 * grids + 2 * gradients * vector


def _slowest(
    subject: Workload, group: Sequence[Target], estimator: Estimator, devices: int
) -> float:
    """Flops of the decompositions on the device with the most of them."""
    if subject.shards > 1:
        shares = assign_to_processes(group, estimator.peak_bytes, devices)
        return max(sum(_decompositions(own)) for own in shares)
    costs = _decompositions(group)
    load = [0.0] * devices
    for owner, cost in zip(assign_by_cost(costs, devices), costs, strict=True):
        load[owner] += cost
    return max(load)


def _by_rows(subject: Workload, group: Sequence[Target], amount: Callable[[int], int]) -> float:
    """Σ over the factors of ``group`` of ``amount(width)``, each times its rows per position."""
    inputs = {target.tensor_of: target for target in group}.values()
    of_a = sum(subject.share(target) * amount(target.shape[1]) for target in inputs)
    return of_a + sum(subject.share(target) * amount(target.shape[0]) for target in group)


def _decompositions(group: Sequence[Target]) -> list[float]:
    """Flops of each eigendecomposition of a group."""
    return [EIGH_FLOPS * float(d) ** 3 for d in widths(group)]
