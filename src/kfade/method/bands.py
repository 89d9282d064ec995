"""A direction in bands of layers, each as long as the exact curvature says.

K-FAC has no curvature between layers. Layers next to each other do much the same to the outputs, so
that together they change them more than G̃ says. Let r_j be the part of a direction r in band j,
C_ij = r_iᵀGr_j with the exact G of held-out retain data, and s_j the rise of forgetting per unit of
length along r_j. Of all Σ c_j r_j,

    c ∝ C⁻¹s

has the least KL ½cᵀCc for its rise sᵀc (docs/mathematics.md). This is the coarse level of a
two-level preconditioner, in the span of one direction; Tselepidis et al. (2020) add one to K-FAC
for training.

At the original weights s_j is gᵀr_j. Later gᵀr_j may be far from what a step does: where texts are
half forgotten, a few tokens have most of the gradient and are saturated soon. Then s_j is measured,
over a length of about that of the step; and so it is where g is of some positions only.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from kfade.curvature.vectors import Vector, only
from kfade.method.step import Step
from kfade.models.targets import Target

RIDGE = 0.01  # of the diagonal of C, which a few held-out sequences do not give more exactly


Forms = Callable[[Sequence[Vector]], Tensor]
"""Vectors, each with matrices [O, I] by target -> their matrix C [K, K], in float64 on the CPU."""
Rise = Callable[[Vector, float], float]
"""(vector, its form r_jᵀGr_j) -> rise of forgetting along it, per unit of length."""


def in_bands(
    step: Step, targets: Sequence[Target], count: int, forms: Forms, rise: Rise | None = None
) -> tuple[Step, float]:
    """The step with each band at its best length, scaled to ‖r‖_G̃ = 1; and its exact form rᵀGr.

    Args:
        count: number of bands; a step in one band stays as it is, and so does one of which no part
            raises anything.
        rise: measures s_j; it is gᵀr_j when None.
    """
    bands = bands_of(targets, step.direction, count)
    parts = [only(step.direction, band) for band in bands]
    gram_KK = forms(parts)
    if len(bands) == 1 or not gram_KK.isfinite().all() or not gram_KK.any():
        return step, float(gram_KK.sum())
    slopes = [sum(step.slopes[name] for name in band) for band in bands]
    if rise is not None:
        slopes = [rise(*of) for of in zip(parts, gram_KK.diagonal().tolist(), strict=True)]
    slope_K = torch.tensor(slopes, dtype=torch.float64)
    if not (slope_K.isfinite().all() and (slope_K > 0).any()):
        return step, float(gram_KK.sum())
    best_K = best_weights(gram_KK, slope_K)
    weights = best_K.tolist()
    weighted = step.weighted(
        {name: weight for band, weight in zip(bands, weights, strict=True) for name in band}
    )
    return weighted.unit(), float(best_K @ gram_KK @ best_K) / weighted.square


def bands_of(targets: Sequence[Target], names: Collection[str], count: int) -> list[list[str]]:
    """The names of targets in at most ``count`` bands of consecutive blocks, about equally many
    blocks in each."""
    moved = [target for target in targets if target.name in names]
    blocks = sorted({target.block for target in moved})
    count = min(count, len(blocks))
    band = {block: index * count // len(blocks) for index, block in enumerate(blocks)}
    return [[t.name for t in moved if band[t.block] == number] for number in range(count)]


def best_weights(gram_KK: Tensor, slope_K: Tensor) -> Tensor:
    """c [K] ∝ C⁻¹s, with ``RIDGE`` times its diagonal added to C; 0 for a band that changes
    nothing."""
    length_K = gram_KK.diagonal().clamp(min=0).sqrt()
    per_K = torch.where(length_K > 0, 1 / length_K, 0.0)
    cosines_KK = per_K[:, None] * gram_KK * per_K
    eye_KK = torch.eye(len(slope_K), dtype=gram_KK.dtype)
    weight_K: Tensor = torch.linalg.solve(cosines_KK + RIDGE * eye_KK, per_K * slope_K)
    return per_K * weight_K
