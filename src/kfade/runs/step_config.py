"""The settings of a run's steps: direction, refinement, corrections and size; see ``config``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from cyclopts import Parameter

from kfade.runs import choices
from kfade.runs import options as o


@o.settings(o.STEP)
@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """The direction of each step."""

    quality: Annotated[
        str | None,
        Parameter(
            help=f"Work that a run spends on a lower KL: {choices.QUALITIES}. Unset: default; "
            "with --alpha, fast."
        ),
    ] = None
    """Work that a run spends on a lower KL."""
    objective: Annotated[str, Parameter(help=f"Forgetting objective: {choices.OBJECTIVES}.")] = (
        "margin"
    )
    """Forgetting objective."""
    later_objective: str | None = None
    """Objective of all steps after the first, for example ce when the first step of the margin has
    made the text unlikely. Unset: as --objective."""
    bound: float | None = None
    """Let go of a token whose margin is beyond so many times the mean forget loss before the step,
    so that forgetting spreads over more of a text; 0 is no bound. Only with the margin. Unset: 2 in
    runs of several steps by the margin; 0 with --alpha, and where the forget texts are not known by
    heart (a mean loss of ln 2 or more)."""
    weigh_texts: Annotated[bool | None, Parameter(negative="--no-weigh-texts")] = None
    """Weigh the forget texts by their probability in all steps after the first, so that texts that
    are forgotten pull no longer. Unset: yes; with --alpha, no."""
    noise: float | None = None
    """Share of the answers' tokens that are replaced at random in a copy of each forget text. The
    gradient takes the copies, too, so that a token is forgotten also where other words lead to it;
    0 is no copies. Unset: 0.25; without a bound, 0."""
    at_prompts: bool = False
    """Take the forget gradient at the positions before the first answer only, less the last one,
    which predicts it: a step then changes what a question brings to mind, and not how an answer
    goes on. Texts with a prompt of fewer than four tokens keep all positions."""
    steps: int | None = None
    """Number of Gauss-Newton steps. Unset: by --quality."""
    first_share: float | None = None
    """Share of the way that the first of several steps goes; the others take equal parts of what is
    left. Unset: an equal part, too; where the forget texts are not known by heart (a mean loss of
    ln 2 or more), a half."""
    forget_batch: int | None = None
    """Number of forget sequences in each step, drawn without replacement. Unset: all."""
    refit: bool = False
    """Fit the curvature again at each step. With --no-refit all steps use the first fit."""
    damping: float | None = None
    """Absolute damping λ, as in the paper. Unset: see --relative-damping."""
    relative_damping: float | None = None
    """Damping λ as a multiple of each layer's mean eigenvalue. If neither this nor --damping is
    set: chosen on held-out retain data."""
    bands: int | None = None
    """Number of bands of layers, by depth, whose lengths are set by the exact curvature between
    them. Unset: 3; with --alpha, 1, which leaves the paper's direction as it is."""
    exact_norm: Annotated[bool, Parameter(negative="--fitted-norm")] = False
    """Compute a step's G-norm with the exact Gauss-Newton matrix instead of the fitted
    curvature."""
    offload: str | None = None
    """Where the gradient, the direction, the update and the weights that it replaces are kept:
    device, cpu (host memory), disk, or auto. Unset: auto, which means outside the device only as
    far as --memory makes it necessary."""

    @property
    def refits(self) -> bool:
        """Whether the curvature is fitted more than once."""
        return self.refit and self.steps != 1


@o.settings(o.STEP)
@dataclass(frozen=True, kw_only=True)
class RefinementConfig:
    """Refinement of each step's direction by exact Gauss-Newton products."""

    refine: int = 0
    """Number of conjugate-gradient iterations with exact Gauss-Newton products for each direction.
    Of all iterates, the best direction on held-out retain data is used."""
    refine_sequences: int = 64
    """Number of retain sequences in each exact product of --refine, drawn again for each step."""


@o.settings(o.STEP)
@dataclass(frozen=True, kw_only=True)
class CorrectionAmount:
    """Amount of corrections after the last step."""

    correct: int | None = None
    """Number of corrections after the last step. A correction lowers the KL on the retain set and
    leaves the forget loss as it is. With --kl the KL is then spent on forgetting, as far as it is
    worth that. Unset: as the default quality of kfade unlearn, or by its --quality."""
    correct_sequences: int | None = None
    """Number of retain sequences in the KL's gradient for each correction. Unset: half of them, at
    least 64."""


@o.settings(o.STEP)
@dataclass(frozen=True, kw_only=True)
class CorrectionConfig(CorrectionAmount):
    """Corrections after the last step."""

    correct_damping: float = 100.0
    """Damping λ of --correct, as a multiple of each layer's mean eigenvalue."""


@o.settings(o.SIZE)
@dataclass(frozen=True, kw_only=True)
class SizeConfig:
    """The size of a step: one of alpha, kl and until. If none is set, a measured KL of 0.01."""

    alpha: float | None = None
    """G-norm α of each step, which predicts a KL of ½α² nats per token. Unset: see --kl."""
    kl: float | None = None
    """Measured KL of the complete run on held-out retain data, in nats per token; less where a
    shorter trial, or none, forgets more, or where the mean forget loss has risen by ln V, with V
    tokens in the vocabulary. If neither this nor --alpha nor --until is set: 0.01."""
    until: str | None = None
    """Forgetting target: forget_loss=2.7 (nats per token) or forget_probability=0.1 (mean over the
    forget texts). Unset: see --kl."""
    max_kl: float | None = None
    """Upper limit of the measured KL of the complete run, in nats per token, in addition to the
    option that sets the size. Unset: no limit."""
