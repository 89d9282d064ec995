"""Eigendecompositions of the factors: checked, on a CPU several at a time, on a GPU in batches.

Shapes: D width of a factor, B factors of a batch, K random columns of a check.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
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
BATCHED = ("cuda",)
"""Types of device on which one call decomposes a batch of matrices of one width. A mixture has
thousands of small ones. On a CPU a batch takes as long as its matrices one after the other."""


def takes_batches(device: torch.device) -> bool:
    """Whether one call decomposes a batch of matrices on that device."""
    return device.type in BATCHED


def at_once(width: int, size: int, device: torch.device) -> int:
    """How many decompositions of that width, of numbers of ``size`` bytes, run concurrently.

    In a batch as many as memory allows. On a CPU one for each thread, as far as memory allows: half
    of a decomposition is bound by memory bandwidth and hardly faster with a second thread. Two at
    once with one thread each take three quarters of the time of one after the other with two.
    """
    room = 1 + AT_ONCE_BYTES // (WORKSPACE * size * width**2)
    if takes_batches(device):
        return room
    return min(torch.get_num_threads(), room) if device.type == "cpu" else 1


def workspace_bytes(widths: Iterable[int], size: int, device: torch.device) -> int:
    """Most bytes that concurrent decompositions of one of these widths use for their work."""
    return max(at_once(width, size, device) * WORKSPACE * size * width**2 for width in widths)


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
    _refuse_not_finite(matrix_DD[None], [name])
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


def eigendecompose_batch(
    matrices_BDD: Tensor, names: Sequence[str]
) -> Iterator[tuple[Tensor, Tensor]]:
    """:func:`eigendecompose` of each matrix of a batch, by one call of the solver.

    Each result is checked by itself. A matrix whose result fails the check is decomposed alone, and
    so are all of them if the call raises.

    Raises:
        InputError: a matrix holds NaN or Inf; names the first one.
        RuntimeError: as :func:`eigendecompose`.
    """
    _refuse_not_finite(matrices_BDD, names)
    good = [False] * len(names)
    try:
        values_BD, vectors_BDD = torch.linalg.eigh(matrices_BDD.clone())
        good = _holds(matrices_BDD, values_BD, vectors_BDD).tolist()
    except RuntimeError as error:
        if CPU_MEMORY in str(error):
            raise
    for index, name in enumerate(names):
        if good[index]:
            yield values_BD[index].clamp(min=0), vectors_BDD[index].contiguous()
        else:
            yield eigendecompose(matrices_BDD[index], name)


def _refuse_not_finite(matrices_BDD: Tensor, names: Sequence[str]) -> None:
    """Raises InputError where a matrix holds NaN or Inf."""
    finite = torch.isfinite(matrices_BDD).flatten(1).all(dim=1).tolist()
    for name, is_finite in zip(names, finite, strict=True):
        if not is_finite:
            raise InputError(f"NaN or Inf in the curvature of {name}: look at the model's weights")


def _checked(attempt_DD: Tensor, matrix_DD: Tensor) -> tuple[Tensor, Tensor] | None:
    """The result of :func:`eigendecompose`, or None if the residual is too large.

    ``attempt_DD`` is a copy of the matrix, which may be overwritten.
    """
    device, dtype = attempt_DD.device, attempt_DD.dtype
    values, vectors = torch.linalg.eigh(attempt_DD)
    del attempt_DD
    if not _holds(matrix_DD.to(device, dtype), values, vectors):
        return None
    # Contiguous, as tensors read from files are: products are then the same to the last bit.
    return values.clamp(min=0).to(matrix_DD), vectors.to(matrix_DD).contiguous()


def _holds(matrix_DD: Tensor, values_D: Tensor, vectors_DD: Tensor) -> Tensor:
    """Whether the residual of a decomposition is small; of a batch, for each of its matrices."""
    # Of unit variance: ‖MX‖² is about PROBES ‖M‖² (Frobenius).
    generator = torch.Generator().manual_seed(0)
    probe_DK = torch.randn(matrix_DD.shape[-1], PROBES, generator=generator, device="cpu")
    probe_DK = probe_DK.to(matrix_DD)
    scaled_DK = values_D[..., None] * probe_DK
    residual_DK = matrix_DD @ (vectors_DD @ probe_DK) - vectors_DD @ scaled_DK
    # A backward-stable eigh leaves a residual of a few D·eps; 1e-4 is far above it in float32 and
    # far below anything that would change a step.
    limit = 1e-4 * PROBES**0.5 * torch.linalg.matrix_norm(matrix_DD)
    holds: Tensor = torch.linalg.matrix_norm(residual_DK) <= limit
    return holds
