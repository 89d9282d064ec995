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
from kfade.stages import stage
from kfade.step import Step, gauss_newton_step, unit_step


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
    with stage("refine"):
        ridge = {name: block.damping(damping, relative) for name, block in curvature.blocks.items()}
        g = {name: gradient[name] for name in ridge}
        system = _System(product, ridge, g)
        p = step.direction
        q = system.advance(p)
    for _ in range(iterations):
        with stage("refine"):
            if system.solved:
                return
            z = curvature.solve(system.s, damping=damping, relative=relative)
            add(z, -inner(z, q) / inner(p, q), p)
            p = z
            q = system.advance(p)
            r = system.r
            step = unit_step(r, inner(g, r), curvature.quadratic(r))
        yield step


class _System:
    """(G + D) r = g, solved so far as r; s = g − (G + D) r is left."""

    def __init__(
        self,
        product: Callable[[Matrices], Matrices],
        ridge: Mapping[str, float],
        g: Mapping[str, Tensor],
    ) -> None:
        self._product, self._ridge = product, ridge
        self.r = {name: torch.zeros_like(matrix) for name, matrix in g.items()}
        self.s = dict(g)
        eps = max(torch.finfo(matrix.dtype).eps for matrix in g.values())
        self._rounding = (10 * eps) ** 2 * inner(g, g)

    @property
    def solved(self) -> bool:
        """Whether what is left of g is no more than rounding."""
        return inner(self.s, self.s) <= self._rounding

    def advance(self, p: Matrices) -> Matrices:
        """Along p to the least ½ rᵀ(G + D) r − gᵀr; returns (G + D) p."""
        q = self._product(p)
        for name, value in self._ridge.items():
            q[name] = q[name] + value * p[name]
        along = inner(p, self.s) / inner(p, q)
        add(self.r, along, p)
        add(self.s, -along, q)
        return q


def inner(x: Mapping[str, Tensor], y: Mapping[str, Tensor]) -> float:
    """xᵀy, summed in float64."""
    return sum((x[name] * y[name]).sum(dtype=torch.float64).item() for name in x)


def add(x: Matrices, factor: float, y: Mapping[str, Tensor]) -> None:
    """x ← x + factor · y in the dictionary, one layer at a time; no tensor is written to."""
    for name in x:
        x[name] = torch.add(x[name], y[name], alpha=factor)
