"""Experts of a mixture in a model that is divided over processes, against one process."""

from __future__ import annotations

import experts_sharded_worker
import pytest
import torch
from helpers import relative_error, same_bits
from processes import run_together

# As in test_distributed.py: sums in another order, and eigenvectors that turn them into angles.
EXACT, EIGENVECTORS = 1e-11, 1e-8
pytestmark = pytest.mark.slow
FAMILIES = experts_sharded_worker.FAMILIES


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("alone")
    return {f: experts_sharded_worker.compute(f, folder, sharded=False) for f in FAMILIES}


@pytest.fixture(scope="module", params=[2, 3])
def found(request, tmp_path_factory) -> list[dict]:
    """What each of 2 or 3 processes has found."""
    folder = tmp_path_factory.mktemp("processes")
    run_together(request.param, experts_sharded_worker.main, folder, said=folder)
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(request.param)]


@pytest.mark.parametrize("family", FAMILIES)
def test_processes_find_what_one_finds(family, found, expected):
    theirs = expected[family]
    limits = {"gradient": EXACT, "update": EIGENVECTORS, "edited": EIGENVECTORS, "before": 0.0}
    for rank in found:
        ours = rank[family]
        assert ours["names"] == theirs["names"]
        assert ours["digest"] == theirs["digest"]
        assert ours["measured"] == pytest.approx(theirs["measured"], rel=1e-6)
        for what, limit in limits.items():
            assert list(ours[what]) == list(theirs[what])
            errors = [relative_error(ours[what][n], theirs[what][n]) for n in theirs[what]]
            assert max(errors) <= limit
        assert all(
            same_bits(ours["edited"][n], found[0][family]["edited"][n]) for n in ours["edited"]
        )
        recomputed = ours["gradient, recomputed"]
        assert all(same_bits(ours["gradient"][n], recomputed[n]) for n in recomputed)
    assert 0.01 < theirs["measured"] < 0.04  # there is an effect


@pytest.mark.parametrize("family", FAMILIES)
def test_an_update_of_divided_experts_is_written_and_taken_back(family, found):
    for rank in found:
        ours = rank[family]
        changed = {n for n, b in ours["before"].items() if not same_bits(b, ours["edited"][n])}
        assert {name.rpartition("[")[0] for name in ours["names"]} <= changed
        for name, before in ours["before"].items():
            # W + ΔW − ΔW: two roundings of float64
            assert torch.allclose(ours["reverted"][name], before, rtol=0, atol=1e-14)
        assert ours["moved"]
        assert ours["restored"]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_process_holds_a_part_of_every_expert(family, found, expected):
    assert [rank[family]["held"] for rank in found] == [
        expected[family]["held"] // len(found)
    ] * len(found)


def test_what_cannot_be_done_is_refused_in_every_process(found):
    for rank in found:
        said = rank["said"]
        assert said["written"] == 0.0  # negative control: a whole expert in one process is a copy
        assert "processes cannot divide each expert's 5 x 7 numbers evenly" in said["uneven"]
        assert "no retain text reaches model.layers.1.mlp.experts." in said["no rows"]
