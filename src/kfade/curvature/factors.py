"""Streaming sums: the Kronecker factors A and S, and eigenvalues in a given basis.

Sums end in an underscore; normalised estimates are functions of sum and count. Inputs may be
bfloat16, sums are float32 or better.

Shapes: R rows (live positions of a batch), D width of a factor, O outputs, I inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kfade.errors import InputError

PANEL = 512  # columns of a symmetric product at a time; half its arithmetic is the lower triangle


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 where the data are."""
    return torch.promote_types(dtype, torch.float32)


class CovarianceSum:
    """Σ rowᵀ row over streamed rows, lower triangle of [D, D], in panels."""

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.width = width
        self.sum_ = torch.zeros(width, width, dtype=dtype, device=device)

    def add(self, rows_RD: Tensor) -> None:
        """Add rows."""
        rows_RD = rows_RD.to(self.sum_.dtype)
        for start in range(0, rows_RD.shape[1], PANEL):
            stop = min(start + PANEL, rows_RD.shape[1])
            self.sum_[start:, start:stop].addmm_(rows_RD[:, start:].T, rows_RD[:, start:stop])

    def mean(self, count: int) -> Tensor:
        """The symmetric matrix Σ / count."""
        lower = torch.tril(self.sum_)
        return (lower + torch.tril(lower, -1).T) / count

    def free(self) -> None:
        """Give the memory back."""
        self.sum_ = self.sum_.new_empty(0)


def eigendecompose(matrix_DD: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """(eigenvalues [D] clamped at 0, eigenvectors [D, D] in columns) of a symmetric matrix.

    Checked by its residual ‖MQ − QΛ‖ / ‖M‖; a failure is repeated in float64 on the CPU.

    Raises:
        InputError: the matrix holds NaN or Inf.
    """
    if not torch.isfinite(matrix_DD).all():
        raise InputError(f"NaN or Inf in the curvature of {name}: look at the model's weights")
    # A backward-stable eigh leaves a residual of a few D·eps; 1e-4 is far above it in float32 and
    # far below anything that would change a step.
    for attempt in (matrix_DD, matrix_DD.cpu().double()):
        try:
            values, vectors = torch.linalg.eigh(attempt)
        except torch.linalg.LinAlgError:
            continue
        residual = (attempt @ vectors - vectors * values).norm()
        if residual <= 1e-4 * attempt.norm():
            # Contiguous, as it is when read from a file: products then agree to the last bit.
            return values.clamp(min=0).to(matrix_DD), vectors.to(matrix_DD).contiguous()
    raise RuntimeError(f"the eigendecomposition of {name} failed in float64 too")


def sequence_squares(
    gradients_RO: Tensor, inputs_RI: Tensor, lengths: list[int], sum_OI: Tensor, work_OI: Tensor
) -> None:
    """Add Σ_sequences (Σ_t g_t a_tᵀ)∘² to ``sum_OI``; rows of one sequence are consecutive."""
    start = 0
    for length in lengths:
        rows = slice(start, start + length)
        torch.mm(gradients_RO[rows].T, inputs_RI[rows], out=work_OI)
        sum_OI.addcmul_(work_OI, work_OI)
        start += length
