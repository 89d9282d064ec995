"""Arranges a run so that it fits a memory: layers in groups, vectors elsewhere, recomputation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from kfade.curvature.groups import group_by_input, group_targets
from kfade.curvature.jacobian import sum_bytes
from kfade.errors import InputError
from kfade.models.targets import Target
from kfade.planning.memory import Work, Workload, examine, overhead, peaks

Kind = Literal["fit", "unlearn", "steps"]
"""A fit; steps with fits of their own; steps from a finished curvature."""
USABLE = 0.95
"""Share of the memory beside the model that is planned for: allocators keep freed blocks and leave
holes."""
FIT_STAGES = ("covariance", "eigh", "lambda")


@dataclass(frozen=True)
class Arrangement:
    """A way to run, and the bytes that it takes."""

    work: Work
    """With ``recompute`` and ``offload`` as arranged."""
    subject: Workload
    groups: list[list[Target]] | None
    """Layers that are fitted together; None where even the smallest groups do not fit."""
    budget: int | None
    """Bytes of curvature that a fit may hold; None: no limit."""
    vector_budget: int | None
    """Bytes of a vector that a pass may sum, where vectors are kept elsewhere; None: no limit."""
    peak_bytes: dict[str, int]
    """Peak bytes of each stage; of the smallest groups where none fit."""
    problem: str | None = None
    """Why no groups fit."""

    @property
    def worst(self) -> str:
        """The stage that takes most."""
        return max(self.peak_bytes, key=lambda stage: self.peak_bytes[stage])

    def fits(self, total: int) -> bool:
        """Whether every stage stays within the usable part of ``total`` bytes."""
        return self.groups is not None and self.peak_bytes[self.worst] <= usable(
            self.subject, total
        )

    def options(self, total: int) -> str:
        """The options of the command line that make a run so."""
        words = [f"--memory {total / 1e9:.4g}GB"]
        words += ["--offload auto"] if self.work.offload else []
        words += ["--recompute"] if self.work.recompute else []
        return " ".join(words)


def usable(subject: Workload, total: int) -> int:
    """Bytes of ``total`` that may be planned for."""
    fixed = overhead(subject, ())
    return fixed + int(USABLE * (total - fixed))


@dataclass(frozen=True)
class Arranger:
    """The ways to run some work on a model; the first has the least cost in time."""

    model: Any
    """Its tensors may be fake; not sharded yet."""
    targets: Sequence[Target]
    work: Work
    """The settings that stay as they are."""
    kind: Kind
    refit: bool = False
    """Whether the curvature is fitted again after the first step."""
    shards: int = 1
    """Number of processes over which the weights of the blocks will be sharded."""
    device: torch.device | None = None
    """Device of the run. None: that of the model."""
    may_recompute: bool = True
    """Whether blocks may run again in backward passes though ``work`` does not say so."""
    may_offload: bool = True
    """Whether vectors may be kept outside the device though ``work`` does not say so."""
    traced: dict[Work, Workload] = field(default_factory=dict, repr=False, compare=False)
    """The traces so far; where vectors are kept makes no difference to them."""

    def at_once(self) -> Arrangement:
        """The run as asked for, all layers fitted together."""
        return self._way(self.work, None)

    def within(self, total: int) -> Arrangement | None:
        """The first way that fits ``total`` bytes; None if there is none."""
        ways = (self._way(work, total) for work in self._works())
        return next((way for way in ways if way.fits(total)), None)

    def least(self, total: int) -> Arrangement:
        """The way that takes the fewest bytes."""
        ways = [self._way(work, total) for work in self._works()]
        return min(ways, key=lambda way: way.peak_bytes[way.worst])

    def _works(self) -> list[Work]:
        recomputes = [False, True] if self.may_recompute else []
        offloads = [False, True] if self.may_offload and self.kind != "fit" else []
        return [
            replace(self.work, recompute=recompute, offload=offload)
            for recompute in recomputes or [self.work.recompute]
            for offload in offloads or [self.work.offload]
            if recompute >= self.work.recompute and offload >= self.work.offload
        ]

    def _way(self, work: Work, total: int | None) -> Arrangement:
        key = replace(work, offload=False)
        if key not in self.traced:
            self.traced[key] = examine(self.model, self.targets, key, self.shards, self.device)
        subject = self.traced[key]
        passes: tuple[str, ...] = () if self.kind == "steps" else work.estimator.passes
        if self.kind != "fit":
            passes = (*passes, "gradient")
        held = 0
        if self.refit and not work.offload:  # the update so far, and the weights that it replaces
            held = subject.vector_bytes + subject.replaced_bytes
        taken = overhead(subject, passes) + held
        budget = None if total is None else usable(subject, total) - taken
        # While one group is summed, a layer of the one before may be on its way elsewhere.
        sums_budget = None if budget is None else budget - subject.largest_bytes
        groups: list[list[Target]] | None = [list(self.targets)]
        sums, problem = groups, None
        try:
            if self.kind != "steps":
                bytes_of = work.estimator.peak_bytes
                groups = group_targets(self.targets, bytes_of, budget, self.shards)
            if work.offload:
                sums = group_targets(self.targets, sum_bytes, sums_budget, self.shards)
        except InputError as error:
            groups, problem = None, str(error)
        smallest = group_by_input(self.targets)
        found = peaks(subject, groups or smallest, work, gradient_groups=sums or smallest)
        stages = {
            "fit": ("load", *FIT_STAGES),
            "unlearn": tuple(found),
            "steps": tuple(stage for stage in found if stage not in FIT_STAGES),
        }[self.kind]
        own = {stage: found[stage] for stage in stages if stage in found}
        return Arrangement(work, subject, groups, budget, sums_budget, own, problem)
