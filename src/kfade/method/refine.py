"""Refinement of the K-FADE direction by conjugate gradients on exact Gauss-Newton products.

    (G + D) r = g,   D = λI, or λ times each layer's mean eigenvalue of G̃

preconditioned with the fit, G̃ + D. The first iterate is K-FADE's (G̃ + D)⁻¹g up to scale. Each
further iteration costs an exact product and a solve, and takes into account what the fit neglects:
coupling between layers, and entries off the diagonal in the eigenbases.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping

import torch
from torch import Tensor

from kfade.curvature.curvature import Curvature
from kfade.curvature.damping import Damping
from kfade.curvature.vectors import OnDevice, Storage, Vector, keep, only
from kfade.method.step import Choose, Step, gauss_newton_step
from kfade.runtime.stages import stage


class Directions:
    """The K-FADE step, then the step after each of ``iterations`` iterations, computed on demand.

    Each is scaled to ‖r‖_G̃ = 1. The first costs no product, the second two, each later one a
    product and a solve. The solver's vectors (g, r, s, p, (G + D) p) are in memory from the second
    direction on, and freed before the last is returned.

    Args:
        product: δ ↦ Gδ with the exact G.
        iterations: iterations of conjugate gradients after the K-FADE step.
        storage: keeps the vectors; one layer of each is needed at a time.
        choose: the layers that a step changes, see :func:`~kfade.method.step.gauss_newton_step`.
    """

    def __init__(
        self,
        curvature: Curvature,
        gradient: Vector,
        product: Callable[[Vector], MutableMapping[str, Tensor]],
        *,
        damping: Damping,
        iterations: int,
        storage: Storage = OnDevice(),
        choose: Choose | None = None,
    ) -> None:
        self._curvature, self._gradient, self._product = curvature, gradient, product
        self._choose = choose
        self._damping, self._iterations, self._storage = damping, iterations, storage
        self._first: Step | None = None  # between the first direction and the second
        self._system: _System | None = None  # between the second and the last
        self.refined = -1
        """Iterations behind the latest direction: 0 for the K-FADE step, −1 before it."""

    def next(self) -> Step | None:
        """The next step; None after the last, or if the system is solved to rounding.

        Raises:
            InputError: a direction has no length.
        """
        if self.refined < 0:
            return self._begin()
        if self.refined == self._iterations:
            return None
        if self._first is not None:
            self._system = _System(
                self._curvature, self._gradient, self._product, self._damping, self._storage
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
        """The last step; holds one of the others at a time."""
        latest = self.next()
        assert latest is not None
        while (later := self.next()) is not None:
            latest = later
        return latest

    def _begin(self) -> Step:
        with stage("step"):
            step = gauss_newton_step(
                self._curvature,
                self._gradient,
                self._damping,
                self._storage,
                choose=self._choose,
            )
        self.refined = 0
        if self._iterations > 0:
            self._first = step
        else:
            self._gradient = {}
        return step


class _System:
    """Conjugate gradients for (G + D) r = g: iterate r, residual s = g − (G + D) r, last search
    direction p."""

    def __init__(
        self,
        curvature: Curvature,
        gradient: Vector,
        product: Callable[[Vector], MutableMapping[str, Tensor]],
        damping: Damping,
        storage: Storage,
    ) -> None:
        self._curvature, self._product, self._damping = curvature, product, damping
        self._storage = storage
        self._ridge = {name: curvature.ridge(name, damping) for name in curvature.blocks}
        self._g = only(gradient, self._ridge)
        self._r = storage.vector()
        self._s = storage.vector()
        eps = 0.0
        for name, matrix in self._g.items():
            self._r[name], self._s[name] = torch.zeros_like(matrix), matrix
            eps = max(eps, torch.finfo(matrix.dtype).eps)
        self._p: Vector = {}
        self._q: Vector = {}
        self._rounding = (10 * eps) ** 2 * inner(self._g, self._g)

    @property
    def solved(self) -> bool:
        """Whether the residual is no larger than rounding."""
        return inner(self._s, self._s) <= self._rounding

    def advance(self, p: Vector) -> None:
        """Minimise ½ rᵀ(G + D) r − gᵀr along p; q = (G + D) p."""
        self._p, self._q = p, {}  # frees the old ones before the product
        q = self._product(p)
        for name, value in self._ridge.items():
            q[name] = q[name] + value * p[name]
        self._q = q
        along = inner(p, self._s) / inner(p, self._q)
        add(self._r, along, p)
        add(self._s, -along, self._q)

    def conjugate(self) -> Vector:
        """The next search direction: (G̃ + D)⁻¹s made conjugate to p, pᵀ(G + D) next = 0."""
        z = self._curvature.solve(self._s, self._damping, self._storage)
        add(z, -inner(z, self._q) / inner(self._p, self._q), self._p)
        return z

    def step(self) -> Step:
        """r, scaled to ‖r‖_G̃ = 1; a copy, since later iterations change r."""
        with stage("refine"):
            r = keep(self._r, self._storage)
            blocks, g = self._curvature.blocks, self._g
            slopes = {name: inner({name: g[name]}, {name: r[name]}) for name in r}
            squares = {name: float(blocks[name].quadratic(r[name]).double()) for name in r}
            return Step(r, slopes, squares).unit()


def inner(x: Vector, y: Vector) -> float:
    """xᵀy, summed in float64."""
    return float(sum((x[name] * y[name]).sum(dtype=torch.float64) for name in x))


def add(x: MutableMapping[str, Tensor], factor: float, y: Vector) -> None:
    """x ← x + factor · y, one layer at a time; replaces the tensors, does not write into them."""
    for name in x:
        x[name] = torch.add(x[name], y[name], alpha=factor)
