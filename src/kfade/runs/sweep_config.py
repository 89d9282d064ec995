"""The settings of a sweep: a grid of steps from one saved curvature."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from kfade.curvature.damping import Damping
from kfade.errors import InputError
from kfade.method.grid import ALL, Point, grid
from kfade.method.size import StepSize
from kfade.runs import options as o
from kfade.runs.choices import OBJECTIVES
from kfade.runs.config import DataConfig, FitConfig, ModelConfig, RunConfig
from kfade.runs.step_config import RefinementConfig, StepConfig

DEFAULT_KLS = (0.001, 0.003, 0.01, 0.03)
DEFAULT_MAX_KL = 0.02  # twice DEFAULT_KL, the default size of unlearn


@o.settings(o.GRID)
@dataclass(frozen=True, kw_only=True)
class GridStep:
    """The directions of the points."""

    objective: Annotated[
        list[str],
        o.separated(str),
        Parameter(help=f"Forgetting objectives: {OBJECTIVES}, or several."),
    ] = field(default_factory=lambda: ["margin"])
    """Forgetting objectives."""
    damping: Annotated[list[float], o.separated(float)] = field(default_factory=list)
    """Absolute dampings λ, as in the paper. Unset: see --relative-damping."""
    relative_damping: Annotated[list[float], o.separated(float)] = field(default_factory=list)
    """Dampings λ as multiples of each layer's mean eigenvalue. If neither this nor --damping is
    set: 0.1."""
    forget_batch: Annotated[int | None, Parameter(group=o.STEP)] = None
    """Number of forget sequences in a step, drawn without replacement. Unset: all."""


@o.settings(o.GRID)
@dataclass(frozen=True, kw_only=True)
class GridRefinement:
    """Refinement of the directions of the points."""

    refine: Annotated[list[int], o.separated(int)] = field(default_factory=lambda: [0])
    """Numbers of conjugate-gradient iterations with exact Gauss-Newton products."""
    refine_sequences: Annotated[int, Parameter(group=o.STEP)] = 64
    """Number of retain sequences in each exact product of --refine."""


@o.settings(o.GRID)
@dataclass(frozen=True)
class SweepRequest:
    """A grid of steps from one saved curvature. Each combination of values is a point."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The model."""
    curvature: Annotated[Path, Parameter(group=o.FIT)] = field(kw_only=True)
    """Folder of a kfade fit, with the curvature that all points use."""
    data: DataConfig = field(default_factory=DataConfig, kw_only=True)
    """The data."""
    step: GridStep = field(default_factory=GridStep, kw_only=True)
    """The directions."""
    refinement: GridRefinement = field(default_factory=GridRefinement, kw_only=True)
    """Refinement of the directions."""
    layers: Annotated[list[str], o.separated(str, by=";")] = field(
        default_factory=lambda: [ALL], kw_only=True
    )
    """Transformer blocks to change, counted from 0; alternatives are separated by semicolons, as in
    '0-5;6-11;all'."""
    alpha: Annotated[list[float], o.separated(float)] = field(default_factory=list, kw_only=True)
    """G-norms α of the step; each predicts a KL of ½α² nats per token."""
    kl: Annotated[list[float], o.separated(float)] = field(default_factory=list, kw_only=True)
    """Measured KLs on held-out retain data, in nats per token. If neither this nor --alpha is set:
    0.001,0.003,0.01,0.03."""
    max_kl: Annotated[float, Parameter(group=o.RUN)] = field(default=DEFAULT_MAX_KL, kw_only=True)
    """Upper limit of the measured KL, in nats per token, for the point that is picked."""
    recompute: Annotated[bool, Parameter(group=o.RUN)] = field(default=False, kw_only=True)
    """Recompute the activations of each block in the backward pass instead of keeping them: less
    memory, more computation, the same result."""
    memory: Annotated[str | None, Parameter(group=o.RUN)] = field(default=None, kw_only=True)
    """Memory of a device that may be used, as in 20GB, or auto for what is free. Unset: no
    limit."""
    offload: Annotated[str | None, Parameter(group=o.RUN)] = field(default=None, kw_only=True)
    """Where gradients, directions and the weights that an edit replaces are kept: device, cpu (host
    memory), disk, or auto. Unset: auto, which means outside the device only as far as --memory
    makes it necessary."""
    seed: Annotated[int, Parameter(group=o.RUN)] = field(default=0, kw_only=True)
    """Random seed of the pseudo-labels, the order of forget batches and the held-out split."""

    def points(self) -> list[Point]:
        """The points of the grid.

        Raises:
            InputError: two kinds of damping, two kinds of size, or a value out of range.
        """
        step = self.step
        if step.damping and step.relative_damping:
            raise InputError("give --damping or --relative-damping, not both")
        if self.alpha and self.kl:
            raise InputError("give --alpha or --kl, not both")
        if not self.max_kl > 0:
            raise InputError(f"--max-kl {self.max_kl}: give a positive number")
        return grid(
            step.objective,
            self.layers,
            [Damping(value, relative=False) for value in step.damping]
            or [Damping(value) for value in step.relative_damping]
            or [Damping()],
            [StepSize(alpha=value) for value in self.alpha]
            or [StepSize(kl=value) for value in self.kl or DEFAULT_KLS],
            refine=self.refinement.refine,
        )

    def run(self, fitted: FitConfig) -> RunConfig:
        """The settings that all points share, as a run's configuration without a point's blocks."""
        return RunConfig(
            self.model,
            data=self.data,
            fit=replace(fitted, recompute=self.recompute),
            step=StepConfig(
                quality="fast",  # a point is one step
                forget_batch=self.step.forget_batch,
                offload=self.offload,
            ),
            refinement=RefinementConfig(refine_sequences=self.refinement.refine_sequences),
            seed=self.seed,
        )
