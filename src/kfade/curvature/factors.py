"""Streaming sums: the Kronecker factors A and S, and eigenvalues in a given basis.

Sums end in an underscore; normalised estimates are functions of sum and count. Rows in bfloat16 are
multiplied in bfloat16 and each product is rounded to it once; sums over products are float32 or
better.

Shapes: R rows (live positions of a batch), D width of a factor, O outputs, I inputs, S sequences,
T positions of a sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kfade.models.targets import Target

PANEL = 192  # columns of a symmetric product at a time; saves nearly half of its flops
WIDE = 1024
"""From this width on, a CPU takes 0.6 to 0.95 times as long for bfloat16 products of a transposed
copy of the rows, made once for all panels, as of a transposed view; below up to 1.3 times."""
SLAB_BYTES = {"cuda": 2**26}
"""Bytes of sequences' products [O, I] that are computed together, by type of device. On a GPU this
saves launches of small products; how much has not been measured. On other devices sequences follow
one another: on a CPU slabs of 8 to 32 MB took 1.2 to 1.6 times as long as that."""
PADDING = 1.5  # sequences are computed together if padding adds at most half to their rows


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for data in float64."""
    return torch.promote_types(dtype, torch.float32)


def widths(group: Sequence[Target]) -> list[int]:
    """Widths of the factors of ``group``: I of each input factor, O of each layer."""
    inputs = {target.input_of: target.shape[1] for target in group}
    return [*inputs.values(), *(target.shape[0] for target in group)]


def factor_bytes(group: Sequence[Target]) -> int:
    """Bytes of the factors A and S of ``group``, and of its bases: Σ over input factors I² + Σ
    over layers O²."""
    return sum_dtype(group[0].dtype).itemsize * sum(width**2 for width in widths(group))


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
        left_DR = rows_RD.T
        if rows_RD.device.type == "cpu" and rows_RD.dtype == torch.bfloat16 and self.width >= WIDE:
            left_DR = left_DR.contiguous()
        for start in range(0, self.width, PANEL):
            stop = min(start + PANEL, self.width)
            add_product(self.sum_[start:, start:stop], left_DR[start:], rows_RD[:, start:stop])

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
    slab = SLAB_BYTES.get(sum_OI.device.type, 0)
    together = max(1, slab // (sum_OI.numel() * sum_OI.element_size()))
    for product in _products(gradients_RO, inputs_RI, lengths, together):
        if q_in is not None:
            product = product @ q_in
        if q_out is not None:
            product = q_out.T @ product
        product = product.to(sum_OI.dtype)
        if product.dim() == 2:
            sum_OI.addcmul_(product, product)
        else:
            sum_OI.add_(product.square_().sum(dim=0))


def _products(
    gradients_RO: Tensor, inputs_RI: Tensor, lengths: Sequence[int], together: int
) -> Iterator[Tensor]:
    """Σ_t g_t a_tᵀ of each sequence, [O, I], or of up to ``together`` sequences at once, [S, O, I].

    Sequences that are computed at once are padded with rows of zeros, which add nothing.
    """
    gradients, inputs = gradients_RO.split(list(lengths)), inputs_RI.split(list(lengths))
    for start in range(0, len(lengths), together):
        some = slice(start, start + together)
        rows = lengths[some]
        if len(rows) > 1 and len(rows) * max(rows) <= PADDING * sum(rows):
            g_STO = pad_sequence(gradients[some], batch_first=True)
            a_STI = pad_sequence(inputs[some], batch_first=True)
            yield torch.bmm(g_STO.mT, a_STI)
        else:
            for g_TO, a_TI in zip(gradients[some], inputs[some], strict=True):
                yield g_TO.T @ a_TI
