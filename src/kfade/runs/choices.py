"""Words in settings: lists of them, for the help and for errors, and what each stands for."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kfade.curvature.draws import Draw, sampled_labels, square_root_draw
from kfade.curvature.estimators import EKFAC, KFAC, Diagonal, Estimator, Identity
from kfade.errors import InputError
from kfade.method.objectives import Objective, cross_entropy, margin
from kfade.method.settings import Correction, Run

ESTIMATORS = "ekfac, kfac, diagonal or identity"
LABELS = "sqrt (square-root draw) or sampled (from the model's distribution)"
EXPERT_INPUTS = (
    "own (one for each expert) or shared (one for the experts of a layer: less memory, fewer "
    "eigendecompositions)"
)
OBJECTIVES = "margin or ce (cross-entropy)"
QUALITIES = (
    "fast (one step), default (six steps and a correction) or best (twelve steps and three "
    "corrections)"
)


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
    raise InputError(f"--estimator {word}: give {ESTIMATORS}")


def draw_of(word: str) -> Draw:
    """The draw of pseudo-labels with the name ``word``."""
    match word:
        case "sqrt":
            return square_root_draw
        case "sampled":
            return sampled_labels
    raise InputError(f"--labels {word}: give {LABELS}")


def objective_of(word: str, flag: str = "--objective") -> Objective:
    """The forgetting objective with the name ``word``; ``flag`` is its option, for the error."""
    match word:
        case "margin":
            return margin
        case "ce":
            return cross_entropy
    raise InputError(f"{flag} {word}: give {OBJECTIVES}")


@dataclass(frozen=True)
class Quality:
    """Amounts of work, where the options that set them are not given."""

    steps: int
    corrections: int
    """After the last step."""

    def unless(self, steps: int | None, corrections: int | None) -> Quality:
        """The same, but for the amounts that are given."""
        return Quality(
            self.steps if steps is None else steps,
            self.corrections if corrections is None else corrections,
        )


def quality_of(word: str) -> Quality:
    """The quality with the name ``word``."""
    match word:
        case "fast":
            return Quality(1, 0)
        case "default":
            return Quality(Run.steps, Correction.count)
        case "best":
            return Quality(12, 3)
    raise InputError(f"--quality {word}: give {QUALITIES}")


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


def top_of(experts: str | None) -> int | None:
    """The N of ``--experts top:N``; None for other words.

    Raises:
        InputError: it is not a number.
    """
    if experts is None or not experts.startswith("top:"):
        return None
    number = experts.removeprefix("top:")
    if not number.isdecimal() or int(number) < 1:
        raise InputError(f"--experts {experts}: write top:N, a number of experts, as in top:8")
    return int(number)


def shares_inputs(word: str) -> bool:
    """Whether experts of a layer share their input factors, for ``--expert-inputs``."""
    match word:
        case "own":
            return False
        case "shared":
            return True
    raise InputError(f"--expert-inputs {word}: give {EXPERT_INPUTS}")


def offload_of(word: str | None) -> str | None:
    """Where vectors are kept: device, cpu or disk; None where that is left to the planner."""
    if word not in (None, "auto", "device", "cpu", "disk"):
        raise InputError(f"--offload {word}: give auto, device, cpu or disk")
    return None if word == "auto" else word
