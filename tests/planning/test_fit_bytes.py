"""Bytes of curvature: worked out by hand, in groups, and as a budget."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
from helpers import random_sequences, tiny_llama
from plan_models import LLAMA_7B, SMALL, packed, saved, small
from transformers import MistralConfig, PhiConfig

from kfade.curvature.draws import square_root_draw
from kfade.curvature.eigh import workspace_bytes
from kfade.curvature.estimators import EKFAC, KFAC, Diagonal, Identity
from kfade.curvature.factors import SLAB_BYTES, factor_bytes
from kfade.curvature.groups import group_by_input, group_targets
from kfade.curvature.owners import Owners
from kfade.curvature.store import Store
from kfade.curvature.sums import Covariances, Eigenvalues
from kfade.data.batches import make_batches
from kfade.errors import InputError
from kfade.models.layers import find_targets
from kfade.models.load import load_skeleton
from kfade.planning.arrange import USABLE, Arranger, usable
from kfade.planning.cost import flops
from kfade.planning.memory import (
    RUNTIME_BYTES,
    Work,
    examine,
    model_bytes,
    overhead,
    peaks,
)
from kfade.planning.trace import trace_pass

CPU = torch.device("cpu")
ZEPHYR = MistralConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=32000,
    dtype="bfloat16",
)
PHI = PhiConfig(
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=24,
    num_attention_heads=32,
    vocab_size=51200,
    dtype="float32",
)


# --- bytes by hand -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "layers", "widths_of_a_block", "blocks", "gigabytes"),
    [
        # A of gate and up, A of down, S of gate, of up and of down.
        (LLAMA_7B, None, [4096, 11008, 11008, 11008, 4096], 32, 50.8),
        (ZEPHYR, "3-6", [4096, 14336, 14336, 14336, 4096], 4, 10.4),
        (PHI, None, [2048, 8192, 8192, 2048], 24, 13.7),
    ],
    ids=["llama-2-7b", "zephyr-7b", "phi-1.5"],
)
def test_factors_of_known_models(tmp_path, config, layers, widths_of_a_block, blocks, gigabytes):
    targets = find_targets(load_skeleton(saved(config, tmp_path)), layers=layers)
    by_hand = blocks * 4 * sum(width**2 for width in widths_of_a_block)
    assert factor_bytes(targets) == by_hand
    assert by_hand / 1e9 == pytest.approx(gigabytes, abs=0.05)


def test_a_block_of_llama_2_7b_shares_a(tmp_path):
    targets = find_targets(load_skeleton(saved(LLAMA_7B, tmp_path)), layers="0")
    assert factor_bytes(targets) / 1e9 == pytest.approx(1.59, abs=0.005)
    # Negative control: without sharing, one more A of 4096².
    alone = sum(4 * (t.shape[0] ** 2 + t.shape[1] ** 2) for t in targets)
    assert alone - factor_bytes(targets) == 4 * 4096**2


def test_bytes_of_a_fit_by_hand(monkeypatch):
    targets = find_targets(small(torch.bfloat16))
    factors = 3 * 4 * (64**2 + 3 * 224**2 + 64**2)
    grids, largest = 3 * 3 * 4 * 64 * 224, 4 * 64 * 224
    assert EKFAC().fit_bytes(targets) == {
        "covariance": factors,
        "eigh": factors + workspace_bytes([224], 4, CPU),
        "lambda": factors + factors // 2 + grids + 2 * largest,  # a copy of the bases in bfloat16
    }
    assert EKFAC().fit_bytes(find_targets(small()))["lambda"] == factors + grids + 2 * largest
    assert Diagonal().fit_bytes(targets) == {"lambda": grids + 2 * largest}
    assert Identity().fit_bytes(targets) == {}
    assert KFAC().stored_bytes(targets) == factors + grids
    monkeypatch.setitem(SLAB_BYTES, "cpu", 10**6)  # products of several sequences at once
    assert Diagonal().fit_bytes(targets) == {"lambda": grids + 2 * 10**6}


def test_bytes_of_sums_are_those_of_a_fit():
    model = small(torch.bfloat16)
    targets = find_targets(model)
    owners = Owners(targets, EKFAC().peak_bytes, spread=False)
    sums = Covariances(owners).tensors()
    assert sum(t.numel() * t.element_size() for t in sums.values()) == factor_bytes(targets)
    bases = {t.name: (torch.eye(t.shape[0]), torch.eye(t.shape[1])) for t in targets}
    grids = Eigenvalues(owners, bases).tensors()
    assert (
        sum(t.numel() * t.element_size() for t in grids.values())
        == EKFAC().stored_bytes(targets) - factor_bytes(targets)
        == Diagonal().stored_bytes(targets)
    )


@pytest.mark.parametrize("kind", [KFAC, EKFAC, Diagonal])
def test_bytes_of_curvature_files(tmp_path, kind):
    model = small()
    targets = find_targets(model)
    kind().fit(model, make_batches(packed(4, 17)), targets).save(tmp_path / "curvature.safetensors")
    written = (tmp_path / "curvature.safetensors").stat().st_size
    assert kind().stored_bytes(targets) == pytest.approx(written, rel=0.03)


def test_an_identity_is_a_number_a_layer():
    targets = find_targets(small())
    curvature = Identity().fit(small(), [], targets)
    held = sum(b.eigenvalues.numel() * 4 for b in curvature.blocks.values())
    assert Identity().stored_bytes(targets) == held == 36


# --- groups ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [KFAC, EKFAC, Diagonal])
def test_more_memory_never_needs_more_groups(tmp_path, kind):
    targets = find_targets(load_skeleton(saved(SMALL, tmp_path)))
    units = group_by_input(targets)
    least = max(kind().peak_bytes(unit) for unit in units)
    most = kind().peak_bytes(targets)
    counts = []
    for step in range(41):
        budget = least + (most - least) * step // 40
        groups = group_targets(targets, kind().peak_bytes, budget)
        assert [t for group in groups for t in group] == targets
        assert all(kind().peak_bytes(group) <= budget for group in groups)
        counts.append(len(groups))
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == 1 < counts[0]
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp.* raise it"):
        group_targets(targets, kind().peak_bytes, least - 1)


def test_fewer_groups_hold_more_and_pass_less(tmp_path):
    model = load_skeleton(saved(SMALL, tmp_path))
    subject = examine(
        model, find_targets(model), Work(EKFAC(), sequence_length=33, batch_tokens=64)
    )
    work = Work(EKFAC(), retain_tokens=330, sequence_length=33)
    one, many = [list(subject.targets)], group_by_input(subject.targets)
    assert len(many) == 6
    at_once, in_turn = (peaks(subject, groups, work) for groups in (one, many))
    assert all(in_turn[stage] <= at_once[stage] for stage in at_once)
    assert in_turn["lambda"] < at_once["lambda"]
    few, more = (flops(subject, groups, work) for groups in (one, many))
    assert more["covariance"]["forward"] == pytest.approx(6 * few["covariance"]["forward"])
    # The highest group's backward is short, the lowest group's is the whole.
    backward = more["covariance"]["backward"] / few["covariance"]["backward"]
    assert 1 < backward < 6
    # Products and decompositions are shared out, not repeated.
    assert more["covariance"]["products"] == pytest.approx(few["covariance"]["products"])
    assert more["eigh"] == few["eigh"]


def test_peaks_by_hand(tmp_path):
    model = load_skeleton(saved(SMALL, tmp_path))
    targets = find_targets(model)
    work = Work(EKFAC(), sequence_length=33, batch_tokens=64)
    subject = examine(model, targets, work)
    assert subject.cost.shape == (2, 32)
    factors, grids, largest = factor_bytes(targets), 3 * 3 * 4 * 64 * 224, 4 * 64 * 224
    parameters = 2 * 50 * 64 + 3 * (64 * 64 * 3 + 3 * 64 * 224 + 2 * 64) + 64
    fixed = RUNTIME_BYTES + 4 * parameters + 4 * 16  # and the rotary frequencies, twice 8
    assert model_bytes(model) == fixed - RUNTIME_BYTES
    held, surplus = subject.cost.held_bytes[targets[0].input_of], subject.cost.surplus_bytes
    inputs, chunk = 64 * 4 * 3 * (64 + 224), 64 * 50 * 4  # fewer positions than a whole chunk
    assert 4 * chunk < surplus  # here backward is what needs most
    found = peaks(subject, [targets], work)
    assert found["load"] == fixed
    assert found["covariance"] == fixed + factors + held + surplus
    assert found["eigh"] == fixed + factors + workspace_bytes([224], 4, CPU)
    lambda_ = fixed + factors + grids + 2 * largest + held + surplus + inputs
    assert found["lambda"] == lambda_
    assert overhead(subject, EKFAC.passes) == lambda_ - factors - grids - 2 * largest
    assert found["gradient"] == fixed + held + surplus + inputs + grids + largest
    forward = subject.cost.forward_bytes
    layer = 4 * (64**2 + 224**2) + largest
    solve = layer + 2 * grids + 4 * largest
    exact = grids + 2 * forward + 6 * chunk + 2 * largest
    choice = grids + exact  # of a damping, with the gradient
    assert found["step"] == fixed + max(solve, choice)
    assert found["check"] == fixed + 2 * grids + 3 * largest + forward + 8 * chunk
    # A damping for a gradient of the prompts is chosen by one of all positions.
    more = peaks(subject, [targets], replace(work, chooses_at_prompts=True))
    assert {k: more[k] - found[k] for k in found if more[k] != found[k]} == {
        "gradient": grids,
        "step": grids,
    }
    # Kept elsewhere, no vector counts; a gradient's pass holds the layers of one input.
    groups = group_by_input(targets)
    less = peaks(subject, groups, replace(work, offload=True), gradient_groups=groups)
    solve, exact = layer + 4 * largest, 2 * forward + 6 * chunk + 2 * largest
    assert less["step"] == fixed + max(solve, exact)
    assert less["check"] == fixed + 3 * largest + forward + 8 * chunk
    assert less["gradient"] < found["gradient"] - 6 * largest


def test_head_bytes_are_those_of_a_chunk(tmp_path):
    model = load_skeleton(saved(SMALL, tmp_path))
    targets = find_targets(model)
    subject = examine(model, targets, Work(EKFAC(), sequence_length=33, batch_tokens=256))
    assert subject.cost.positions == 256
    assert subject.head_bytes("fit") == 4 * 128 * 50 * 4
    for vocabulary, positions in ((49152, 128), (2**20, 128)):
        wide = replace(subject, head=(vocabulary, 64))
        assert wide.head_bytes("check") == 8 * positions * vocabulary * 4
    work = Work(EKFAC(), sequence_length=33, batch_tokens=2048)
    subject = examine(model, targets, work, device=torch.device("cuda"))
    wide = replace(subject, head=(49152, 64))  # of a skeleton, for a run on another device
    assert wide.head_bytes("fit") == 4 * 1365 * 49152 * 4


def test_a_group_is_gone_when_the_next_is_fitted(tmp_path):
    model = small()
    targets = find_targets(model)
    finished: list[weakref.ref] = []
    alive: list[int] = []

    class Watched(Store):
        def finish(self, number, blocks, *rest):
            super().finish(number, blocks, *rest)
            finished.extend(weakref.ref(block.eigenvalues) for block in blocks.values())
            assert all(reference() is not None for reference in finished[-len(blocks) :])

    def draw(p_NV, key_N):
        alive.append(sum(reference() is not None for reference in finished))
        return square_root_draw(p_NV, key_N)

    largest = max(EKFAC().peak_bytes(unit) for unit in group_by_input(targets))
    batches = make_batches(packed(4, 17))
    EKFAC(draw).fit(model, batches, targets, memory=largest, store=Watched(tmp_path))
    assert len(finished) == 9
    assert len(alive) > 6
    assert not any(alive)


# --- the budget of fits ------------------------------------------------------------------------


def budget(model, targets, work, kind="fit", **more) -> int:
    """Bytes of curvature that a device of 1 GB holds beside the model and a pass."""
    way = Arranger(model, targets, work, kind, **{"may_recompute": False, **more}).within(10**9)
    assert way is not None
    return way.budget + 10**9 - usable(way.subject, 10**9)


def test_a_run_is_arranged_to_fit():
    """The first of the ways that fits, in order of their cost in time, and no other."""
    model = small()
    targets, work = find_targets(model), Work(EKFAC(), batch_tokens=256, sequence_length=33)
    arranger = Arranger(model, targets, work, "unlearn", refit=True)
    at_once, least = arranger.at_once().peak_bytes, arranger.least(0).peak_bytes
    fixed, ways = at_once["load"], {}

    def of(bytes_used: int) -> int:
        """The memory of which so many bytes may be planned for."""
        return fixed + int((bytes_used - fixed) / USABLE) + 2

    for total in range(max(at_once.values()) + 2_000_000, max(least.values()), -100_000):
        way = arranger.within(of(total))
        if way is not None:
            peak = max(way.peak_bytes.values())
            assert way.fits(of(peak))
            assert not way.fits(of(peak) - 4)
            assert peak <= total + 2
        ways.setdefault(way and (way.work.recompute, way.work.offload), total)
    assert list(ways) == [(False, False), (False, True), (True, False), (True, True), None]
    way = arranger.within(of(ways[True, True]))
    assert way.options(3 * 10**9) == "--memory 3GB --offload auto --recompute"
    as_asked = replace(arranger, may_recompute=False, may_offload=False)
    assert as_asked.within(of(ways[False, True])) is None
    assert as_asked.within(of(ways[False, False])).work == work


def test_curvature_budget_leaves_room_for_model_and_pass():
    model = small()
    targets = find_targets(model)
    subject = examine(model, targets, Work(EKFAC(), batch_tokens=64, sequence_length=33))
    least = overhead(subject, EKFAC.passes)
    work = Work(EKFAC(), batch_tokens=64, sequence_length=33)
    assert budget(model, targets, work) == 10**9 - least
    kfac = budget(model, targets, replace(work, estimator=KFAC()))
    assert kfac - (10**9 - least) == subject.input_bytes(targets)
    # A run's gradient holds the inputs of all layers too; later fits have the update beside them.
    both = overhead(subject, (*EKFAC.passes, "gradient"))
    assert budget(model, targets, work, kind="unlearn") == 10**9 - both
    again = budget(model, targets, work, kind="unlearn", refit=True, may_offload=False)
    assert again == 10**9 - both - 2 * 4 * 9 * 64 * 224
    away = budget(model, targets, replace(work, offload=True), kind="unlearn", refit=True)
    assert away == 10**9 - both
    # Twice the positions, nearly twice the activations.
    wide = examine(model, targets, Work(EKFAC(), batch_tokens=128, sequence_length=33))
    ratio = wide.cost.held_bytes[targets[0].name] / subject.cost.held_bytes[targets[0].name]
    assert ratio == pytest.approx(2, rel=0.02)


def test_shards_of_a_model(tmp_path):
    model = small()
    block = 4 * (3 * 64 * 64 + 3 * 64 * 224 + 2 * 64)
    outside = 4 * (2 * 50 * 64 + 64 + 16)
    assert model_bytes(model) == outside + 3 * block
    assert model_bytes(model, 6) == outside + 3 * block // 6 + 2 * block
    targets = find_targets(model)
    work = Work(EKFAC(), batch_tokens=64, sequence_length=64)
    whole, spread = (budget(model, targets, work, shards=n) for n in (1, 6))
    assert spread - whole == 3 * block - (3 * block // 6 + 2 * block)


def test_the_helpers_of_other_tests_can_be_planned():
    model = tiny_llama(torch.float32)
    targets = find_targets(model)
    batches = make_batches(random_sequences(4))
    shape = tuple(batches[0].input_BT.shape)
    assert trace_pass(model, targets, shape).positions == batches[0].positions
