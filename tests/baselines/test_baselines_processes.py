"""Several processes train as one does: baselines_worker.py runs in 2 and in 3 of them (gloo)."""

from __future__ import annotations

import baselines_worker
import pytest
import torch
from baselines_worker import NAMES
from helpers import relative_error, same_bits
from processes import run_together

# Three steps of sums in another order, in float64.
EXACT = 1e-10
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict:
    return baselines_worker.compute(tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module", params=[2, 3])
def found(request, tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("processes")
    run_together(request.param, baselines_worker.main, folder, said=folder)
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(request.param)]


def whole(deltas) -> torch.Tensor:
    return torch.cat([deltas[name].flatten() for name in sorted(deltas)])


def error(ours: dict, theirs: dict) -> float:
    assert ours["deltas"].keys() == theirs["deltas"].keys()
    return relative_error(whole(ours["deltas"]), whole(theirs["deltas"]))


def same(ours: dict, theirs: dict) -> bool:
    assert ours["deltas"].keys() == theirs["deltas"].keys()
    return same_bits(whole(ours["deltas"]), whole(theirs["deltas"]))


def check_alike(found: list[dict], theirs: dict) -> None:
    for ours in found:
        assert error(ours, theirs) < EXACT
        assert same(ours, found[0])  # processes whose weights differ in a bit would drift apart
        assert ours["provenance"] == found[0]["provenance"]
        for mine, wanted in zip(
            ours["provenance"]["curve"], theirs["provenance"]["curve"], strict=True
        ):
            assert mine == pytest.approx(wanted, rel=1e-7, abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_processes_train_as_one(name, found, expected):
    check_alike([rank["alike"][name] for rank in found], expected["alike"][name])


def test_processes_without_a_sequence_go_along(found, expected):
    check_alike([rank["few sequences"] for rank in found], expected["few sequences"])


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_one_process_are_far_off(name, found, expected):
    """Negative control: without the sum."""
    assert max(error(r["not summed"][name], expected["alike"][name]) for r in found) > 0.1


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_of_processes_ends_where_an_uninterrupted_one_does(name, found):
    for rank in found:
        run = rank["resumed"][name]
        assert same(run, run["resumed"])
        assert run["provenance"] == run["resumed"]["provenance"]
        assert same(run, found[0]["resumed"][name])
        assert not same(run, rank["alike"][name])  # the comparison can tell runs apart
