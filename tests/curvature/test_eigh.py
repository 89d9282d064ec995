"""Eigendecompositions that fail: repeated from a whole copy, on the device first, then on the CPU.

The stand-ins fail in the ways that solvers on a GPU do, after having written into their argument.
The ``meta`` device stands for a GPU where only the order of the attempts is looked at.
"""

from __future__ import annotations

import pytest
import torch

from kfade.curvature import eigh as eigh_module
from kfade.curvature.eigh import eigendecompose, eigendecompose_batch
from kfade.curvature.factors import CovarianceSum
from kfade.curvature.sums import decompose
from kfade.errors import InputError

FAILURES = [
    torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnXsyevd`"),
    TypeError("Cannot convert a MPS Tensor to float64 dtype"),
]


class Failing:
    """``torch.linalg.eigh`` that spoils its argument and fails at the first calls."""

    def __init__(self, failure, times=1):
        self.plain, self.failure, self.times = torch.linalg.eigh, failure, times
        self.asked = []

    def __call__(self, matrix):
        self.asked.append((matrix.device.type, matrix.dtype))
        if len(self.asked) > self.times:
            return self.plain(matrix)
        if isinstance(self.failure, Exception):
            matrix.fill_(float("nan"))
            raise self.failure
        values, vectors = self.plain(matrix)
        return self.failure * values, vectors


@pytest.fixture
def matrix():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 12, generator=generator)
    return rows.T @ rows


@pytest.mark.parametrize("failure", [*FAILURES, 1.01], ids=lambda f: type(f).__name__)
@pytest.mark.cpu_only
def test_what_fails_is_repeated_in_float64_from_a_whole_copy(monkeypatch, matrix, failure):
    before = matrix.clone()
    failing = Failing(failure)
    monkeypatch.setattr(torch.linalg, "eigh", failing)
    values, vectors = eigendecompose(matrix, "A")
    assert failing.asked == [("cpu", torch.float32), ("cpu", torch.float64)]
    assert torch.equal(matrix, before)
    assert values.dtype == vectors.dtype == torch.float32
    assert ((vectors * values) @ vectors.T - before).norm() < 1e-5 * before.norm()


@pytest.mark.cpu_only
def test_a_decomposition_that_holds_is_made_once(monkeypatch, matrix):
    failing = Failing(None, times=0)
    monkeypatch.setattr(torch.linalg, "eigh", failing)
    eigendecompose(matrix, "A")
    assert failing.asked == [("cpu", torch.float32)]


@pytest.mark.cpu_only
def test_a_device_is_tried_in_float64_before_the_cpu(monkeypatch, matrix):
    tried = []

    def checked(attempt, original):
        tried.append((attempt.device.type, attempt.dtype))
        if attempt.device.type == "meta":
            raise FAILURES[1]
        return attempt, attempt

    monkeypatch.setattr(eigh_module, "_checked", checked)
    monkeypatch.setattr(torch, "isfinite", lambda x: torch.ones(1, 1, dtype=torch.bool))
    plain = torch.Tensor.to
    monkeypatch.setattr(  # a meta tensor has no numbers to bring to the CPU
        torch.Tensor,
        "to",
        lambda x, device, dtype, copy: (
            plain(matrix, dtype) if str(device) == "cpu" else plain(x, device, dtype, copy=copy)
        ),
    )
    eigendecompose(torch.empty(12, 12, device="meta"), "A")
    assert tried == [
        ("meta", torch.float32),
        ("meta", torch.float64),
        ("cpu", torch.float64),
    ]


def test_where_all_fail_the_last_words_are_shown(monkeypatch, matrix):
    monkeypatch.setattr(torch.linalg, "eigh", Failing(FAILURES[2], times=9))
    with pytest.raises(RuntimeError, match="A of q failed in float64 too: cusolver error"):
        eigendecompose(matrix, "A of q")


def test_the_cpus_own_memory_is_not_tried_again(monkeypatch, matrix):
    words = "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"
    failing = Failing(RuntimeError(words))
    monkeypatch.setattr(torch.linalg, "eigh", failing)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator: can't allocate"):
        eigendecompose(matrix, "A")
    assert len(failing.asked) == 1


def test_nan_is_refused_before_any_of_it(monkeypatch, matrix):
    failing = Failing(None, times=0)
    monkeypatch.setattr(torch.linalg, "eigh", failing)
    matrix[0, 0] = float("nan")
    with pytest.raises(InputError, match="NaN or Inf in the curvature of A"):
        eigendecompose(matrix, "A")
    assert not failing.asked


# --- batches --------------------------------------------------------------------------------------


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    rows_BRD = torch.randn(5, 40, 12, generator=generator)
    return rows_BRD.mT @ rows_BRD


NAMES = list("ABCDE")


def test_a_batch_is_its_matrices_one_by_one(batch):
    together = list(eigendecompose_batch(batch, NAMES))
    others = list(eigendecompose_batch(batch.flip(0)[:3], NAMES[:3]))
    for number, (values, vectors) in enumerate(together):
        alone, its_vectors = eigendecompose(batch[number], "A")
        scale = batch[number].norm()
        assert (values - alone).norm() < 1e-5 * scale  # float32
        for v in (vectors, its_vectors):
            assert ((v * values) @ v.T - batch[number]).norm() < 1e-5 * scale
        assert vectors.is_contiguous()
        if number >= 2:  # beside other matrices
            assert (values - others[4 - number][0]).norm() < 1e-5 * scale
    assert (together[0][0] - together[1][0]).norm() > 1e-2 * together[0][0].norm()


class FailingBatch(Failing):
    """Spoils a batch: one matrix of it, or all by an error."""

    def __call__(self, matrices):
        self.asked.append(tuple(matrices.shape))
        values, vectors = self.plain(matrices)
        if matrices.ndim == 3 and isinstance(self.failure, Exception):
            matrices.fill_(float("nan"))
            raise self.failure
        if matrices.ndim == 3:
            values[2] = self.failure * values[2]
        return values, vectors


@pytest.mark.parametrize("failure", [1.01, float("nan"), *FAILURES[:2]])
@pytest.mark.cpu_only
def test_a_matrix_that_fails_in_a_batch_is_repeated_alone(monkeypatch, batch, failure):
    before, right = batch.clone(), list(eigendecompose_batch(batch, NAMES))
    failing = FailingBatch(failure)
    monkeypatch.setattr(torch.linalg, "eigh", failing)
    found = list(eigendecompose_batch(batch, NAMES))
    repeated = 5 if isinstance(failure, Exception) else 1
    assert failing.asked == [(5, 12, 12)] + repeated * [(12, 12)]
    assert torch.equal(batch, before)
    for (values, vectors), (expected, _), matrix in zip(found, right, batch, strict=True):
        assert (values - expected).norm() < 1e-5 * expected.norm()
        assert ((vectors * values) @ vectors.T - matrix).norm() < 1e-5 * matrix.norm()


def test_nan_in_a_batch_is_named(batch):
    batch[3, 0, 0] = float("nan")
    with pytest.raises(InputError, match="NaN or Inf in the curvature of D"):
        list(eigendecompose_batch(batch, NAMES))


@pytest.mark.cpu_only
def test_factors_of_one_width_are_decomposed_in_batches_that_fit_a_memory(monkeypatch):
    def work():
        found = []
        for number, width in enumerate((8, 12, 8, 8, 12, 5, 8, 8)):
            total = CovarianceSum(width, torch.float64, torch.device("cpu"))
            rows = torch.Generator().manual_seed(number)
            total.add(torch.randn(30, width, generator=rows, dtype=torch.float64))
            found.append((f"A of {number}", total, 30 + number))
        return found

    one_by_one, shapes = decompose(work()), []
    plain = torch.linalg.eigh
    monkeypatch.setattr(eigh_module, "BATCHED", ("cpu",))
    # Room for three of width 12, and for five of width 8; then for one and for three.
    monkeypatch.setattr(eigh_module, "AT_ONCE_BYTES", eigh_module.WORKSPACE * 8 * 2 * 12**2)
    monkeypatch.setattr(torch.linalg, "eigh", lambda x: shapes.append(x.shape) or plain(x))
    batches = decompose(work())
    assert shapes == [(2, 12, 12), (5, 8, 8), (1, 5, 5)]
    monkeypatch.setattr(eigh_module, "AT_ONCE_BYTES", eigh_module.WORKSPACE * 8 * 2 * 8**2)
    decompose(work())
    assert shapes[3:] == [(12, 12), (12, 12), (3, 8, 8), (2, 8, 8), (1, 5, 5)]
    assert one_by_one.keys() == batches.keys()
    for name, (values, vectors) in one_by_one.items():
        mine, its = batches[name]
        assert (values - mine).norm() < 1e-12 * values.norm()
        assert ((its * mine) @ its.T - (vectors * values) @ vectors.T).norm() < 1e-12 * mine.norm()
