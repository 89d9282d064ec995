"""Eigendecompositions of the factors: checked, and on a CPU several at a time.

Shapes: D width of a factor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from kfade.errors import InputError

T = TypeVar("T")
R = TypeVar("R")
PROBES = 8  # random columns that a decomposition is checked on
WORKSPACE = 6  # matrices [D, D] of one decomposition: the mean, its copies, Q, work
AT_ONCE_BYTES = 500_000_000  # that the workspaces of decompositions beside the first may take


def at_once(width: int, size: int, device: torch.device) -> int:
    """How many decompositions of that width, of numbers of ``size`` bytes, run at a time.

    On a CPU as many as there are threads: half of a decomposition is bound by memory and hardly
    faster with a second thread, and two side by side, a thread each, take three quarters of the
    time of one after the other.
    """
    if device.type != "cpu":
        return 1
    room = 1 + AT_ONCE_BYTES // (WORKSPACE * size * width**2)
    return min(torch.get_num_threads(), room)


def workspace_bytes(width: int, size: int, device: torch.device) -> int:
    """What decompositions of that width hold while they run."""
    return at_once(width, size, device) * WORKSPACE * size * width**2


def side_by_side(work: Callable[[T], R], items: Sequence[T], count: int) -> Iterator[R]:
    """``work`` of each item, in order, ``count`` of them running at a time; threads are shared."""
    if count == 1:
        yield from map(work, items)
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // count))  # what the pool's threads begin with
    pool = ThreadPoolExecutor(count)
    try:
        yield from pool.map(work, items)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


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
