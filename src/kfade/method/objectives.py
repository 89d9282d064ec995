"""Forgetting objectives: per-token functions whose *increase* is forgetting.

A step ascends the objective. So cross-entropy has a plus sign and the margin a minus sign.

Shapes: N loss tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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


@dataclass(frozen=True)
class BoundedMargin:
    """−log(1 + exp(limit − m)) of m = :func:`margin`: lets go of a token that is unlikely already.

    Its gradient is σ(limit − m) times the margin's, so that it vanishes once p_y is well below
    1 / (1 + exp(limit)): forgetting spreads over more of a text's tokens, at more KL. With a high
    limit it is the margin less a constant; with 0 it is log(1 − p_y), the unlikelihood objective
    (Welleck et al. 2020).
    """

    limit: float
    """Of m, in nats below even odds."""

    def __call__(self, logits_NV: Tensor, target_N: Tensor) -> Tensor:
        """Values [N]."""
        return torch.nn.functional.logsigmoid(margin(logits_NV, target_N) - self.limit)
