"""Settings of :func:`kfade.unlearn`: the direction of each step, and how a run is carried out.

The length of a step is :class:`~kfade.method.size.StepSize`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from kfade.curvature.curvature import Curvature
from kfade.curvature.damping import Damping
from kfade.curvature.store import Store
from kfade.curvature.vectors import OnDevice, Storage
from kfade.errors import InputError
from kfade.method.objectives import BoundedMargin, Objective, cross_entropy, margin
from kfade.method.size import StepSize
from kfade.method.update import Update
from kfade.models.targets import Target

DEFAULT_KL = 0.01  # nats per token: the default size
DEFAULT_BANDS = 3
DEFAULT_BOUND = 2.0  # times the mean forget loss
DEFAULT_NOISE = 0.25  # of the answers' tokens
KNOWN_LOSS = math.log(2)  # nats per token; texts below it are known by heart: odds are even there
FIRST_SHARE = 0.5  # of the way, in the first step, where texts are not known by heart
LEAST_RETAIN = 64  # sequences in a gradient that takes half of the retain set, at least


def at_least(flag: str, value: int, least: int) -> None:
    """Raises InputError where the option ``flag`` has a ``value`` below ``least``."""
    if value < least:
        raise InputError(f"{flag} {value}: give {least} or more")


@dataclass(frozen=True)
class Direction:
    """The direction of each step: (G̃ + λI)⁻¹g, scaled to unit length, and its refinement.

    Raises:
        InputError: a number out of its range.
    """

    objective: Objective = margin
    """Increases along the direction, on the forget set."""
    later_objective: Objective | None = None
    """Objective of all steps after the first; ``objective`` when None. The gradient of the
    cross-entropy is proportional to 1 − p_y: after a first step by the margin it leaves tokens
    alone that are still certain, which other text needs most."""
    bound: float | None = None
    """Lets go of a token whose margin is beyond so many times the mean loss of the forget texts
    before the step (:class:`~kfade.method.objectives.BoundedMargin`): without a bound a few tokens,
    those that cost no KL, are forgotten without end. Of the margin only; 0 is no bound. When None
    ``DEFAULT_BOUND`` in runs of several steps by the margin, but 0 where ``StepSize.alpha`` gives
    the length of the paper's steps, and where the forget texts have a mean loss of ``KNOWN_LOSS``
    or more before the run: the words that tell most of a text are the unlikely ones there, and a
    bound would let go of them."""
    weigh_texts: bool | None = None
    """Weigh the forget texts by their probability per token in all steps after the first, see
    :func:`~kfade.method.gradient.forget_gradient`: texts that are forgotten would pull on. When
    None yes, but not where ``StepSize.alpha`` gives the length of the paper's steps."""
    noise: float | None = None
    """Share of the answers' tokens that are replaced in a copy of each forget text, which the
    gradient takes beside the text (:func:`~kfade.data.noise.noisy`), so that a token is forgotten
    also where other words lead to it. With 0 there are no copies. When None ``DEFAULT_NOISE``, or 0
    without a bound: noise alone changed nothing in our experiment."""
    at_prompts: bool = False
    """Take the gradient at the positions before the first answer only, less the last one, which
    predicts it (:attr:`~kfade.data.sequences.TokenSequence.prompt`): a step then changes what a
    question brings to mind, and not how an answer goes on. Corrections take all positions."""
    damping: Damping | None = None
    """λ of each layer; when None, chosen on held-out retain data at the first step
    (:mod:`kfade.method.choose`)."""
    bands: int | None = None
    """Bands of layers, by depth, whose lengths in the direction are set by the exact curvature
    between them (:mod:`kfade.method.bands`); 1 leaves the direction as it is. When None
    ``DEFAULT_BANDS``, or 1 where ``StepSize.alpha`` gives the length of the paper's direction."""
    exact_norm: bool = False
    """Measure the length of a direction by the exact Gauss-Newton quadratic form on held-out retain
    data instead of by G̃."""
    refine: int = 0
    """Iterations of conjugate gradients that improve the direction
    (:class:`~kfade.method.refine.Directions`). A step is tried along the direction after each
    iteration; the one with the greatest rise of the forget loss for its KL is taken (the last one
    with ``StepSize.alpha``)."""
    refine_sequences: int = 64
    """Retain sequences in the exact products of each step, drawn without replacement; all of them
    if there are fewer."""
    top_experts: int | None = None
    """In each layer of a mixture, change only the experts that carry most of the forget gradient:
    those with the largest gᵀ(G̃ + λI)⁻¹g over their matrices. All when None."""

    def __post_init__(self) -> None:
        if self.bands is not None:
            at_least("--bands", self.bands, 1)
        if self.bound:
            if not (math.isfinite(self.bound) and self.bound > 0):
                raise InputError(f"--bound {self.bound}: give a positive, finite number, or 0")
            if not self.has_margin:
                raise InputError(
                    f"--bound {self.bound:g} is of the margin: give --bound 0, or use the margin"
                )
        if self.noise is not None and not 0 <= self.noise < 1:
            raise InputError(f"--noise {self.noise}: give a number from 0 to below 1")
        at_least("--refine", self.refine, 0)
        at_least("--refine-sequences", self.refine_sequences, 1)
        if self.top_experts is not None:
            at_least("--experts top:", self.top_experts, 1)
            if self.refine:
                raise InputError("--experts top:N does not work with --refine: leave one out")

    @property
    def has_margin(self) -> bool:
        """Whether the objective of some step is the margin."""
        return margin in (self.objective, self.later_objective)

    def decided(self, size: StepSize, steps: int, loss: float) -> Direction:
        """The same for a run of that size and so many steps: bound, noise, bands, and whether texts
        are weighed, are filled in where they were left out.

        Args:
            loss: mean loss of the forget texts before the run, in nats per token; of a draw of them
                where there are many (:mod:`kfade.method.gauges`).
        """
        is_papers = size.alpha is not None
        bound, noise, bands, weigh = self.bound, self.noise, self.bands, self.weigh_texts
        if bound is None:
            usual = self.has_margin and not is_papers and steps > 1
            bound = DEFAULT_BOUND if usual and loss < KNOWN_LOSS else 0.0
        if noise is None:
            noise = DEFAULT_NOISE if bound else 0.0
        if bands is None:
            bands = 1 if is_papers else DEFAULT_BANDS
        if weigh is None:
            weigh = not is_papers
        return replace(self, bound=bound, noise=noise, bands=bands, weigh_texts=weigh)

    def objective_of(self, step: int, loss: float) -> Objective:
        """The objective of a step, counted from 0.

        Args:
            loss: mean loss of the forget texts before the step, in nats per token.
        """
        objective = self.objective if step == 0 else self.later_objective or self.objective
        if objective is margin and self.bound:
            return BoundedMargin(self.bound * loss)
        return objective


@dataclass(frozen=True)
class Correction:
    """Corrections after the last step, see :mod:`kfade.method.correct`.

    Raises:
        InputError: a number out of its range.
    """

    count: int = 1
    """Number of them; the first one that is not accepted is the last."""
    damping: Damping = Damping(100.0)
    """λ of each layer in a correction. The gradient of the KL fits its own data; the more it is
    damped, the better a correction carries over to others."""
    sequences: int | None = None
    """Retain sequences in the gradient of the KL, drawn again for each correction; when None half
    of them, at least ``LEAST_RETAIN``."""
    objective: Objective = cross_entropy
    """Its mean over the forget set stays unchanged to first order."""
    least_gain: float = 0.01
    """Least relative decrease of the held-out KL, at equal forgetting, with which a correction is
    accepted."""

    def __post_init__(self) -> None:
        at_least("--correct", self.count, 0)
        if self.sequences is not None:
            at_least("--correct-sequences", self.sequences, 1)
        if not 0 <= self.least_gain < 1:
            raise InputError(f"least_gain {self.least_gain}: give a number from 0 to below 1")


@dataclass(frozen=True)
class Run:
    """How a run is carried out.

    Raises:
        InputError: ``steps`` is below 1.
    """

    targets: Sequence[Target] | None = None
    """Weights to change; every feed-forward weight when None."""
    curvature: Curvature | None = None
    """A finished fit to use for the first step (for all steps if not ``refit``)."""
    steps: int = 6
    """Number of Gauss-Newton steps."""
    first_share: float | None = None
    """Share of the way that the first of several steps goes; the others take equal parts of what is
    left. When None an equal part as well, but ``FIRST_SHARE`` where the forget texts have a mean
    loss of ``KNOWN_LOSS`` or more before the run. What the first gradient forgets carries over to
    other text about the same; later gradients more and more forget the texts themselves."""
    forget_batch: int | None = None
    """Forget sequences in each step, drawn without replacement; all when None. What a gradient of
    a part of the texts forgets of the others may be much less, on text that is not memorised."""
    refit: bool = False
    """Fit the curvature again at each step."""
    correction: Correction = Correction()
    """Corrections after the last step."""
    batch_tokens: int = 4096
    """Positions in one forward pass."""
    recompute: bool = False
    """Recompute activations of each block in backward passes instead of keeping them: the same
    result with less memory and more work."""
    memory: int | None = None
    """Bytes of curvature that a fit may hold at a time; it then takes the layers in groups."""
    storage: Storage = OnDevice()
    """Where the gradient, the direction, the update, and the weights that it replaces are kept."""
    store: Callable[[nn.Module, Sequence[Target]], Store] | None = None
    """(model at its present weights, targets) -> where their fit is kept on disk, finished or not;
    in memory when None."""
    seed: int = 0
    """Keys pseudo-labels and draws of sequences."""
    start: Update | None = None
    """The update after some steps of the same run, to continue from. Where the direction leaves out
    damping, bound or noise, they are as in those steps."""
    on_step: Callable[[Update], None] | None = None
    """Called with the update after every step, and once more if the run then ends before the next
    one."""

    def retain_drawn(self, count: int) -> int:
        """Retain sequences of ``count`` in the gradient of a correction."""
        return self.correction.sequences or max(LEAST_RETAIN, count // 2)

    @property
    def passes(self) -> dict[str, Any]:
        """The settings of a gradient and of an exact product."""
        return {"recompute": self.recompute, "storage": self.storage}

    def __post_init__(self) -> None:
        at_least("--steps", self.steps, 1)
        if self.first_share is not None and not 0 < self.first_share <= 1:
            raise InputError(f"--first-share {self.first_share}: give a number above 0, up to 1")

    def decided(self, loss: float) -> Run:
        """The same with ``first_share`` filled in where it was left out.

        Args:
            loss: as for :meth:`Direction.decided`.
        """
        if self.first_share is not None:
            return self
        equal = 1 / self.steps
        return replace(self, first_share=equal if loss < KNOWN_LOSS else max(FIRST_SHARE, equal))

    def share(self, step: int) -> float:
        """The share of the way that is left which a step, counted from 0, goes; of a run that is
        :meth:`decided`."""
        if step == 0 and self.steps > 1:
            assert self.first_share is not None, "the run is decided"
            return self.first_share
        return 1 / (self.steps - step)
