"""Sophia: steps by the clipped ratio of a mean gradient to a mean curvature.

Liu et al. 2023, as SOUL (Jia et al. 2024) uses it for unlearning: the diagonal of the Hessian is a
moving average of the squared gradients of the loss itself, updated at every step.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import Optimizer

# The published optimiser multiplies its curvature by the number of tokens in a batch. SOUL does not
# set it, so the default of 5120 applies.
TOKENS = 5120
TINY = 1e-15


class Sophia(Optimizer):
    """m ← β₁m + (1−β₁)g,  h ← β₂h + (1−β₂)g²,  θ ← (1 − ηw)θ − η sign(m) min(|m| / (ρnh + ε), 1).

    Args:
        params: tensors, or groups of them.
        lr: η.
        betas: (β₁, β₂).
        rho: ρ; n is ``TOKENS``.
        weight_decay: w.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        rho: float = 0.04,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "rho": rho, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step along the gradients that the tensors hold."""
        assert closure is None, "gradients are computed before the step"
        for group in self.param_groups:
            for tensor in group["params"]:
                if tensor.grad is not None:
                    self._step(tensor, group)

    def _step(self, tensor: torch.Tensor, group: dict[str, Any]) -> None:
        state, gradient = self.state[tensor], tensor.grad
        assert gradient is not None
        if not state:
            state["average"] = torch.zeros_like(tensor)
            state["curvature"] = torch.zeros_like(tensor)
        average, curvature = state["average"], state["curvature"]
        first, second = group["betas"]
        average.mul_(first).add_(gradient, alpha=1 - first)
        curvature.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        ratio = average.abs() / (group["rho"] * TOKENS * curvature + TINY)
        tensor.mul_(1 - group["lr"] * group["weight_decay"])
        tensor.addcmul_(average.sign(), ratio.clamp_(max=1), value=-group["lr"])
