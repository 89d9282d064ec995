"""Several processes compute what one computes: fits, gradients, measurements, whole updates.

distributed_worker.py runs in 2 and in 3 processes (gloo) and leaves what each has found; it is
compared with what this process finds by itself.
"""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import distributed_worker
import pytest
import torch
from helpers import relative_error, same_bits, tiny_llama
from processes import run_together

from kfade import InputError, find_targets, margin
from kfade.method.gradient import forget_gradient
from kfade.models.head import body_of
from kfade.models.layers import decoder_blocks
from kfade.runtime import distributed

# Sums in another order, and eigenvectors that turn them into angles; see test_theory.py.
EXACT, EIGENVECTORS = 1e-11, 1e-8
KINDS = ("whole", "sharded")
COUNTS = (2, 3, 4)
pytestmark = pytest.mark.slow
# Matrices that go through eigenvectors only where they do not matter, or not at all, agree to the
# rounding of sums; EK-FAC's and all that is made with it to the eigenvectors'.
MATRICES = {
    "G of diagonal": EXACT,
    "G of kfac": EXACT,
    "G of ekfac": EIGENVECTORS,
    "G, one batch": EIGENVECTORS,
    "G, stored in groups": EIGENVECTORS,
    "gradient": EXACT,
    "gradient, recomputed": EXACT,
    "gradient, weighed": EXACT,
    "G of diagonal, recomputed": EXACT,
    "gradient, one batch": EXACT,
    "product": EXACT,
    "gradient of the KL": EIGENVECTORS,
    "update": EIGENVECTORS,
    "edited": EIGENVECTORS,
}
SOURCE = Path(distributed.__file__).parents[2]


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict:
    return distributed_worker.compute(tmp_path_factory.mktemp("alone"), sharded=False)


@pytest.fixture(scope="module", params=COUNTS)
def found(request, tmp_path_factory) -> list[dict]:
    """What each of 2 or 3 processes has found."""
    folder = tmp_path_factory.mktemp("processes")
    run_together(request.param, distributed_worker.main, folder, said=folder)
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(request.param)]


def test_there_is_one_group_of_all(found):
    assert [(f["count"], f["rank"]) for f in found] == [(len(found), i) for i in range(len(found))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", MATRICES)
def test_every_process_has_the_matrices_of_one(what, kind, found, expected):
    theirs = expected[what]
    for rank in found:
        ours = rank[kind][what]
        assert list(ours) == list(theirs)
        errors = [relative_error(ours[name], theirs[name]) for name in theirs]
        assert max(errors) < MATRICES[what]
        # One step: processes whose weights differ in a bit would drift apart.
        assert all(same_bits(ours[name], found[0][kind][what][name]) for name in theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_that_run_again_give_the_same_bits(kind, found):
    for rank in found:
        plain, ours = (rank[kind][name] for name in ("gradient", "gradient, recomputed"))
        assert all(same_bits(plain[name], ours[name]) for name in plain)
        upper = rank[kind]["G of diagonal, recomputed"]
        assert all(same_bits(rank[kind]["G of diagonal"][name], upper[name]) for name in upper)
        assert 0 < len(upper) < len(plain)


@pytest.mark.parametrize("kind", KINDS)
def test_every_process_measures_what_one_measures(kind, found, expected):
    for rank in found:
        ours = rank[kind]
        assert ours["quadratic form"] == pytest.approx(expected["quadratic form"], rel=EXACT)
        assert ours["objective"] == pytest.approx(expected["objective"], rel=EIGENVECTORS)
        assert ours["probability"] == pytest.approx(expected["probability"], rel=EIGENVECTORS)
        assert ours["divergence"] == pytest.approx(expected["divergence"], rel=1e-6)
        assert ours["lost"] == pytest.approx(expected["lost"], rel=0.2)  # rounding itself
        assert ours["digest"] == expected["digest"]
    assert 0.01 < expected["divergence"] < 0.03  # there is something to measure


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_recorded_alike(kind, found, expected):
    theirs = expected["provenance"]
    for rank in found:
        ours = rank[kind]["provenance"]
        assert ours.keys() == theirs.keys()
        for key in ours.keys() - {"steps"}:
            assert ours[key] == theirs[key]
        assert len(ours["steps"]) == len(theirs["steps"]) == 2
        for our_step, their_step in zip(ours["steps"], theirs["steps"], strict=True):
            for key, value in their_step.items():
                if key == "probes":
                    assert len(our_step[key]) == len(value)
                elif key == "ended_by":
                    assert our_step[key] == value
                elif key == "relative_change":
                    assert our_step[key] == pytest.approx(value, rel=1e-6)
                elif key == "refinements":
                    assert len(our_step[key]) == 2
                    for ours_tried, theirs_tried in zip(our_step[key], value, strict=True):
                        assert ours_tried == pytest.approx(theirs_tried, rel=1e-6)
                elif key == "corrections":
                    assert len(value) == (their_step is theirs["steps"][-1])
                    for ours_made, theirs_made in zip(our_step[key], value, strict=True):
                        assert theirs_made["accepted"]
                        assert len(ours_made.pop("probes")) == len(theirs_made["probes"])
                        numbers = {n: theirs_made[n] for n in ours_made if n != "seconds"}
                        own = {n: ours_made[n] for n in numbers}
                        assert own == pytest.approx(numbers, rel=1e-6)
                else:
                    assert our_step[key] == pytest.approx(value, rel=1e-6, abs=1e-12)


def test_the_work_is_shared(found, expected):
    """Each batch is computed once, by one process; sharded, the others run along in silence."""
    total = expected["batches"]
    assert total > 3
    assert expected["passes of ekfac"] == 2 * total
    for estimator, passes in (("diagonal", 1), ("kfac", 1), ("ekfac", 2)):
        whole = [rank["whole"][f"passes of {estimator}"] for rank in found]
        assert sum(whole) == passes * total
        assert min(whole) > 0
        assert [rank["sharded"][f"passes of {estimator}"] for rank in found] == whole
    references = [rank["whole"]["references"] for rank in found]
    assert sum(references) == expected["references"]
    assert max(references) < expected["references"]


def test_a_sharded_model_is_spread_and_left_as_it_was(found, expected):
    held = [rank["sharded"]["numbers held"] for rank in found]
    assert sum(held) == expected["numbers held"] == 6 * 8 * 12
    assert max(held) < 0.6 * expected["numbers held"]
    for rank in found:
        assert rank["whole"]["numbers held"] == expected["numbers held"]
        assert rank["whole"]["weights kept"]
        assert rank["sharded"]["weights kept"]


def test_each_layer_of_a_spread_model_is_summed_by_one_process(found, expected):
    whole = expected["numbers summed"]
    assert set(whole) == {"covariances", "eigenvalues", "forget gradient"}
    for name, all_numbers in whole.items():
        # Negative control: of a whole model every process sums all.
        assert {rank["whole"]["numbers summed"][name] for rank in found} == {all_numbers}
        own = [rank["sharded"]["numbers summed"][name] for rank in found]
        assert sum(own) == all_numbers
        assert max(own) < 0.6 * all_numbers
    for rank in found:
        assert rank["sharded"]["order"] == expected["order"]


def test_a_divided_vector_is_held_in_parts_and_read_whole(found):
    whole = {"matrix": 35, "small": 3, "number": 1, "none": 0}
    for rank in found:
        got = rank["divided"]
        assert list(got["read"]) == list(got["held"]) == list(whole)
        assert all(got["held"][name] <= -(-count // len(found)) for name, count in whole.items())
        matrix = torch.arange(35, dtype=torch.float64).reshape(7, 5)
        assert torch.equal(got["read"]["matrix"], matrix)
        assert got["read"]["small"].tolist() == [9.0, 9.0, 9.0]
        assert got["read"]["number"].shape == ()
        assert got["read"]["none"].shape == (0, 3)
    for name, count in whole.items():
        assert sum(rank["divided"]["held"][name] for rank in found) == count


def test_rows_come_to_one_process(found):
    last = len(found) - 1
    for number, rank in enumerate(found):
        got = rank["brought"]
        assert got["largest"] == last - 7
        assert got["any"] == [True, False]
        if number != last:
            assert got["rows"] == []
            continue
        for process, (rows, count) in enumerate(zip(got["rows"], got["counts"], strict=True)):
            assert torch.equal(rows, torch.full((count, 4), float(process), dtype=torch.bfloat16))


KEPT = "interrupted, sharded, kept"


@pytest.mark.parametrize("kind", ["interrupted", "interrupted, sharded", KEPT])
def test_an_interrupted_fit_goes_on_bit_for_bit(kind, found, expected):
    """Each process from its own sums; the second has lost its own and begins again. Of a spread
    model all do, since a sum holds the rows of all of them."""
    counts = [rank["whole"]["passes of ekfac"] for rank in found]  # two passes
    stopped = [min(1 + number, batches // 2) for number, batches in enumerate(counts)]
    for number, rank in enumerate(found):
        result = rank[kind]
        assert result["first"] == (2 if "sharded" in kind else stopped[number])
        for name, tensor in result["whole"].items():
            assert same_bits(result["resumed"][name], tensor)
        files = len(found) if "sharded" in kind else 1  # there each process writes what it keeps
        assert result["files"] == [f"curvature-{i:03}.safetensors" for i in range(files)]
    kept = [0, 0, *(batches - 1 for batches in stopped[2:])]
    done = {"interrupted": kept, "interrupted, sharded": [0] * 4, KEPT: [1] * 4}[kind]
    rest = [rank[kind]["rest"] for rank in found]
    assert rest == [c - d for c, d in zip(counts, done[: len(found)], strict=True)]


def test_one_share_alone_is_far_off(monkeypatch, expected):
    """Negative control: what a process has before the sum is not what all have after it."""
    monkeypatch.setattr(distributed, "count", lambda: 2)
    model = tiny_llama()
    batches, targets = distributed_worker.batches_of(distributed_worker.FORGET), find_targets(model)
    ours = forget_gradient(model, batches, targets, margin)
    assert min(relative_error(ours[name], expected["gradient"][name]) for name in ours) > 0.1


# --- One process, and none ----------------------------------------------------------------------


@pytest.fixture
def processes_of(monkeypatch):
    def set_count(count: int, rank: int = 0) -> None:
        monkeypatch.setattr(distributed, "count", lambda: count)
        monkeypatch.setattr(distributed, "rank", lambda: rank)

    return set_count


def test_work_is_dealt_dearest_first(processes_of):
    processes_of(2)
    # 5 | 4 and 3 | and 3 is then even: 5 + 3 = 8 and 4 + 3 = 7, and 1 to the second.
    assert distributed.assign_by_cost([1, 3, 5, 3, 4]) == [1, 1, 0, 0, 1]
    assert distributed.assign_by_cost([2, 2, 2, 2]) == [0, 1, 0, 1]
    assert distributed.assign_by_cost([]) == []
    assert distributed.assign_by_cost([7]) == [0]
    processes_of(3)
    # Cubes of widths, as eigendecompositions are dealt: one wide matrix outweighs all others.
    assert distributed.assign_by_cost([27, 1, 1, 1, 1]) == [0, 1, 2, 1, 2]
    processes_of(1)
    assert distributed.assign_by_cost([1, 3, 5]) == [0, 0, 0]


def test_shares_are_a_partition_in_order(processes_of):
    items = list(range(20))
    shares = []
    for rank in range(3):
        processes_of(3, rank)
        shares.append(distributed.share(items, lambda i: 1.0 + i % 4))
    assert sorted(i for share in shares for i in share) == items
    assert all(share == sorted(share) for share in shares)
    loads = [sum(1.0 + i % 4 for i in share) for share in shares]
    assert max(loads) - min(loads) <= 1.0  # 50 in three: no unfair share
    processes_of(1)
    assert distributed.share(items, lambda i: 1.0) == items


def test_without_torchrun_nothing_happens(monkeypatch):
    for size in (None, "1"):
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        if size is not None:
            monkeypatch.setenv("WORLD_SIZE", size)
        with distributed.processes():
            assert not torch.distributed.is_initialized()
            assert (distributed.count(), distributed.rank()) == (1, 0)
    tensor = torch.arange(3.0)
    distributed.reduce_to(0, tensor)
    assert distributed.all_reduce(tensor) is tensor
    assert distributed.broadcast(0, tensor) is tensor
    assert torch.equal(tensor, torch.arange(3.0))
    assert distributed.all_reduce_numbers([0.1, 2.0]) == [0.1, 2.0]
    assert distributed.maximum(-2.5) == -2.5
    assert [distributed.any_of(flag) for flag in (True, False)] == [True, False]
    distributed.barrier()


def test_one_process_keeps_its_model_whole():
    model = tiny_llama()
    weight = model.model.layers[0].mlp.up_proj.weight
    distributed.shard(body_of(model), decoder_blocks(model)[1])
    assert model.model.layers[0].mlp.up_proj.weight is weight
    assert distributed.gather_full(weight) is weight
    assert distributed.extra_passes(model, 3) == 0
    values = torch.ones_like(weight)
    with torch.no_grad():
        distributed.scatter_into(weight, values)
    assert torch.equal(weight, values)


def test_importing_kfade_does_not_import_what_only_shards_need():
    code = "import sys, kfade; print('torch.distributed.fsdp' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                         env={**os.environ, "PYTHONPATH": str(SOURCE)}, timeout=120)  # fmt: skip
    assert run.stdout.strip() == "False"


@pytest.mark.parametrize("gpus", [1, 3])
def test_more_processes_than_gpus_are_refused(monkeypatch, gpus):
    for name, value in (("WORLD_SIZE", "8"), ("LOCAL_WORLD_SIZE", "4"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    said = (
        rf"4 processes on a machine with {gpus} GPUs?: start with torchrun --nproc-per-node {gpus},"
    )
    with pytest.raises(InputError, match=said), distributed.processes():
        pytest.fail("a group was formed")


@pytest.mark.parametrize(
    ("gpus", "backend"), [(4, "cpu:gloo,cuda:nccl"), (5, "cpu:gloo,cuda:nccl"), (0, "gloo")]
)
def test_processes_wait_longer_than_for_a_decomposition(monkeypatch, gpus, backend):
    """Each process gets a GPU of its own where there are some; all wait for a day."""
    made, devices = [], []
    for name, value in (("WORLD_SIZE", "8"), ("LOCAL_WORLD_SIZE", "4"), ("LOCAL_RANK", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    group = torch.distributed
    monkeypatch.setattr(group, "init_process_group", lambda *a, **k: made.append((a, k)))
    monkeypatch.setattr(group, "destroy_process_group", lambda: None)
    with distributed.processes():
        pass
    [((found,), options)] = made
    assert (found, devices) == (backend, [2] if gpus else [])
    assert options.get("device_id") == (torch.device("cuda", 2) if gpus else None)
    assert options["timeout"] == distributed.PATIENCE >= timedelta(hours=12)
