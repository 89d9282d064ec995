"""The K-FADE direction, improved by conjugate gradients on exact Gauss-Newton products.

    (G + D) r = g,   D = λI, or λ times each layer's mean eigenvalue of G̃

with G̃ + D, the fit itself, as the preconditioner. The first iterate is K-FADE's (G̃ + D)⁻¹g but for
its scale. Each further one costs an exact product and a solve, and sees of G what the fit leaves
out along the way: what couples layers, and what is off the diagonal of their bases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from kfade.curvature.curvature import Curvature, Matrices
from kfade.method.step import Step, gauss_newton_step, unit_step
from kfade.runtime.stages import stage


def refined_steps(
    curvature: Curvature,
    gradient: Mapping[str, Tensor],
    product: Callable[[Matrices], Matrices],
    *,
    damping: float,
    relative: bool,
    iterations: int,
) -> Iterator[Step]:
    """The K-FADE step, then one after each of ``iterations`` further iterations.

    Each is scaled to ‖r‖_G̃ = 1. Ends early where the system is solved as far as the dtype goes.
    The first step costs no product, k further ones k + 1.

    Args:
        product: δ ↦ Gδ with the exact G.
        damping: λ, or λ as a multiple of each layer's mean eigenvalue if ``relative``.

    Raises:
        InputError: a direction has no length.
    """
    with stage("step"):
        step = gauss_newton_step(curvature, gradient, damping=damping, relative=relative)
    yield step
    if iterations == 0:
        return
    system = _System(curvature, gradient, product, damping, relative)
    with stage("refine"):
        system.advance(step.direction)
    del step  # a vector less to hold from here on
    for _ in range(iterations):
        if system.solved:
            return
        with stage("refine"):
            system.advance(system.conjugate())
        yield system.step()


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
