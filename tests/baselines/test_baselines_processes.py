"""Several processes train as one does: baselines_worker.py runs in 3 of them (gloo).

Three, which divides neither the rows of the weights nor the held-out sequences.
"""

from __future__ import annotations

import baselines_worker
import pytest
import torch
from baselines_worker import NAMES, RESUMED, SHARDED
from helpers import relative_error, same_bits
from processes import run_together

# Three steps of sums in another order, in float64.
EXACT = 1e-10
# What a pass rounds to 8 bits depends on the sequences that share it.
BFLOAT16 = 0.1
PROCESSES = 3
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict:
    return baselines_worker.compute(tmp_path_factory.mktemp("alone"), sharded=False)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("processes")
    run_together(PROCESSES, baselines_worker.main, folder, said=folder)
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(PROCESSES)]


def whole(deltas) -> torch.Tensor:
    return torch.cat([deltas[name].flatten() for name in sorted(deltas)])


def error(ours: dict, theirs: dict) -> float:
    assert ours["deltas"].keys() == theirs["deltas"].keys()
    return relative_error(whole(ours["deltas"]), whole(theirs["deltas"]))


def same(ours: dict, theirs: dict) -> bool:
    assert ours["deltas"].keys() == theirs["deltas"].keys()
    return same_bits(whole(ours["deltas"]), whole(theirs["deltas"]))


WHAT = ("low rank", "low rank, sharp", "few sequences", "bfloat16")
RUNS = [
    *(("whole", name) for name in (*NAMES, *WHAT)),
    *(("sharded", name) for name in (*SHARDED, *WHAT)),
]


@pytest.mark.parametrize(("kind", "what"), RUNS)
def test_processes_train_as_one(kind, what, found, expected):
    """Also where there are fewer sequences in a step than processes."""
    theirs = expected[what]
    first, *others = [rank[kind][what] for rank in found]
    exact = what != "bfloat16"
    assert error(first, theirs) < (EXACT if exact else BFLOAT16)
    for mine, wanted in zip(
        first["provenance"]["curve"], theirs["provenance"]["curve"], strict=True
    ):
        # In bfloat16 a KL of 3e-3 is no more than the rounding of activations.
        assert mine == pytest.approx(
            wanted, rel=1e-7 if exact else 0.1, abs=1e-12 if exact else 3e-3
        )
    for ours in others:
        assert same(ours, first)  # processes whose weights differ in a bit would drift apart
        assert ours["provenance"] == first["provenance"]


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_one_process_are_far_off(name, found, expected):
    """Negative control: without the sum."""
    assert max(error(rank["not summed"][name], expected[name]) for rank in found) > 0.1


@pytest.mark.parametrize("kind", ["whole", "sharded"])
@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_of_processes_ends_where_an_uninterrupted_one_does(name, kind, found):
    for rank in found:
        run = rank[kind]["resumed"][name]
        assert same(run, run["resumed"])
        assert run["provenance"] == run["resumed"]["provenance"]
        assert same(run, found[0][kind]["resumed"][name])
        # What is kept holds for a model that is divided in another way. Adam's rounding: see alike.
        assert error(run["resumed whole"], run) < 1e-5
        assert not same(run, rank[kind][name])  # the comparison can tell runs apart


def test_a_process_holds_its_parts_of_masters_and_optimiser_state(found, expected):
    for what, numbers in expected["held"].items():
        for name, all_of_it in numbers.items():
            own = [rank["sharded"]["held"][what][name] for rank in found]
            if ".layers." in name:
                assert sum(own) == all_of_it
                assert max(own) < 0.6 * all_of_it
            else:
                assert set(own) == {all_of_it}
            # Negative control: of a whole model every process holds all.
            assert {rank["whole"]["held"][what][name] for rank in found} == {all_of_it}
