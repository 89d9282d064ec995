"""Pseudo-labels: random output gradients whose covariance is the Fisher matrix of the outputs.

Both draws have E[u uᵀ] = diag(p) − p pᵀ for the logit gradient u of one token, so curvature
estimated with either has the Gauss-Newton matrix as its expectation. Every random number is a hash
of (seed, stream, sequence, position): it does not depend on batch size, order, padding, restarts or
processes.

Shapes: N loss tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Draw = Callable[[Tensor, Tensor], Tensor]
"""(probabilities [N, V], keys [N] int64) -> logit gradients u [N, V] of the log-likelihood."""


def token_keys(seed: int, stream: int, id_N: Tensor, position_N: Tensor) -> Tensor:
    """One 64-bit key per token; draws of different ``stream`` are independent."""
    # Made on the device: to copy a number to it would wait for all work there.
    start = torch.full_like(id_N, (seed * 0x1_0000_0001 + stream) % 2**63)
    return _mix(_mix(_mix(start) ^ id_N) ^ position_N)


def sampled_labels(p_NV: Tensor, key_N: Tensor) -> Tensor:
    """u = onehot(ŷ) − p with ŷ ~ p, by inverse CDF from one uniform number per token."""
    uniform_N = ((key_N >> 11) & (2**53 - 1)).to(torch.float64) / 2**53
    cumulative_NV = p_NV.cumsum(dim=1)
    # Scaled by the last entry: rounding must not leave a gap above it.
    threshold_N1 = uniform_N[:, None].to(p_NV.dtype) * cumulative_NV[:, -1:]
    label_N1 = torch.searchsorted(cumulative_NV, threshold_N1, right=True)
    label_N1.clamp_(max=p_NV.shape[1] - 1)
    return torch.neg(p_NV).scatter_add_(1, label_N1, torch.ones_like(threshold_N1))


def square_root_draw(p_NV: Tensor, key_N: Tensor) -> Tensor:
    """u = s − p·Σ(s), s = √p ∘ ε, with an independent random sign ε for every vocabulary entry.

    Cov s = diag(p), and subtracting p·Σ(s) projects it to diag(p) − p pᵀ. If p is nearly one-hot, a
    sampled label is almost always the argmax, whose gradient is nearly zero; here every token
    contributes.
    """
    s_NV = p_NV.sqrt().mul_(_signs(key_N, p_NV.shape[1], p_NV.dtype))
    return s_NV.sub_(p_NV * s_NV.sum(dim=1, keepdim=True))


def _mix(x: Tensor) -> Tensor:
    """The splitmix64 finaliser (Steele, Lea, Flood 2014) in wrapping int64 arithmetic."""
    x = x + -7046029254386353131
    x = (x ^ _shift(x, 30)) * -4658895280553007687
    x = (x ^ _shift(x, 27)) * -7723592293110705685
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (``>>`` is arithmetic)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signs(key_N: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Random signs [N, count]: 64 from each hash, a table turning each byte into eight."""
    words = torch.arange(1, -(-count // 64) + 1, device=key_N.device)
    hashes = _mix(key_N[:, None] ^ _mix(words))
    index = hashes.contiguous().view(torch.uint8).to(torch.int32)
    bits = torch.arange(256, device=key_N.device)[:, None] >> torch.arange(8, device=key_N.device)
    table = (2 * (bits & 1) - 1).to(dtype)
    signs = torch.nn.functional.embedding(index, table)
    return signs.reshape(len(key_N), -1)[:, :count]
