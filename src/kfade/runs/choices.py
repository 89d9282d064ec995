"""Converts settings to what the library takes: names to functions, numbers to value objects."""

from __future__ import annotations

import math

from kfade.curvature.damping import Damping
from kfade.curvature.draws import Draw, sampled_labels, square_root_draw
from kfade.curvature.estimators import EKFAC, KFAC, Diagonal, Estimator, Identity
from kfade.errors import InputError
from kfade.method.objectives import Objective, cross_entropy, margin
from kfade.method.settings import DEFAULT_KL, Direction, Run
from kfade.method.step import StepSize
from kfade.runs.config import RunConfig


def estimator_of(word: str, draw: Draw = square_root_draw) -> Estimator:
    """The estimator with the name ``word``; ``draw`` makes its pseudo-labels."""
    match word:
        case "ekfac":
            return EKFAC(draw)
        case "kfac":
            return KFAC(draw)
        case "diagonal":
            return Diagonal(draw)
        case "identity":
            return Identity()
    raise InputError(f"--estimator {word}: give ekfac, kfac, diagonal or identity")


def draw_of(word: str) -> Draw:
    """The draw of pseudo-labels with the name ``word``."""
    match word:
        case "sqrt":
            return square_root_draw
        case "sampled":
            return sampled_labels
    raise InputError(f"--labels {word}: give sqrt or sampled")


def objective_of(word: str, flag: str = "--objective") -> Objective:
    """The forgetting objective with the name ``word``; ``flag`` is its option, for the error."""
    match word:
        case "margin":
            return margin
        case "ce":
            return cross_entropy
    raise InputError(f"{flag} {word}: give margin or ce")


def until_of(word: str | None) -> dict[str, float]:
    """The argument of ``StepSize`` for ``forget_loss=2.7`` or ``forget_probability=0.1``."""
    if word is None:
        return {}
    names = {"forget_loss": "until", "forget_probability": "until_probability"}
    name, _, value = word.partition("=")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if name not in names or not math.isfinite(number):
        raise InputError(
            f"--until {word}: write forget_loss=NUMBER, in nats per token, or "
            "forget_probability=NUMBER, the mean over the forget texts"
        )
    return {names[name]: number}


def bytes_of(size: str, option: str = "--memory") -> int:
    """Number of bytes in a size such as ``20GB``, ``800MB`` or ``1000``; a kB is 1000 bytes."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    number = size.strip().rstrip("BGKMTbgkmt")
    unit = size.strip()[len(number) :].upper()
    try:
        value = int(float(number) * units[unit])
    except (ValueError, KeyError, OverflowError):
        value = 0
    if value <= 0:
        raise InputError(f"{option} {size}: write a size as 20GB or 800MB")
    return value


def offload_of(word: str | None) -> str | None:
    """Where vectors are kept: device, cpu or disk; None where that is left to the planner."""
    if word not in (None, "auto", "device", "cpu", "disk"):
        raise InputError(f"--offload {word}: give auto, device, cpu or disk")
    return None if word == "auto" else word


def step_size(run: RunConfig) -> StepSize:
    """The step's size. If no size is set, a measured KL of ``DEFAULT_KL``."""
    until = until_of(run.size.until)
    kl = run.size.kl
    if run.size.alpha is None and kl is None and not until:
        kl = DEFAULT_KL
    return StepSize(run.size.alpha, kl, **until, max_kl=run.size.max_kl)


def damping_of(run: RunConfig) -> Damping:
    """The damping of each layer."""
    absolute, relative = run.step.damping, run.step.relative_damping
    if absolute is not None and relative is not None:
        raise InputError("give --damping or --relative-damping, not both")
    if absolute is not None:
        return Damping(absolute, relative=False)
    return Damping() if relative is None else Damping(relative)


def direction_of(run: RunConfig) -> Direction:
    """The settings of each step's direction.

    Raises:
        InputError: an unknown objective, a number out of range, or conflicting settings.
    """
    return Direction(
        objective_of(run.step.objective),
        _later_objective_of(run),
        damping_of(run),
        run.step.exact_norm,
        run.refinement.refine,
        run.refinement.refine_sequences,
    )


def run_of(run: RunConfig) -> Run:
    """The settings of the steps, without those that need the model (targets, curvature)."""
    return Run(
        steps=run.step.steps,
        forget_batch=run.step.forget_batch,
        refit=run.step.refit,
        batch_tokens=run.data.batch_tokens,
        recompute=run.fit.recompute,
        seed=run.seed,
    )


def _later_objective_of(run: RunConfig) -> Objective | None:
    """The objective of all steps after the first; None if it is that of the first step."""
    word = run.step.later_objective
    if word is not None and run.step.steps == 1:
        raise InputError(f"--later-objective {word} needs a second step: give --steps 2 or more")
    return objective_of(word, "--later-objective") if word is not None else None
