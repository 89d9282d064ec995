"""Forgetting objectives: per-token functions whose *increase* is forgetting.

A step ascends the objective. So cross-entropy has a plus sign and the margin a minus sign.

Shapes: N loss tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Objective = Callable[[Tensor, Tensor], Tensor]
"""(logits [N, V] in float32 or better, targets [N]) -> values [N]."""


def cross_entropy(logits_NV: Tensor, target_N: Tensor) -> Tensor:
    """−log p_y. Its gradient (p − onehot) vanishes as p_y → 1: weak on memorised text."""
    return torch.nn.functional.cross_entropy(logits_NV, target_N, reduction="none")


def margin(logits_NV: Tensor, target_N: Tensor) -> Tensor:
    """The negated margin −(z_y − log Σ_{i≠y} exp z_i) (paper §3, "Suppression objective").

    Its gradient in the logits is −1 at y and the softmax over the other tokens elsewhere, whatever
    p_y is: ∇ce = (1 − p_y) ∇margin. A masked logsumexp keeps it accurate for p_y near 1.
    """
    target_N1 = target_N[:, None]
    others_NV = logits_NV.scatter(1, target_N1, float("-inf"))
    return others_NV.logsumexp(dim=1) - logits_NV.gather(1, target_N1)[:, 0]
