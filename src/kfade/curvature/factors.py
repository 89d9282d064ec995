"""Streaming sums: the Kronecker factors A and S, and eigenvalues in a given basis.

Sums end in an underscore; normalised estimates are functions of sum and count. Rows in bfloat16 are
multiplied in bfloat16 and each product is rounded to it once; sums over products are float32 or
better.

Shapes: R rows (live positions of a batch), D width of a factor, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kfade.models.targets import Target

PANEL = 192  # columns of a symmetric product at a time; saves nearly half of its flops


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for data in float64."""
    return torch.promote_types(dtype, torch.float32)


def widths(group: Sequence[Target]) -> list[int]:
    """Widths of the factors of ``group``: I of each distinct input, O of each layer."""
    inputs = {target.input_of: target.shape[1] for target in group}
    return [*inputs.values(), *(target.shape[0] for target in group)]


def factor_bytes(group: Sequence[Target]) -> int:
    """Bytes of the factors A and S of ``group``, and of its bases: Σ over distinct inputs I² + Σ
    over layers O²."""
    return sum_dtype(group[0].weight.dtype).itemsize * sum(width**2 for width in widths(group))


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


def rows_first(mean_length: float, other_width: int, readers: int = 1) -> bool:
    """Whether rotating one side's rows costs less than rotating each sequence's product.

    Rotating R rows costs R·D² multiplications, once for all layers that read them (``readers``);
    rotating products costs O·I·D for each sequence and layer. So rows are cheaper for sequences
    that are shorter than the other side is wide, times ``readers``.
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
    """Add Σ_sequences (Q_Oᵀ (Σ_t g_t a_tᵀ) Q_I)∘² to ``sum_OI``; a basis that is None is I.

    ``lengths`` are the numbers of rows of the sequences; rows of a sequence are consecutive.
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
