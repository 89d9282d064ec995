"""Streaming sums: the Kronecker factors A and S, and eigenvalues in a given basis.

Sums end in an underscore; normalised estimates are functions of sum and count. Rows may be
bfloat16: they are multiplied as such, each product is rounded once to bfloat16, and all sums over
products are float32 or better.

Shapes: R rows (live positions of a batch), D width of a factor, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kfade.errors import InputError

PANEL = 192  # columns of a symmetric product at a time: nearly half its arithmetic is spared
PROBES = 8  # random columns that an eigendecomposition is checked on


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 where the data are."""
    return torch.promote_types(dtype, torch.float32)


def add_product(sum_: Tensor, left: Tensor, right: Tensor) -> None:
    """sum_ += left @ right, in one product where the dtypes agree."""
    if left.dtype == sum_.dtype:
        sum_.addmm_(left, right)
    else:
        sum_.add_(left @ right)


class CovarianceSum:
    """Σ rowᵀ row over streamed rows, lower triangle of [D, D], in panels."""

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.width = width
        self.sum_ = torch.zeros(width, width, dtype=dtype, device=device)

    def add(self, rows_RD: Tensor) -> None:
        """Add rows."""
        for start in range(0, self.width, PANEL):
            stop = min(start + PANEL, self.width)
            add_product(self.sum_[start:, start:stop], rows_RD[:, start:].T, rows_RD[:, start:stop])

    def mean(self, count: int) -> Tensor:
        """The symmetric matrix Σ / count."""
        mean_DD = self.sum_ / count
        for start in range(0, self.width, PANEL):
            stop = min(start + PANEL, self.width)
            mean_DD[start:stop, stop:] = mean_DD[stop:, start:stop].T
        return mean_DD

    def free(self) -> None:
        """Give the memory back."""
        self.sum_ = self.sum_.new_empty(0)


def eigendecompose(matrix_DD: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """(eigenvalues [D] clamped at 0, eigenvectors [D, D] in columns) of a symmetric matrix.

    Checked by its residual ‖(MQ − QΛ)X‖ / ‖M‖ on a few random columns X, which costs nothing
    beside the decomposition and shows a wrong one as surely; a failure is repeated in float64 on
    the CPU.

    Raises:
        InputError: the matrix holds NaN or Inf.
    """
    if not torch.isfinite(matrix_DD).all():
        raise InputError(f"NaN or Inf in the curvature of {name}: look at the model's weights")
    # A backward-stable eigh leaves a residual of a few D·eps; 1e-4 is far above it in float32 and
    # far below anything that would change a step.
    for exactly in (False, True):
        attempt = matrix_DD.cpu().double() if exactly else matrix_DD
        try:
            values, vectors = torch.linalg.eigh(attempt)
        except torch.linalg.LinAlgError:
            continue
        probe_DK = _probe(attempt)
        residual = attempt @ (vectors @ probe_DK) - vectors @ (values[:, None] * probe_DK)
        if residual.norm() <= 1e-4 * (attempt.norm() * PROBES**0.5):
            # Contiguous, as it is when read from a file: products then agree to the last bit.
            return values.clamp(min=0).to(matrix_DD), vectors.to(matrix_DD).contiguous()
    raise RuntimeError(f"the eigendecomposition of {name} failed in float64 too")


def _probe(matrix_DD: Tensor) -> Tensor:
    """Random columns [D, PROBES] of unit variance: ‖MX‖² is about PROBES ‖M‖² (Frobenius)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(len(matrix_DD), PROBES, generator=generator).to(matrix_DD)


def rows_first(mean_length: float, other_width: int, readers: int = 1) -> bool:
    """Whether turning a side's rows costs less than turning each sequence's product.

    Rows cost R·D² multiplications, once for all ``readers`` of them; products O·I·D a sequence and
    reader: rows win for sequences shorter than the other side is wide.
    """
    return mean_length <= other_width * readers


def add_sequence_squares(
    sum_OI: Tensor,
    gradients_RO: Tensor,
    inputs_RI: Tensor,
    lengths: Sequence[int],
    *,
    q_out: Tensor | None = None,
    q_in: Tensor | None = None,
) -> None:
    """Add Σ_sequences (Q_Oᵀ (Σ_t g_t a_tᵀ) Q_I)∘² to ``sum_OI``; None is no basis.

    ``lengths`` are the rows of each sequence; rows of one sequence are consecutive.
    """
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        product_OI = gradients_RO[part].T @ inputs_RI[part]
        if q_in is not None:
            product_OI = product_OI @ q_in
        if q_out is not None:
            product_OI = q_out.T @ product_OI
        product_OI = product_OI.to(sum_OI.dtype)
        sum_OI.addcmul_(product_OI, product_OI)
        start += length
