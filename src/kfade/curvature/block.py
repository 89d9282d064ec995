"""One layer's curvature: optional orthogonal bases and a grid of eigenvalues.

    G_layer = (Q_O ⊗ Q_I) diag(Λ) (Q_O ⊗ Q_I)ᵀ

Estimators differ in how bases and eigenvalues are estimated, not in their use, so one class serves
all. Matrices X [O, I] represent vectors; X̃ = Q_Oᵀ X Q_I.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PARTS = ("q_out", "q_in", "eigenvalues")
"""The tensors of a block."""


@dataclass(frozen=True)
class EigenBlock:
    """q_out [O, O] or None (identity), q_in [I, I] or None, eigenvalues Λ [O, I] or [1, 1]."""

    q_out: Tensor | None
    q_in: Tensor | None
    eigenvalues: Tensor

    @property
    def mean_eigenvalue(self) -> float:
        """Mean of Λ."""
        return self.eigenvalues.mean().item()

    def rotate(self, x: Tensor) -> Tensor:
        """X̃ = Q_Oᵀ X Q_I."""
        if self.q_out is not None:
            x = self.q_out.T @ x
        return x if self.q_in is None else x @ self.q_in

    def rotate_back(self, x: Tensor) -> Tensor:
        """X = Q_O X̃ Q_Iᵀ."""
        if self.q_out is not None:
            x = self.q_out @ x
        return x if self.q_in is None else x @ self.q_in.T

    def to(self, device: torch.device | str) -> EigenBlock:
        """The same block on another device."""
        bases = [q if q is None else q.to(device) for q in (self.q_out, self.q_in)]
        return EigenBlock(bases[0], bases[1], self.eigenvalues.to(device))

    def solve(self, x: Tensor, damping: float) -> Tensor:
        """(G + λI)⁻¹ X with the exact damping Λ + λ, never split over the factors; see
        :meth:`divide`."""
        return self.rotate_back(self.divide(self.rotate(x), damping))

    def divide(self, x: Tensor, damping: float) -> Tensor:
        """X̃ / (Λ + λ), and 0 where Λ + λ = 0.

        Without curvature or damping nothing limits a step, so there is none. With λ a multiple of
        the layer's mean eigenvalue this is so for every layer that the retain set does not reach.
        """
        total = self.eigenvalues + damping
        return torch.where(total > 0, x / total, 0.0)

    def matvec(self, x: Tensor) -> Tensor:
        """G X."""
        return self.rotate_back(self.rotate(x) * self.eigenvalues)

    def quadratic(self, x: Tensor) -> Tensor:
        """Xᵀ G X = Σ Λ ∘ X̃², a scalar."""
        return (self.rotate(x).square() * self.eigenvalues).sum()
