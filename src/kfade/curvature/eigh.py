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
CPU_MEMORY = "DefaultCPUAllocator"  # in torch's message when the CPU's memory is not enough
AT_ONCE_BYTES = 500_000_000  # for the workspaces of concurrent decompositions, besides the first


def at_once(width: int, size: int, device: torch.device) -> int:
    """How many decompositions of that width, of numbers of ``size`` bytes, run concurrently.

    On a CPU one for each thread, as far as memory allows: half of a decomposition is bound by
    memory bandwidth and hardly faster with a second thread. Two at once with one thread each take
    three quarters of the time of one after the other with two.
    """
    if device.type != "cpu":
        return 1
    room = 1 + AT_ONCE_BYTES // (WORKSPACE * size * width**2)
    return min(torch.get_num_threads(), room)


def workspace_bytes(width: int, size: int, device: torch.device) -> int:
    """Bytes that concurrent decompositions of that width use for their work."""
    return at_once(width, size, device) * WORKSPACE * size * width**2


def side_by_side(work: Callable[[T], R], items: Sequence[T], count: int) -> Iterator[R]:
    """``work`` of each item, in order, ``count`` at a time, which share torch's threads."""
    if count == 1:
        yield from map(work, items)
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // count))  # inherited by the pool's threads
    pool = ThreadPoolExecutor(count)
    try:
        yield from pool.map(work, items)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def eigendecompose(matrix_DD: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """(eigenvalues [D] clamped at 0, eigenvectors [D, D] in columns) of a symmetric matrix.

    Each result is checked by its residual ‖(MQ − QΛ)X‖ / ‖M‖ on a few random columns X, whose cost
    is negligible. A decomposition that raises or fails the check is repeated in float64 on the
    same device, and then on the CPU.

    Raises:
        InputError: the matrix holds NaN or Inf.
        RuntimeError: all attempts failed, or the CPU's memory is not enough.
    """
    if not torch.isfinite(matrix_DD).all():
        raise InputError(f"NaN or Inf in the curvature of {name}: look at the model's weights")
    attempts = [(matrix_DD.device, matrix_DD.dtype), (matrix_DD.device, torch.float64)]
    if matrix_DD.device.type != "cpu":
        attempts.append((torch.device("cpu"), torch.float64))
    reason = "its residual is too large"
    for device, dtype in attempts:
        try:
            # A copy, since a failed decomposition may have overwritten its argument.
            pair = _checked(matrix_DD.to(device, dtype, copy=True), matrix_DD)
        # RuntimeError: solvers and allocators. TypeError: devices without float64.
        except (RuntimeError, TypeError) as error:
            if CPU_MEMORY in str(error):
                raise
            reason = str(error).partition("\n")[0]
            continue
        if pair is not None:
            return pair
    raise RuntimeError(f"the eigendecomposition of {name} failed in float64 too: {reason}")


def _checked(attempt_DD: Tensor, matrix_DD: Tensor) -> tuple[Tensor, Tensor] | None:
    """The result of :func:`eigendecompose`, or None if the residual is too large.

    ``attempt_DD`` is a copy of the matrix, which may be overwritten.
    """
    device, dtype = attempt_DD.device, attempt_DD.dtype
    values, vectors = torch.linalg.eigh(attempt_DD)
    del attempt_DD
    exact_DD = matrix_DD.to(device, dtype)
    probe_DK = _probe(exact_DD)
    residual = exact_DD @ (vectors @ probe_DK) - vectors @ (values[:, None] * probe_DK)
    # A backward-stable eigh leaves a residual of a few D·eps; 1e-4 is far above it in float32 and
    # far below anything that would change a step.
    if not residual.norm() <= 1e-4 * (exact_DD.norm() * PROBES**0.5):
        return None
    # Contiguous, as tensors read from files are: products are then the same to the last bit.
    return values.clamp(min=0).to(matrix_DD), vectors.to(matrix_DD).contiguous()


def _probe(matrix_DD: Tensor) -> Tensor:
    """Random columns [D, PROBES] of unit variance: ‖MX‖² is about PROBES ‖M‖² (Frobenius)."""
    generator = torch.Generator().manual_seed(0)
    probe_DK = torch.randn(len(matrix_DD), PROBES, generator=generator, device="cpu")
    return probe_DK.to(matrix_DD)
