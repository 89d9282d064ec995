"""The damping of a run, chosen on held-out retain data at its first step.

A step along r(λ) = (G̃ + λI)⁻¹g raises the objective by α gᵀr at a KL of ½α² rᵀGr, with the exact
Gauss-Newton matrix G of held-out retain data. So at equal forgetting the KL is proportional to the
inverse of

    merit(λ) = (gᵀr)² / rᵀGr.

G⁻¹g has the greatest merit. G̃ is an estimate of G from other data: damping bounds a step where G̃ is
too small by chance, and too much of it turns the step to the gradient, which ignores G.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kfade.curvature.damping import Damping

BEGIN, WEAKEST, STRONGEST = -2, -6, 2  # powers of ten, times each layer's mean eigenvalue
ENOUGH = 1.2  # factor of the merit for which a tenth of the damping is taken


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
    while power > WEAKEST and of(power - 1) >= ENOUGH * of(power):
        power -= 1
    while power < STRONGEST and ENOUGH * of(power + 1) >= max(merits.values()):
        power += 1
    return Damping(10.0**power), {10.0**tried: merits[tried] for tried in sorted(merits)}


def damping_line(damping: Damping, merits: Mapping[float, float]) -> str:
    """One line of text about the choice: the KL of each damping beside that of the chosen one."""
    chosen = merits[damping.value]
    others = [value for value in merits if value != damping.value]
    beside = ", ".join(f"{chosen / merits[value]:.2g} at {value:g}" for value in others)
    return (
        f"damping {damping.value:g} times the mean eigenvalue, chosen on held-out retain data "
        f"(predicted KL beside it, at equal forgetting: {beside})"
    )
