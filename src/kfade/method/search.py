"""Searches of a step's length by trials, each of them a :class:`Probe`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kfade.errors import InputError
from kfade.runtime.progress import waiting

TRIALS = 5  # times that a length is doubled or halved, at most
SEARCH = "trials of the step's length"  # a task whose work is not known before


class UnreachedError(InputError):
    """No length of a step has the size asked for."""

    def __init__(self, what: str, advice: str) -> None:
        super().__init__(f"{what}: {advice}")
        self.what = what


@dataclass(frozen=True)
class Probe:
    """The measurements of one trial of a step's size."""

    alpha: float
    retain_kl: float
    """KL(base ‖ edited) in nats per loss token on held-out retain data."""
    forget_loss: float
    forget_probability: float
    """Mean over the forget sequences of exp(−their loss per token)."""
    objective: float
    """Mean of the forgetting objective on the forget set."""


@dataclass(frozen=True)
class Aim:
    """The target of a search."""

    measure: Callable[[Probe], float]
    value: float
    accept: tuple[float, float]
    """Least and greatest measure that are accepted."""
    asked: str
    """The option that asked for it, and this step's share, for messages."""
    name: str
    """What is measured, for messages."""

    def is_beyond(self, probe: Probe) -> bool:
        """Whether it goes too far, or to what is not a number."""
        return not self.measure(probe) <= self.accept[1]


@waiting(SEARCH)
def best_length(
    measure: Callable[[float], Probe], first: float, before: Probe, merit: Callable[[Probe], float]
) -> Probe:
    """The probe of the best of ``first``, its doubles and its halves; ``before`` if none is better.

    ``first`` is doubled while that lowers ``merit``. If the first doubling does not, or ``first``
    is no better than ``before``, it is halved until a length is better, and on while that lowers
    ``merit``.
    """
    best = min(before, measure(first), key=merit)
    for factor in (2.0, 0.5) if best is not before else (0.5,):
        for power in range(1, TRIALS + 1):
            trial = measure(first * factor**power)
            if merit(trial) < merit(best):
                best = trial
            elif best is not before:
                break
        if best.alpha > first:
            break
    return best


def shortened(
    seen: Callable[[float], Probe], probes: Sequence[Probe], over: Probe, aim: Aim, power: float
) -> Probe:
    """A step shorter than ``over``, whose measure is beyond the aim, that is accepted; where the
    measure jumps over the aim, the longest below it that was tried, repeated.

    Args:
        power: of α, as which the measure is taken to grow.

    Raises:
        UnreachedError: no step is below the aim.
    """
    value = aim.measure(over)
    scale = (aim.value / value) ** (1 / power) if math.isfinite(value) else 0.1
    found = search(seen, aim, over.alpha * scale, limit=over.alpha)
    if found is not None:
        return found
    within = [p.alpha for p in probes if not aim.is_beyond(p) and p.alpha < over.alpha]
    if not within:
        raise unreached(aim, probes)
    return seen(max(within))


@waiting(SEARCH)
def search(
    seen: Callable[[float], Probe], aim: Aim, guess: float, limit: float = math.inf
) -> Probe | None:
    """Bracketed search below ``limit`` for an α whose measure is accepted; None if it fails.

    The measure is modelled as a power of α: α² at first, then the power through two trials, one on
    each side of the target if possible. If the model's α lies outside the bracket or the search
    converges slowly, the geometric mean of the bracket is tried.
    """
    low, high, alpha = 0.0, limit, guess
    usable: dict[float, float] = {}
    for trial in range(40):
        made = seen(alpha)
        value = aim.measure(made)
        if aim.accept[0] <= value <= aim.accept[1]:
            return made
        if value < aim.accept[0]:
            low = alpha
        else:  # too far, or not finite
            high = alpha
        if math.isfinite(value) and value > 0:
            usable[alpha] = value
        around = [low, high] if low in usable and high in usable else list(usable)[-2:]
        proposal = _power_law([(a, usable[a]) for a in around], aim.value) if around else alpha
        slow = trial % 4 == 3 and (high < math.inf or value < 0.5 * aim.value)
        if slow or not low < proposal < high:
            proposal = low * 4 if high == math.inf else math.sqrt(max(low, high / 100) * high)
        alpha = proposal
        if alpha > 1e12 or (high < math.inf and high - low <= 1e-6 * high):
            return None
    return None


def nearest(seen: Callable[[float], Probe], aim: Aim, probes: Sequence[Probe]) -> Probe | None:
    """The trial that came nearest to the target, repeated; None if none went half of the way to it
    and no further than twice the way."""
    near = [p for p in probes if 0.5 * aim.value <= aim.measure(p) <= 2 * aim.value]
    if not near:
        return None
    return seen(min(near, key=lambda p: abs(aim.measure(p) - aim.value)).alpha)


def unreached(aim: Aim, probes: Sequence[Probe]) -> UnreachedError:
    """The error that no trial is accepted: the nearest on each side, and what to do."""
    measured = [(aim.measure(p), p.alpha) for p in probes]
    finite = [(value, alpha) for value, alpha in measured if math.isfinite(value)]
    below = max((trial for trial in finite if trial[0] < aim.accept[0]), default=None)
    above = min((trial for trial in finite if trial[0] > aim.accept[1]), default=None)
    said = [f"at alpha {t[1]:.8g}: {aim.name} {t[0]:.4g}" for t in (below, above) if t is not None]
    broken = [alpha for value, alpha in measured if not math.isfinite(value)]
    advice = "ask for less, or take more --steps"
    if above is not None:
        advice = "ask for more"
        if below is not None:
            said.append("nothing between")
            advice = "ask for about one of these"
    elif broken:
        said.append(f"from alpha {min(broken):.4g} on the model's outputs are not finite")
        advice = "look at the model and the forget set"
        if finite:
            advice = "ask for less, or take more --steps"
    tried = ", ".join(said[:2]) + "".join(f"; {more}" for more in said[2:])
    return UnreachedError(f"{aim.asked} cannot be reached in one step ({tried})", advice)


def _power_law(trials: Sequence[tuple[float, float]], aim: float) -> float:
    """The α at which the power law through one or two (α, measure) reaches ``aim``, between a tenth
    of and ten times the last α."""
    alpha, value = trials[-1]
    power = 2.0
    if len(trials) == 2:
        power = math.log(value / trials[0][1]) / math.log(alpha / trials[0][0])
    power = min(max(power, 0.25), 8.0)
    return alpha * min(max(math.pow(aim / value, 1 / power), 0.1), 10.0)
