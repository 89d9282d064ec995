"""One Gauss-Newton step: its direction and its unit of length."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kfade.curvature.curvature import Curvature
from kfade.curvature.damping import Damping
from kfade.curvature.vectors import Layerwise, OnDevice, Storage, Vector
from kfade.errors import InputError
from kfade.models.targets import named


class NoGradientError(InputError):
    """The forget gradient is zero: the objective has nothing to raise."""

    what = "no gradient of the objective is left"


@dataclass(frozen=True)
class Step:
    """A direction r in weight space; the change of weights is α r."""

    direction: Vector
    slopes: Mapping[str, float]
    """gᵀr of each layer: predicted change of the objective per unit of α."""
    squares: Mapping[str, float]
    """rᵀG̃r of each layer."""

    @property
    def slope(self) -> float:
        """Predicted change of the objective per unit of α: gᵀr."""
        return sum(self.slopes.values())

    @property
    def square(self) -> float:
        """‖r‖²_G̃ = rᵀG̃r."""
        return sum(self.squares.values())

    def predicted_kl(self, alpha: float) -> float:
        """½ (αr)ᵀG̃(αr) in nats per loss token."""
        return 0.5 * self.square * alpha**2

    def scaled(self, factor: float) -> Step:
        """The same direction, ``factor`` times as long."""
        return self.weighted(dict.fromkeys(self.direction, factor))

    def weighted(self, weights: Mapping[str, float]) -> Step:
        """The direction with each layer multiplied by its weight."""
        direction = self.direction
        return Step(
            Layerwise(direction, lambda name: direction[name] * weights[name]),
            {name: slope * weights[name] for name, slope in self.slopes.items()},
            {name: square * weights[name] ** 2 for name, square in self.squares.items()},
        )

    def unit(self) -> Step:
        """The direction scaled to ‖r‖_G̃ = 1.

        Raises:
            InputError: its length is zero or not finite.
        """
        square = self.square
        if not (math.isfinite(square) and square > 0):
            raise InputError(
                f"the step's squared length in the G-norm is {square}: the damping is too small "
                "for this curvature; raise it"
            )
        return self.scaled(square**-0.5)


Choose = Callable[[Mapping[str, float]], Collection[str]]
"""gᵀr of each layer by its name -> the layers to change."""


def gauss_newton_step(
    curvature: Curvature,
    gradient: Vector,
    damping: Damping,
    storage: Storage = OnDevice(),
    *,
    choose: Choose | None = None,
) -> Step:
    """r = (G̃ + λI)⁻¹g, scaled so that ‖r‖_G̃ = 1 over all layers together (paper §3, "Step size").

    Needs one layer of each at a time; r is kept in ``storage``.

    Args:
        choose: the layers that r has; all when None.

    Raises:
        NoGradientError: the gradient is zero in all layers.
        InputError: rᵀG̃r is zero or not finite.
    """
    direction = storage.vector()
    # rᵀG̃r, gᵀr and ‖g‖² of each layer, on the device; reading one would wait for all work there.
    found: dict[str, Tensor] = {}
    for name, block in curvature.blocks.items():  # in each layer's eigenbasis: r̃ = g̃ / (Λ + λ)
        g = block.rotate(gradient[name])
        r = block.divide(g, curvature.ridge(name, damping))
        sums = ((block.eigenvalues * r.square()).sum(), (g * r).sum(), g.square().sum())
        found[name] = torch.stack([sum_.double() for sum_ in sums])
        direction[name] = block.rotate_back(r)
    numbers = dict(zip(found, torch.stack([*found.values()]).tolist(), strict=True))
    if choose is not None:
        chosen = choose({name: slope for name, (_, slope, _) in numbers.items()})
        for name in found.keys() - chosen:
            del direction[name], numbers[name]
    if not any(gradient_square for *_, gradient_square in numbers.values()):
        raise NoGradientError(
            f"the forget gradient is zero in all targeted weights ({named(direction)}): no "
            "gradient of the forget set reaches them; look at the forget set (is all of it certain "
            "already?), or target others"
        )
    squares = {name: square for name, (square, _, _) in numbers.items()}
    if not any(squares.values()):
        raise InputError(
            "the retain set has no curvature where the forget gradient lies: a step there cannot "
            "be measured; add retain text that uses the targeted weights, or target others"
        )
    return Step(direction, {name: slope for name, (_, slope, _) in numbers.items()}, squares).unit()
