"""The damping of a run, chosen on held-out retain data at its first step.

A step along r(λ) = (G̃ + λI)⁻¹g raises the objective by α gᵀr at a KL of ½α² rᵀGr, with the exact
Gauss-Newton matrix G of held-out retain data. So at equal forgetting the KL is proportional to the
inverse of

    merit(λ) = (gᵀr)² / rᵀGr,   0 where gᵀr < 0.

G⁻¹g has the greatest merit. G̃ is an estimate of G from other data: damping bounds a step where G̃ is
too small by chance, and too much of it turns the step to the gradient, which ignores G.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace

from kfade.curvature.curvature import Curvature
from kfade.curvature.damping import Damping
from kfade.curvature.vectors import Vector
from kfade.method.experts import top_experts
from kfade.method.gauges import Gauges
from kfade.method.refine import inner
from kfade.method.settings import Direction, Run
from kfade.method.step import gauss_newton_step
from kfade.method.update import Update
from kfade.models.targets import Target
from kfade.runtime.progress import say
from kfade.runtime.stages import stage

BEGIN, WEAKEST, STRONGEST = -2, -6, 2  # powers of ten, times each layer's mean eigenvalue
ENOUGH = 1.2  # factor of the merit for which a tenth of the damping is taken


def damped(
    direction: Direction,
    update: Update,
    curvature: Curvature,
    gradient: Vector,
    targets: Sequence[Target],
    gauges: Gauges,
    run: Run,
    whole: Callable[[], Vector] | None = None,
) -> tuple[Direction, Update]:
    """The direction with its damping, and the update that tells how it was chosen.

    It is chosen on a part of the held-out data, if it is not given and no earlier step of the run
    has chosen one.

    Args:
        gradient: that of the direction r.
        whole: gives the objective's gradient g, whose gᵀr is the rise, where that is another one
            (:attr:`Direction.at_prompts`).
    """
    if direction.damping is not None:
        return direction, update
    told = update.provenance.get("damping")
    if told is None:
        choose = top_experts(targets, direction.top_experts)
        rising = whole() if whole is not None else None

        def merit(damping: Damping) -> float:
            step = gauss_newton_step(curvature, gradient, damping, run.storage, choose=choose)
            form = gauges.part.exact_form(step.direction, targets)
            slope = step.slope if rising is None else inner(step.direction, rising)
            return max(slope, 0.0) ** 2 / form if form else math.inf

        with stage("step"):
            damping, merits = choose_damping(merit)
        say(damping_line(damping, merits))
        told = {**asdict(damping), "merits": {f"{k:g}": v for k, v in merits.items()}}
        update = Update(update.deltas, {**update.provenance, "damping": told})
    return replace(direction, damping=Damping(told["value"], told["relative"])), update


def choose_damping(merit: Callable[[Damping], float]) -> tuple[Damping, dict[float, float]]:
    """The damping, and the merit of each that was tried, by its multiple of the mean eigenvalue.

    From ``BEGIN`` on a tenth of the damping is tried as long as that multiplies the merit by
    ``ENOUGH`` or more. Of all dampings the strongest is taken whose merit is within that factor of
    the greatest that was found: weaker ones have little more to give, and their longer steps leave
    the region where the merit holds.

    Args:
        merit: (gᵀr)² / rᵀGr of a damping; costs a direction and an exact quadratic form.
    """
    merits: dict[int, float] = {}

    def of(power: int) -> float:
        if power not in merits:
            merits[power] = merit(Damping(10.0**power))
        return merits[power]

    power = BEGIN
    while power > WEAKEST and ENOUGH * of(power) <= of(power - 1) > 0:
        power -= 1
    while power < STRONGEST and ENOUGH * of(power + 1) >= max(merits.values()):
        power += 1
    return Damping(10.0**power), {10.0**tried: merits[tried] for tried in sorted(merits)}


def damping_line(damping: Damping, merits: Mapping[float, float]) -> str:
    """One line of text about the choice: the KL of each damping beside that of the chosen one."""
    chosen = merits[damping.value]
    told = "none raises the objective, by its gradient"
    if chosen:
        others = {value: merit for value, merit in merits.items() if value != damping.value}
        beside = ", ".join(
            f"{chosen / merit if merit else math.inf:.2g} at {value:g}"
            for value, merit in others.items()
        )
        told = f"predicted KL beside it, at equal forgetting: {beside}"
    return (
        f"damping {damping.value:g} times the mean eigenvalue, chosen on held-out retain data "
        f"({told})"
    )
