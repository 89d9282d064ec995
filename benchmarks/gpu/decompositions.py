"""Eigendecompositions of covariances: dtypes, drivers, and whether a warm start pays.

A [D, D] is the covariance of rows whose spectrum falls as a power, A' the mean of A and another
such covariance, weighted 1 − share and share. Ways to decompose A', given A = Q Λ Qᵀ:

- ``cold``: eigh(A').
- ``rotated``: eigh(QᵀA'Q) = V Λ' Vᵀ, so Q' = QV: nearly diagonal if A' is close to A.
- ``jacobi``: the same by a singular value decomposition with cuSOLVER's Jacobi method, which stops
  sooner on nearly diagonal matrices. On a CPU the default method stands in.
- ``power step``: Q' = qr(A'Q), Λ' = diag(Q'ᵀA'Q'), which only comes near eigenvectors.

The piece ``batches`` is about many small matrices of one width, as the experts of a mixture have
them, in float32 and by kfade's functions: ``one by one``, ``side by side`` (several at a time, a
thread each) and as a ``batch``. Its seconds are the least of three runs, its errors the largest of
the matrices.

Of each: seconds, residual ‖A'Q' − Q'Λ'‖ / ‖A'‖ and orthogonality ‖Q'ᵀQ' − I‖ / √D, computed in
float64 (Frobenius norms).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import cached_property, partial

import torch
from torch import Tensor

from benchmarks.experiments.lab.pieces import Piece
from benchmarks.experiments.lab.records import Record, number, table
from benchmarks.gpu.measure import measure, synchronise
from kfade.curvature.eigh import eigendecompose, eigendecompose_batch, side_by_side

DTYPES = {"float32": torch.float32, "float64": torch.float64}
DECAY = 0.7  # of the rows' standard deviations: the i-th is i^−0.7
SHARES = (0.01, 0.1)
MOST_JACOBI = 4096  # the widest matrix for it
REPEATS = 3
BATCHES = ((64, 32), (256, 32), (768, 8), (1024, 8))
"""(width, number of matrices)."""
Pair = tuple[Tensor, Tensor]
"""(eigenvalues [D], eigenvectors [D, D] in columns)."""


def main(given: argparse.Namespace) -> str:
    return shown(measure(pieces(given), given))


def pieces(given: argparse.Namespace) -> Iterator[Piece]:
    if given.piece == "batches":
        for width, count in ((48, 4),) if given.tiny else BATCHES:
            yield from of_batch(Batch(width, count, given.device))
        return
    cases: list[Case] = []
    for width in (48, 96) if given.tiny else (4096, 14336):
        for dtype in DTYPES:
            cases[:] = [Case(width, dtype, given.device)]  # the last one's matrices are freed
            yield from of_case(cases[0])


def of_case(case: Case) -> Iterator[Piece]:
    prefix = f"{case.dtype} {case.width}"
    yield f"{prefix} kfade", partial(case.timed, 0.0, lambda a: eigendecompose(a, "A"))
    yield f"{prefix} cold", partial(case.timed, 0.0, torch.linalg.eigh)
    for share in SHARES:
        yield f"{prefix} rotated {share:g}", partial(case.timed, share, case.rotated)
        yield f"{prefix} power step {share:g}", partial(case.timed, share, case.power_step)
        if case.width <= MOST_JACOBI:
            yield f"{prefix} jacobi {share:g}", partial(case.timed, share, case.jacobi)
    if case.device.startswith("cuda"):
        yield f"{prefix} cold, magma", partial(case.by_library, "magma")


def of_batch(batch: Batch) -> Iterator[Piece]:
    def alone(matrix: Tensor) -> Pair:
        return eigendecompose(matrix, "A")

    ways: dict[str, Callable[[Tensor], Iterator[Pair]]] = {
        "one by one": partial(map, alone),
        "side by side": lambda a: side_by_side(alone, list(a), torch.get_num_threads()),
        "batch": lambda a: eigendecompose_batch(a, ["A"] * len(a)),
    }
    for name, decompose in ways.items():
        if name != "side by side" or batch.device == "cpu":
            yield f"float32 {batch.width} x {batch.count}, {name}", partial(batch.timed, decompose)


class Batch:
    """Covariances of one width in float32."""

    def __init__(self, width: int, count: int, device: str) -> None:
        self.width, self.count, self.device = width, count, device

    @cached_property
    def matrices(self) -> Tensor:
        found = [
            covariance(self.width, torch.float32, self.device, seed) for seed in range(self.count)
        ]
        return torch.stack(found)

    def timed(self, decompose: Callable[[Tensor], Iterator[Pair]]) -> Record:
        """Least seconds and largest errors."""
        seconds = []
        matrices, found = self.matrices, list(decompose(self.matrices[:2]))
        for _ in range(REPEATS):
            synchronise(self.device)
            start = time.perf_counter()
            found = list(decompose(matrices))
            synchronise(self.device)
            seconds.append(time.perf_counter() - start)
        each = [errors(matrix, *pair) for matrix, pair in zip(matrices, found, strict=True)]
        worst = {name: max(told[name] for told in each) for name in each[0]}
        return {"seconds": min(seconds), **worst}


class Case:
    """A covariance of some width and dtype, and its eigenbasis."""

    def __init__(self, width: int, dtype: str, device: str) -> None:
        self.width, self.dtype, self.device = width, dtype, device

    @cached_property
    def matrix(self) -> Tensor:
        return covariance(self.width, DTYPES[self.dtype], self.device, seed=0)

    @cached_property
    def basis(self) -> Tensor:
        """Q of A."""
        return torch.linalg.eigh(self.matrix)[1]

    def perturbed(self, share: float) -> Tensor:
        """A', or A itself for a share of 0."""
        if share == 0:
            return self.matrix
        other = covariance(self.width, DTYPES[self.dtype], self.device, seed=1)
        return (1 - share) * self.matrix + share * other

    def timed(self, share: float, decompose: Callable[[Tensor], Pair]) -> Record:
        """Seconds and errors of one way, after a small matrix has loaded the library."""
        matrix = self.perturbed(share)
        if share:
            _ = self.basis
        torch.linalg.eigh(torch.eye(8, dtype=matrix.dtype, device=self.device))
        synchronise(self.device)
        start = time.perf_counter()
        values, vectors = decompose(matrix)
        synchronise(self.device)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, **errors(matrix, values, vectors)}

    def by_library(self, library: str) -> Record:
        """``cold`` by another of PyTorch's libraries."""
        before = torch.backends.cuda.preferred_linalg_library()
        torch.backends.cuda.preferred_linalg_library(library)
        try:
            return self.timed(0.0, torch.linalg.eigh)
        finally:
            torch.backends.cuda.preferred_linalg_library(before)

    def rotated(self, matrix: Tensor) -> Pair:
        values, turn = torch.linalg.eigh(self._in_basis(matrix))
        return values, self.basis @ turn

    def jacobi(self, matrix: Tensor) -> Pair:
        driver = "gesvdj" if matrix.is_cuda else None
        turn, values, _ = torch.linalg.svd(self._in_basis(matrix), driver=driver)
        return values, self.basis @ turn

    def power_step(self, matrix: Tensor) -> Pair:
        # The largest eigenvalues first: each column is made orthogonal to those before it.
        basis, _ = torch.linalg.qr(matrix @ self.basis.flip(1))
        return (basis * (matrix @ basis)).sum(dim=0), basis

    def _in_basis(self, matrix: Tensor) -> Tensor:
        rotated = self.basis.T @ matrix @ self.basis
        return (rotated + rotated.T) / 2


def covariance(width: int, dtype: torch.dtype, device: str, seed: int) -> Tensor:
    """(1/N) Σ x xᵀ of N = 2·D rows. Seeds share the mixing, so their eigenvectors are related."""
    deviations = torch.arange(1, width + 1, device=device, dtype=dtype) ** -DECAY
    mix = gaussian(width, width, dtype, device, seed=-1) / width**0.5
    rows = (gaussian(2 * width, width, dtype, device, seed) * deviations) @ mix
    return rows.T @ rows / len(rows)


def gaussian(rows: int, columns: int, dtype: torch.dtype, device: str, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed + 1)
    return torch.randn(rows, columns, generator=generator, dtype=dtype, device=device)


def errors(matrix: Tensor, values: Tensor, vectors: Tensor) -> dict[str, float]:
    """``residual`` and ``orthogonality``."""
    exact, q = matrix.double(), vectors.double()
    residual = (exact @ q - q * values.double()).norm() / exact.norm()
    product = q.T @ q
    product.diagonal().sub_(1.0)
    return {
        "residual": residual.item(),
        "orthogonality": (product.norm() / len(q) ** 0.5).item(),
    }


def shown(results: dict[str, Record]) -> str:
    """One row for each measurement."""
    rows = [
        [name, *(number(told.get(key)) for key in ("seconds", "residual", "orthogonality"))]
        for name, told in results.items()
        if name != "machine"
    ]
    return table("decomposition | seconds | residual | orthogonality", rows)
