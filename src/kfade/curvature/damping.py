"""Damping: what is added to the eigenvalues of each layer's curvature before it is inverted."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kfade.errors import InputError


def check_damping(option: str, value: float) -> None:
    """Raises InputError where an option has a ``value`` that is negative or not finite."""
    if not (math.isfinite(value) and value >= 0):
        raise InputError(f"{option} {value}: give a finite number, 0 or more")


@dataclass(frozen=True)
class Damping:
    """λ of each layer in (G̃ + λI)⁻¹: a number, or a multiple of the layer's mean eigenvalue.

    Experts of one parameter have one λ, see :meth:`~kfade.curvature.curvature.Curvature.ridge`.

    Raises:
        InputError: ``value`` is negative or not finite.
    """

    value: float = 0.1
    """λ, or its multiple of the mean eigenvalue."""
    relative: bool = True
    """Whether ``value`` is a multiple of the mean eigenvalue."""

    def __post_init__(self) -> None:
        check_damping("--relative-damping" if self.relative else "--damping", self.value)

    def of(self, mean: float) -> float:
        """λ of a layer with that mean eigenvalue."""
        return self.value * mean if self.relative else self.value
