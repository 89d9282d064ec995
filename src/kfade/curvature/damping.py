"""Damping: what is added to the eigenvalues of each layer's curvature before it is inverted."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kfade.errors import InputError


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
        if not (math.isfinite(self.value) and self.value >= 0):
            option = "--relative-damping" if self.relative else "--damping"
            raise InputError(f"{option} {self.value}: give a finite number, 0 or more")

    def of(self, mean: float) -> float:
        """λ of a layer with that mean eigenvalue."""
        return self.value * mean if self.relative else self.value
