"""The K-FADE direction, improved by conjugate gradients on exact Gauss-Newton products.

    (G + D) r = g,   D = λI, or λ times each layer's mean eigenvalue of G̃

with G̃ + D, the fit itself, as the preconditioner. The first iterate is K-FADE's (G̃ + D)⁻¹g but for
its scale. Each further one costs an exact product and a solve, and sees of G what the fit leaves
out along the way: what couples layers, and what is off the diagonal of their bases.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from kfade.curvature.curvature import Curvature, Matrices
from kfade.method.step import Step, gauss_newton_step, unit_step
from kfade.runtime.stages import stage


class Directions:
    """The K-FADE step, then one after each of ``iterations`` further iterations, made one by one.

    Each is scaled to ‖r‖_G̃ = 1. The first costs no product, the second two, each later one a
    product and a solve. The solver's vectors (g, r, s, p, (G + D) p) are held from the second
    direction on and let go before the last is given out.

    Args:
        product: δ ↦ Gδ with the exact G.
        damping: λ, or λ as a multiple of each layer's mean eigenvalue if ``relative``.
    """

    def __init__(
        self,
        curvature: Curvature,
        gradient: Mapping[str, Tensor],
        product: Callable[[Matrices], Matrices],
        *,
        damping: float,
        relative: bool,
        iterations: int,
    ) -> None:
        self._curvature, self._gradient, self._product = curvature, gradient, product
        self._damping, self._relative, self._iterations = damping, relative, iterations
        self._first: Step | None = None  # between the first direction and the second
        self._system: _System | None = None  # between the second and the last
        self.refined = -1
        """Further iterations that the latest direction took; −1 before the first."""

    def next(self) -> Step | None:
        """None after the last, or where the system is solved as far as the dtype goes.

        Raises:
            InputError: a direction has no length.
        """
        if self.refined < 0:
            return self._begin()
        if self.refined == self._iterations:
            return None
        if self._first is not None:
            self._system = _System(
                self._curvature, self._gradient, self._product, self._damping, self._relative
            )
            with stage("refine"):
                self._system.advance(self._first.direction)
            self._first = None
        system = self._system
        if system is None or system.solved:
            self._system = None
            return None
        with stage("refine"):
            system.advance(system.conjugate())
        self.refined += 1
        if self.refined == self._iterations:
            self._system = None
        return system.step()

    def last(self) -> Step:
        """The last of all; of those before it one at a time is held."""
        latest = self.next()
        assert latest is not None
        while (later := self.next()) is not None:
            latest = later
        return latest

    def _begin(self) -> Step:
        with stage("step"):
            step = gauss_newton_step(
                self._curvature, self._gradient, damping=self._damping, relative=self._relative
            )
        self.refined = 0
        if self._iterations > 0:
            self._first = step
        return step


class _System:
    """(G + D) r = g, solved so far as r; s = g − (G + D) r is left, p was the last direction."""

    def __init__(
        self,
        curvature: Curvature,
        gradient: Mapping[str, Tensor],
        product: Callable[[Matrices], Matrices],
        damping: float,
        relative: bool,
    ) -> None:
        self._curvature, self._product = curvature, product
        self._damping, self._relative = damping, relative
        blocks = curvature.blocks.items()
        self._ridge = {name: block.damping(damping, relative) for name, block in blocks}
        self._g = {name: gradient[name] for name in self._ridge}
        self._r = {name: torch.zeros_like(matrix) for name, matrix in self._g.items()}
        self._s = dict(self._g)
        self._p: Matrices = {}
        self._q: Matrices = {}
        eps = max(torch.finfo(matrix.dtype).eps for matrix in self._g.values())
        self._rounding = (10 * eps) ** 2 * inner(self._g, self._g)

    @property
    def solved(self) -> bool:
        """Whether what is left of g is no more than rounding."""
        return inner(self._s, self._s) <= self._rounding

    def advance(self, p: Matrices) -> None:
        """Along p to the least ½ rᵀ(G + D) r − gᵀr; q = (G + D) p."""
        self._p, self._q = p, {}  # the old ones are let go before the product
        self._q = self._product(p)
        for name, value in self._ridge.items():
            self._q[name] = self._q[name] + value * p[name]
        along = inner(p, self._s) / inner(p, self._q)
        add(self._r, along, p)
        add(self._s, -along, self._q)

    def conjugate(self) -> Matrices:
        """The next direction: (G̃ + D)⁻¹s, less its part along p, so that pᵀ(G + D) next = 0."""
        z = self._curvature.solve(self._s, damping=self._damping, relative=self._relative)
        add(z, -inner(z, self._q) / inner(self._p, self._q), self._p)
        return z

    def step(self) -> Step:
        """r, scaled to ‖r‖_G̃ = 1."""
        with stage("refine"):
            square = self._curvature.quadratic(self._r)
            return unit_step(self._r, inner(self._g, self._r), square)


def inner(x: Mapping[str, Tensor], y: Mapping[str, Tensor]) -> float:
    """xᵀy, summed in float64."""
    return sum((x[name] * y[name]).sum(dtype=torch.float64).item() for name in x)


def add(x: Matrices, factor: float, y: Mapping[str, Tensor]) -> None:
    """x ← x + factor · y in the dictionary, one layer at a time; no tensor is written to."""
    for name in x:
        x[name] = torch.add(x[name], y[name], alpha=factor)
