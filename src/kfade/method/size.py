"""The size of a step: what it is to reach, and the length that reaches it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from kfade.errors import InputError
from kfade.method.search import (
    Aim,
    Probe,
    UnreachedError,
    best_length,
    nearest,
    search,
    shortened,
    unreached,
)

KL_TOLERANCE = 0.1  # relative error of a measured KL; a held-out sample is no more accurate
LOSS_TOLERANCE = 0.03  # of the rise of the forget loss
MIDWAY_TOLERANCE = 0.2  # of either, if more steps follow, which compensate


class NoRiseError(InputError):
    """No length of a step raises what is forgotten."""

    what = "no length of it raises the forget loss"


@dataclass(frozen=True)
class StepSize:
    """The size of the steps; exactly one of the first four fields is set."""

    alpha: float | None = None
    """G-norm of each step (the paper's): predicted KL ½α²."""
    kl: float | None = None
    """Measured mean KL per loss token on held-out retain data, of the whole run; less where a
    longer step would forget less, or raise the forget loss by more than ``max_rise``."""
    until: float | None = None
    """Mean loss on the forget set at the end of the run, in nats per token."""
    until_probability: float | None = None
    """Mean probability of the forget texts at the end of the run, each per token (geometric)."""
    max_kl: float | None = None
    """Cap on the measured KL of the whole run, whichever way the size was chosen."""
    max_rise: float | None = None
    """Cap on the rise of the mean forget loss in a whole run to a KL, in nats per token; infinite
    for none. Without it a KL that the forget set does not need is spent on making it ever less
    likely. When None a run fills in ln V: a token that was certain is then as likely as any of the
    vocabulary."""

    def __post_init__(self) -> None:
        for name in ("alpha", "kl", "until", "max_kl"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                flag = name.replace("_", "-")
                raise InputError(f"--{flag} {value}: give a positive, finite number")
        if self.max_rise is not None and not self.max_rise > 0:
            raise InputError(f"max_rise={self.max_rise}: give a positive number")
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
        """Whether the KL, the forgetting or a cap of a whole run is reached, within its tolerance,
        or passed. ``alpha`` is of a step.

        Args:
            first: the measurements at the start of the run.
        """
        most = min(kl for kl in (self.kl, self.max_kl, math.inf) if kl is not None)
        if now.retain_kl >= (1 - KL_TOLERANCE) * most or self.has_risen(first, now):
            return True
        if self.goal is None:
            return False
        way = self.goal - self.forgotten(first)
        return self.goal - self.forgotten(now) <= LOSS_TOLERANCE * way

    def decided(self, vocabulary: int) -> StepSize:
        """The same for a model of so many tokens: ``max_rise`` is filled in where it was left
        out."""
        if self.kl is None or self.max_rise is not None:
            return self
        return replace(self, max_rise=math.log(max(vocabulary, 2)))

    @property
    def rise_cap(self) -> float | None:
        """``max_rise`` where it holds: in a run to a KL, and if it is finite."""
        holds = self.kl is not None and math.isfinite(self.max_rise or math.inf)
        return self.max_rise if holds else None

    def has_risen(self, first: Probe, now: Probe) -> bool:
        """Whether a run has reached its ``max_rise``, within its tolerance, or passed it."""
        if self.rise_cap is None:
            return False
        return now.forget_loss - first.forget_loss >= (1 - LOSS_TOLERANCE) * self.rise_cap

    def limits(self, first: Probe) -> list[StepSize]:
        """What a run may not go beyond: the cap on the KL with no tolerance above, the size if it
        is of a whole run, and the cap on the rise.

        Args:
            first: the measurements at the start of the run.
        """
        limits = [] if self.max_kl is None else [StepSize(kl=self.max_kl / (1 + KL_TOLERANCE))]
        if self.alpha is None:
            limits.append(replace(self, max_kl=None, max_rise=None))
        if self.rise_cap is not None:
            limits.append(StepSize(until=first.forget_loss + self.rise_cap))
        return limits

    @property
    def target(self) -> str:
        """The KL or the forgetting of a whole run, as the command line says it."""
        if self.kl is not None:
            return f"--kl {self.kl:.4g}"
        if self.until_probability is not None:
            return f"--until forget_probability={self.until_probability:.4g}"
        return f"--until forget_loss={self.until:.4g}"


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
            goes at least half of it. ``max_rise`` is shared in the same way.
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
        aim = aim_of(size, share, first or start, start)
        risen = rise_aim(size, share, first or start, start)
        found = search(seen, aim, guess)
        if found is None and share < 1:
            found = nearest(seen, aim, probes)
        if risen is not None:  # may be on the way to the KL only, or without it
            far = [p for p in probes if p is found or not aim.is_beyond(p)]
            over = min(filter(risen.is_beyond, far), key=lambda p: p.alpha, default=None)
            if over is not None:
                found = shortened(seen, probes, over, risen, power=1)
        if found is None:
            raise unreached(aim, probes)
        chosen = found
    if size.max_kl is not None and not chosen.retain_kl <= size.max_kl:
        chosen = _capped(seen, probes, chosen, size.max_kl)
    assert probes[-1] is chosen
    return probes


def where_most_is_forgotten(
    probe: Callable[[float], Probe],
    probes: Sequence[Probe],
    size: StepSize,
    *,
    share: float,
    start: Probe,
    first: Probe,
) -> list[Probe]:
    """The probes of a step, the chosen one last; if its size is a KL, that forgets most within it.

    A KL says how far a step may go, not that it is worth going: beyond some length forgetting may
    fall again. Where the chosen length forgets no more than the start or a shorter trial, the best
    of its halves (or of that trial's halves and doubles) is taken, see :func:`best_length`.

    Args:
        probe: measures an α, by forward passes.
        probes: as :func:`choose_alpha` gives them; the KL grows from ``start`` to the last one.
        share: as for :func:`choose_alpha`, and so is ``first``.
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

    risen = rise_aim(size, share, first, start)

    def within(trial: Probe) -> bool:
        return trial.retain_kl <= reached.retain_kl

    def merit(trial: Probe) -> float:
        if not within(trial) or (risen is not None and risen.is_beyond(trial)):
            return math.inf
        return -size.forgotten(trial)

    best = min((start, *shorter), key=merit)
    middle = reached.alpha / 2 if best is start else best.alpha
    best = best_length(seen, middle, start, merit)
    if best is start and risen is not None:  # do all of these lengths forget too much?
        far = [p for p in made if within(p) and risen.is_beyond(p)]
        if far:
            shortened(seen, made, min(far, key=lambda p: p.alpha), risen, power=1)
            return made
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


def shortfall(size: StepSize, first: Probe, now: Probe) -> float:
    """What a run lacks of its size, in nats: below 0 beyond it, 0 within its tolerance.

    Args:
        first: the measurements at the start of the run.
    """
    if size.alpha is not None:
        return 0.0
    aim = aim_of(size, 1.0, first, first)
    reached, (low, high) = aim.measure(now), aim.accept
    return 0.0 if low <= reached <= high else aim.value - reached


def aim_of(size: StepSize, share: float, first: Probe, start: Probe) -> Aim:
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

    return Aim(measure, value, (value - within, value + within), asked, name)


def rise_aim(size: StepSize, share: float, first: Probe, start: Probe) -> Aim | None:
    """The most that a step to a KL may raise the forget loss, as the target of a search; None if
    there is no such cap, or the KL lies behind.

    Raises:
        UnreachedError: nothing is left of it.
    """
    most = size.rise_cap
    if most is None or size.kl is None:
        return None
    if start.retain_kl >= size.kl:  # the way is back, which lowers the loss
        return None
    asked = f"a rise of the forget loss of at most {most:.4g} nats"
    left, least = first.forget_loss + most - start.forget_loss, LOSS_TOLERANCE * most
    if left <= least:
        raise UnreachedError(f"{asked} leaves no further step", "ask for less")
    value = share * left
    within = least if share == 1 else MIDWAY_TOLERANCE * value

    def rise(probe: Probe) -> float:
        return probe.forget_loss - start.forget_loss

    return Aim(rise, value, (value - within, value + within), asked, "rise")


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
    aim = Aim(lambda p: p.retain_kl, value, accept, f"--max-kl {cap:.4g}", "KL")
    return shortened(seen, probes, over, aim, power=2)
