"""One Gauss-Newton step: its direction, its unit of length, and the search for its size."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from kfade.curvature.curvature import Curvature, Matrices
from kfade.errors import InputError

KL_TOLERANCE = 0.1  # a measured KL is met within 10 %: a held-out sample says no more than that
LOSS_TOLERANCE = 0.03  # a forgetting target is met within 3 % of the rise asked for
MIDWAY_TOLERANCE = 0.5  # where more steps follow, which make up for it


@dataclass(frozen=True)
class Step:
    """A direction r; the change of weights is α r."""

    direction: Matrices
    slope: float
    """Predicted change of the objective per unit of α: gᵀr."""
    unit_kl: float
    """½ rᵀG̃r: ½ where r has unit length in the G̃-norm."""

    def predicted_kl(self, alpha: float) -> float:
        """½ (αr)ᵀG̃(αr) in nats per loss token."""
        return self.unit_kl * alpha**2

    def scaled(self, factor: float) -> Step:
        """The same direction, ``factor`` times as long."""
        direction = {name: matrix * factor for name, matrix in self.direction.items()}
        return Step(direction, self.slope * factor, self.unit_kl * factor**2)


def gauss_newton_step(
    curvature: Curvature, gradient: Mapping[str, Tensor], *, damping: float, relative: bool
) -> Step:
    """r = (G̃ + λI)⁻¹g, scaled so that ‖r‖_G̃ = 1 over all layers together (paper §3, "Step size").

    Args:
        damping: λ, or λ as a multiple of each layer's mean eigenvalue if ``relative``.

    Raises:
        InputError: the direction has no length: the gradient is zero or the curvature is broken.
    """
    direction: Matrices = {}
    square = slope = gradient_square = 0.0
    for name, block in curvature.blocks.items():  # in each layer's eigenbasis: r̃ = g̃ / (Λ + λ)
        g = block.rotate(gradient[name])
        r = block.divide(g, block.damping(damping, relative))
        square += (block.eigenvalues * r.square()).sum().double().item()
        slope += (g * r).sum().double().item()
        direction[name] = block.rotate_back(r)
        gradient_square += g.square().sum().double().item()
    if square == 0 and gradient_square > 0:
        raise InputError(
            "the retain set has no curvature where the forget gradient lies: a step there cannot "
            "be measured; add retain text that uses the targeted weights, or target others"
        )
    return unit_step(direction, slope, square)


def unit_step(direction: Matrices, slope: float, square: float) -> Step:
    """Along a direction r with gᵀr = ``slope``, rᵀG̃r = ``square``: scaled so that ‖r‖_G̃ = 1.

    Raises:
        InputError: r has no length.
    """
    if not (math.isfinite(square) and square > 0):
        cause = "the forget gradient is zero: look at the forget set"
        if square != 0:
            cause = "the damping is too small for this curvature: raise it"
        raise InputError(f"the step's squared length in the G-norm is {square}: {cause}")
    return Step(direction, slope, 0.5 * square).scaled(square**-0.5)


@dataclass(frozen=True)
class StepSize:
    """How far to go; exactly one of the first four is set."""

    alpha: float | None = None
    """G-norm of each step (the paper's): predicted KL ½α²."""
    kl: float | None = None
    """Measured mean KL per loss token on held-out retain data, of the whole run."""
    until: float | None = None
    """Mean loss on the forget set at the end of the run, in nats per token."""
    until_probability: float | None = None
    """Mean probability of the forget texts at the end of the run, each per token (geometric)."""
    max_kl: float | None = None
    """Cap on the measured KL of the whole run, whichever way the size was chosen."""

    def __post_init__(self) -> None:
        for name in ("alpha", "kl", "until", "max_kl"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                flag = name.replace("_", "-")
                raise InputError(f"--{flag} {value}: give a positive, finite number")
        if self.until_probability is not None and not 0 < self.until_probability < 1:
            raise InputError(
                f"--until forget_probability={self.until_probability}: give a number between 0 "
                "and 1"
            )
        ways = (self.alpha, self.kl, self.until, self.until_probability)
        if sum(value is not None for value in ways) != 1:
            raise InputError("give exactly one of alpha, kl and until (--alpha, --kl, --until)")

    @property
    def goal(self) -> float | None:
        """What :meth:`forgotten` is to be at the end of the run, where that was asked for."""
        if self.until_probability is not None:
            return -math.log(self.until_probability)
        return self.until

    def forgotten(self, probe: Probe) -> float:
        """How far the forget set is forgotten, in nats: its mean loss; −log of its mean
        probability where that is the target."""
        if self.until_probability is None:
            return probe.forget_loss
        return -math.log(max(probe.forget_probability, 1e-300))  # finite where it underflows

    @property
    def target(self) -> str:
        """The forgetting target as the command line says it."""
        if self.until_probability is not None:
            return f"--until forget_probability={self.until_probability:.4g}"
        return f"--until forget_loss={self.until:.4g}"


@dataclass(frozen=True)
class Probe:
    """What one trial of a step's size measured."""

    alpha: float
    retain_kl: float
    """KL(base ‖ edited) in nats per loss token on held-out retain data."""
    forget_loss: float
    forget_probability: float
    """Mean over the forget sequences of exp(−their loss per token)."""
    objective: float
    """Mean of the forgetting objective on the forget set."""


def choose_alpha(
    probe: Callable[[float], Probe],
    size: StepSize,
    *,
    share: float,
    start: Probe,
    guess: float,
) -> list[Probe]:
    """Probes made, the chosen one last.

    Args:
        probe: tries an α; costs forward passes only.
        share: how much of the run is done after this step, in (0, 1]. The KL after it is aimed at
            ``kl · share²`` (steps of equal length in one direction), the forget loss at ``share``
            of its way to ``until``.
        start: what holds before this step, α = 0.
        guess: an α to begin with where none is given.

    Raises:
        InputError: the target cannot be reached along this direction.
    """
    probes: list[Probe] = []

    def around(aim: float, tolerance: float) -> tuple[float, float]:
        within = tolerance if share == 1 else MIDWAY_TOLERANCE
        return aim * (1 - within), aim * (1 + within)

    def seen(alpha: float) -> Probe:
        probes.append(probe(alpha))
        return probes[-1]

    if size.alpha is not None:
        chosen = seen(size.alpha)
    elif size.kl is not None:
        aim = size.kl * share**2
        accept = around(aim, KL_TOLERANCE)
        chosen = _search(seen, lambda p: p.retain_kl, aim, accept, guess, "--kl")
    else:
        assert size.goal is not None
        begin = size.forgotten(start)
        rise = (size.goal - begin) * share
        accept = around(rise, LOSS_TOLERANCE)
        chosen = _search(
            seen,
            lambda p: size.forgotten(p) - begin,
            rise,
            accept,
            guess,
            "--until",
            unit=f"; in nats, the rise that {size.target} asks of this step",
        )
    if size.max_kl is not None and not chosen.retain_kl <= size.max_kl:
        cap = size.max_kl
        aim, accept = cap * (1 - KL_TOLERANCE / 2), (cap * (1 - KL_TOLERANCE), cap)
        scale = math.sqrt(aim / chosen.retain_kl) if math.isfinite(chosen.retain_kl) else 0.1
        first = chosen.alpha * scale
        chosen = _search(seen, lambda p: p.retain_kl, aim, accept, first, "--max-kl")
    assert probes[-1] is chosen
    return probes


def _search(
    seen: Callable[[float], Probe],
    measure: Callable[[Probe], float],
    aim: float,
    accept: tuple[float, float],
    guess: float,
    flag: str,
    unit: str = "",
) -> Probe:
    """Bracketed search for an α whose measure lies in ``accept``; ``flag`` asked for that, and
    ``unit`` says of what the numbers in an error are where the flag does not.

    A measure is taken for a power of α: α² at first, then the power that two trials tell, those
    on both sides of ``aim`` where there are such. Where that would leave the bracket or does not
    close in, its geometric middle is tried.
    """
    low, high, alpha = 0.0, math.inf, guess
    usable: dict[float, float] = {}
    last = None
    for trial in range(40):
        last = seen(alpha)
        value = measure(last)
        if accept[0] <= value <= accept[1]:
            return last
        if value < accept[0]:
            low = alpha
        else:  # too far, or not finite
            high = alpha
        if math.isfinite(value) and value > 0:
            usable[alpha] = value
        around = [low, high] if low in usable and high in usable else list(usable)[-2:]
        proposal = _power_law([(a, usable[a]) for a in around], aim) if around else alpha
        slow = trial % 4 == 3 and (high < math.inf or value < 0.5 * aim)
        if slow or not low < proposal < high:
            proposal = low * 4 if high == math.inf else math.sqrt(max(low, high / 100) * high)
        alpha = proposal
        if alpha > 1e12 or (high < math.inf and high - low <= 1e-6 * high):
            break
    reached = "nothing" if last is None else f"{measure(last):.4g}"
    raise InputError(
        f"{flag}: {aim:.4g} cannot be reached in one step (nearest {reached}{unit}): ask for "
        "less, or take more --steps"
    )


def _power_law(trials: Sequence[tuple[float, float]], aim: float) -> float:
    """Where the power law through one or two (α, measure) reaches ``aim``; ten times as far or as
    near as the last of them at most."""
    alpha, value = trials[-1]
    power = 2.0
    if len(trials) == 2:
        power = math.log(value / trials[0][1]) / math.log(alpha / trials[0][0])
    power = min(max(power, 0.25), 8.0)
    return alpha * min(max((aim / value) ** (1 / power), 0.1), 10.0)
