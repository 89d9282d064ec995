"""The size of a step: what it is to reach, and the search for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from kfade.errors import InputError
from kfade.runtime.progress import waiting

KL_TOLERANCE = 0.1  # relative error of a measured KL; a held-out sample is no more accurate
LOSS_TOLERANCE = 0.03  # of the rise of the forget loss
MIDWAY_TOLERANCE = 0.2  # of either, if more steps follow, which compensate
TRIALS = 5  # times that a length is doubled or halved, at most
SEARCH = "trials of the step's length"  # a task whose work is not known before


class NoRiseError(InputError):
    """No length of a step raises what is forgotten."""


class UnreachedError(InputError):
    """No length of a step has the size asked for."""

    def __init__(self, what: str, advice: str) -> None:
        super().__init__(f"{what}: {advice}")
        self.what = what


@dataclass(frozen=True)
class StepSize:
    """The size of the steps; exactly one of the first four fields is set."""

    alpha: float | None = None
    """G-norm of each step (the paper's): predicted KL ½α²."""
    kl: float | None = None
    """Measured mean KL per loss token on held-out retain data, of the whole run; less where a
    longer step would forget less."""
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
        """The value of :meth:`forgotten` to reach at the end of the run, if one is set."""
        if self.until_probability is not None:
            return -math.log(self.until_probability)
        return self.until

    def forgotten(self, probe: Probe) -> float:
        """The measure of forgetting, in nats: mean loss of the forget set, or −log of its mean
        probability if that is the target."""
        if self.until_probability is None:
            return probe.forget_loss
        return -math.log(max(probe.forget_probability, 1e-300))  # finite where it underflows

    def is_reached(self, first: Probe, now: Probe) -> bool:
        """Whether the KL, the forgetting or the cap of a whole run is reached, within its
        tolerance, or passed. ``alpha`` is of a step.

        Args:
            first: the measurements at the start of the run.
        """
        most = min(kl for kl in (self.kl, self.max_kl, math.inf) if kl is not None)
        if now.retain_kl >= (1 - KL_TOLERANCE) * most:
            return True
        if self.goal is None:
            return False
        way = self.goal - self.forgotten(first)
        return self.goal - self.forgotten(now) <= LOSS_TOLERANCE * way

    @property
    def limits(self) -> list[StepSize]:
        """What a run may not go beyond: the size, and the cap on the KL with no tolerance above."""
        capped = [] if self.max_kl is None else [StepSize(kl=self.max_kl / (1 + KL_TOLERANCE))]
        return [*capped, replace(self, max_kl=None)]

    @property
    def target(self) -> str:
        """The KL or the forgetting of a whole run, as the command line says it."""
        if self.kl is not None:
            return f"--kl {self.kl:.4g}"
        if self.until_probability is not None:
            return f"--until forget_probability={self.until_probability:.4g}"
        return f"--until forget_loss={self.until:.4g}"


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
class _Aim:
    """The target of a search."""

    measure: Callable[[Probe], float]
    value: float
    accept: tuple[float, float]
    """Least and greatest measure that are accepted."""
    asked: str
    """The option that asked for it, and this step's share, for messages."""
    name: str
    """What is measured, for messages."""


@waiting(SEARCH)
def choose_alpha(
    probe: Callable[[float], Probe],
    size: StepSize,
    *,
    share: float,
    start: Probe,
    guess: float,
    first: Probe | None = None,
) -> list[Probe]:
    """Search the α that meets ``size``; returns all probes, the chosen one last.

    Args:
        probe: measures an α, by forward passes.
        share: this step's fraction of the way that is left of the run, in (0, 1]; 1 in the last
            step. The way is counted in √KL (steps of equal length in one direction), or in the
            forget loss. Where no α meets the share before the last step, the nearest is taken if it
            goes at least half of it.
        start: the measurements at α = 0. They may lie beyond the target; then ``probe`` is to go
            back as α grows.
        guess: the α to begin the search at.
        first: the measurements at the start of the run; ``start`` when None.

    Raises:
        UnreachedError: the target cannot be reached along this direction, or no step is below the
            cap.
    """
    probes: list[Probe] = []

    def seen(alpha: float) -> Probe:
        probes.append(probe(alpha))
        return probes[-1]

    if size.alpha is not None:
        chosen = seen(size.alpha)
    else:
        aim = _aim(size, share, first or start, start)
        found = _search(seen, aim, guess)
        if found is None and share < 1:
            found = _nearest(seen, aim, probes)
        if found is None:
            raise _unreached(aim, probes)
        chosen = found
    if size.max_kl is not None and not chosen.retain_kl <= size.max_kl:
        chosen = _capped(seen, probes, chosen, size.max_kl)
    assert probes[-1] is chosen
    return probes


def where_most_is_forgotten(
    probe: Callable[[float], Probe], probes: Sequence[Probe], size: StepSize, start: Probe
) -> list[Probe]:
    """The probes of a step, the chosen one last; if its size is a KL, that forgets most within it.

    A KL says how far a step may go, not that it is worth going: beyond some length forgetting may
    fall again. Where the chosen length forgets no more than the start or a shorter trial, the best
    of its halves (or of that trial's halves and doubles) is taken, see :func:`best_length`.

    Args:
        probe: measures an α, by forward passes.
        probes: as :func:`choose_alpha` gives them; the KL grows from ``start`` to the last one.
        start: the measurements before the step, whatever its own ``alpha`` is.

    Raises:
        NoRiseError: none of these lengths forgets more than the start.
    """
    made = list(probes)
    reached, shorter = made[-1], [p for p in made if p.alpha < made[-1].alpha]
    if size.kl is None or all(
        size.forgotten(reached) > size.forgotten(other) for other in (start, *shorter)
    ):
        return made

    def seen(alpha: float) -> Probe:
        made.append(probe(alpha))
        return made[-1]

    def merit(trial: Probe) -> float:
        within = trial.retain_kl <= reached.retain_kl
        return -size.forgotten(trial) if within else math.inf

    best = min((start, *shorter), key=merit)
    first = reached.alpha / 2 if best is start else best.alpha
    best = best_length(seen, first, start, merit)
    if best is start:
        raise NoRiseError(
            f"{size.target}: no length of the step raises the forget loss (before it "
            f"{size.forgotten(start):.4g} nats, at the KL asked for {size.forgotten(reached):.4g}, "
            f"at {made[-1].retain_kl:.2g} nats of KL {size.forgotten(made[-1]):.4g}): ask for "
            "less, raise the damping, or take another objective"
        )
    if best is not made[-1]:
        seen(best.alpha)
    return made


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


def shortfall(size: StepSize, first: Probe, now: Probe) -> float:
    """What a run lacks of its size, in nats: below 0 beyond it, 0 within its tolerance.

    Args:
        first: the measurements at the start of the run.
    """
    if size.alpha is not None:
        return 0.0
    aim = _aim(size, 1.0, first, first)
    reached, (low, high) = aim.measure(now), aim.accept
    return 0.0 if low <= reached <= high else aim.value - reached


def _aim(size: StepSize, share: float, first: Probe, start: Probe) -> _Aim:
    """The target of a step that begins at ``start`` and goes ``share`` of the way that is left.

    What is measured is the change since ``start``, toward the target.
    """
    asked = size.target
    if size.kl is not None:
        begin, least = start.retain_kl, KL_TOLERANCE * size.kl
        value = ((1 - share) * math.sqrt(begin) + share * math.sqrt(size.kl)) ** 2
        name = "added KL" if begin else "KL"
        if share < 1:
            asked += f" ({value:.4g} nats after this step)"
    else:
        assert size.goal is not None
        begin, name = size.forgotten(start), "rise"
        value = begin + share * (size.goal - begin)
        least = LOSS_TOLERANCE * (size.goal - size.forgotten(first))
        asked += f" (a rise of {value - begin:.4g} nats in this step)"
    sign = 1.0 if value >= begin else -1.0
    value = abs(value - begin)
    within = least if share == 1 else MIDWAY_TOLERANCE * value

    def measure(probe: Probe) -> float:
        now = probe.retain_kl if size.kl is not None else size.forgotten(probe)
        return sign * (now - begin)

    return _Aim(measure, value, (value - within, value + within), asked, name)


def _capped(
    seen: Callable[[float], Probe], probes: Sequence[Probe], over: Probe, cap: float
) -> Probe:
    """A step shorter than ``over`` with a KL just below the cap.

    If the KL jumps over that range (tokens may change their experts, say), the longest step below
    the cap that was tried is repeated.

    Raises:
        UnreachedError: no step is below the cap.
    """
    value, accept = cap * (1 - KL_TOLERANCE / 2), (cap * (1 - KL_TOLERANCE), cap)
    aim = _Aim(lambda p: p.retain_kl, value, accept, f"--max-kl {cap:.4g}", "KL")
    scale = math.sqrt(value / over.retain_kl) if math.isfinite(over.retain_kl) else 0.1
    found = _search(seen, aim, over.alpha * scale, limit=over.alpha)
    if found is not None:
        return found
    within = [p.alpha for p in probes if p.retain_kl <= cap and p.alpha < over.alpha]
    if not within:
        raise _unreached(aim, probes)
    return seen(max(within))


def _search(
    seen: Callable[[float], Probe], aim: _Aim, guess: float, limit: float = math.inf
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


def _nearest(seen: Callable[[float], Probe], aim: _Aim, probes: Sequence[Probe]) -> Probe | None:
    """The trial that came nearest to the target, repeated; None if none went half of the way to it
    and no further than twice the way."""
    near = [p for p in probes if 0.5 * aim.value <= aim.measure(p) <= 2 * aim.value]
    if not near:
        return None
    return seen(min(near, key=lambda p: abs(aim.measure(p) - aim.value)).alpha)


def _unreached(aim: _Aim, probes: Sequence[Probe]) -> UnreachedError:
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
