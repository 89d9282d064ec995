"""Flops and seconds of a whole fit: by hand, and beside a real fit."""

from __future__ import annotations

import pytest
import torch
from plan_models import SMALL, packed, saved, small
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

import kfade.planning.cost
import kfade.planning.memory
from kfade.curvature.draws import square_root_draw
from kfade.curvature.eigh import PROBES
from kfade.curvature.estimators import EKFAC, Diagonal
from kfade.curvature.factors import factor_bytes, widths
from kfade.data.batches import make_batches
from kfade.method import gauges, settings
from kfade.models.head import read_head
from kfade.models.layers import find_targets
from kfade.models.load import frozen, load_skeleton
from kfade.planning.cost import EIGH_FLOPS, Speed, flops, lambda_flops, measure_speed, seconds
from kfade.planning.cost import symmetric_flops as symmetric
from kfade.planning.memory import Work, examine
from kfade.runtime.distributed import assign_by_cost


def heads_of(query, shapes):
    """Shapes [B, heads, positions, width] with the query's heads, which kernels repeat keys to."""
    return [(shape[0], query[1], *shape[2:]) for shape in shapes]


class Counter(TorchDispatchMode):
    """Flops of products, by shapes; attention as torch counts it on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name, shapes = func.__name__.split(".")[0], [getattr(a, "shape", a) for a in args]
        if name == "mm":
            self.flops += flop_registry[torch.ops.aten.mm](*args, out_val=result)
        elif name == "addmm_":
            self.flops += flop_registry[torch.ops.aten.addmm](*args, out_val=result)
        elif name == "bmm":
            self.flops += flop_registry[torch.ops.aten.bmm](*args, out_val=result)
        elif name == "_scaled_dot_product_flash_attention_for_cpu":
            self.flops += sdpa_flop_count(*heads_of(shapes[0], shapes[:3]))
        elif name == "_scaled_dot_product_flash_attention_for_cpu_backward":
            self.flops += sdpa_backward_flop_count(*heads_of(shapes[1], shapes[:4]))
        else:
            assert name not in ("addmm", "baddbmm", "convolution"), name
        return result


# --- flops of a whole fit ----------------------------------------------------------------------


@pytest.mark.parametrize("length", [33, 9], ids=["long", "short"])
def test_flops_of_a_real_fit(length):
    # In bfloat16 every product is made by itself, so the counter sees them all.
    model = small(torch.bfloat16)
    targets = find_targets(model)
    sequences = packed(6, length)
    work = Work(EKFAC(), 6 * length, 6 * length, length, batch_tokens=2 * (length - 1))
    subject = examine(model, targets, work)
    batches = make_batches(sequences, budget=work.batch_tokens)
    assert tuple(batches[0].input_BT.shape) == work.shape == subject.cost.shape
    with Counter() as counter:
        EKFAC(square_root_draw).fit(model, batches, targets)
    with Counter() as extra, frozen(model):  # the head is checked before the passes
        read_head(model)
    # Each decomposition is checked on a few columns: M(QX) and Q(ΛX).
    residuals = sum(3 * 2 * PROBES * d**2 for d in widths(targets))
    counted = counter.flops - extra.flops - residuals
    plan = flops(subject, [targets], work)
    predicted = sum(
        amount
        for stage in ("covariance", "lambda")
        for kind, amount in plan[stage].items()
        if kind != "squares"
    )
    assert predicted == pytest.approx(counted, rel=1e-6)
    assert plan["eigh"]["decompositions"] == EIGH_FLOPS * sum(d**3 for d in widths(targets))


def test_symmetric_products_by_hand():
    assert symmetric(100) == 2 * 100 * 100  # one panel: the whole
    assert symmetric(192 + 8) == 2 * (200 * 192 + 8 * 8)
    assert symmetric(1536) / (2 * 1536**2) == pytest.approx(9 / 16)


def test_lambda_turns_the_cheaper_side():
    targets = find_targets(small(), layers="0")
    gate_up = targets[:2]
    short, long = Work(EKFAC(), sequence_length=61, retain_tokens=61), Work(EKFAC(), 601, 1, 601)
    o, i = 224, 64
    # 60 rows: the input once for both, 2·60·64²; each gradient 2·60·224²; each product 2·60·o·i.
    rows = 2 * 60 * i * i + 2 * (2 * 60 * o * o + 2 * 60 * o * i)
    assert lambda_flops(gate_up, short) == (rows, 2 * 2 * o * i)
    # 600 rows: more than 2·224 and than 64, so each product of a sequence is turned on both sides.
    products = 2 * (2 * o * i * i + 2 * o * o * i + 2 * 600 * o * i)
    assert lambda_flops(gate_up, long) == (products, 2 * 2 * o * i)
    diagonal = Work(Diagonal(), 61, 1, 61)
    assert lambda_flops(gate_up, diagonal) == (2 * 2 * 60 * o * i, 2 * 2 * o * i)


def test_plans_count_what_runs_measure():
    """Planning and method do not import each other, so some counts stand in both."""
    cost, memory = kfade.planning.cost, kfade.planning.memory
    assert (cost.MEASURED, cost.PART) == (gauges.MEASURED_SEQUENCES, gauges.PART)
    assert cost.BANDS == settings.DEFAULT_BANDS
    assert memory.LEAST_RETAIN == settings.LEAST_RETAIN


# --- seconds -----------------------------------------------------------------------------------


def test_seconds_follow_speed_and_devices(tmp_path):
    model = load_skeleton(saved(SMALL, tmp_path))
    work = Work(EKFAC(), retain_tokens=3300, sequence_length=33, batch_tokens=64)
    subject = examine(model, find_targets(model), work)
    groups = [list(subject.targets)]
    one = seconds(subject, groups, work, Speed(1e9, 1e9))
    twice = seconds(subject, groups, work, Speed(2e9, 2e9))
    assert {stage: 2 * taken for stage, taken in twice.items()} == pytest.approx(one)
    three = seconds(subject, groups, work, Speed(1e9, 1e9), devices=3)
    for stage in ("covariance", "lambda", "gradient"):
        assert three[stage] == pytest.approx(one[stage] / 3)
    # Each computes the directions, 4·o·i·(o + i) a weight, one of the step and three of the choice
    # of its damping, and only the measuring is shared.
    direction = 4 * 9 * 4 * 64 * 224 * (64 + 224) / (0.93 * 1e9)
    assert three["step"] - direction == pytest.approx((one["step"] - direction) / 3)
    assert three["check"] == pytest.approx(one["check"] / 3)
    # Nine of width 224 and six of 64 on three devices: three of the large and two of the small.
    assert three["eigh"] == pytest.approx(EIGH_FLOPS * (3 * 224**3 + 2 * 64**3) / 1e9)
    vectors = 4 * 9 * 64 * 224
    assert three["exchange"] == (2 * factor_bytes(subject.targets) + 4 * vectors) / 10e9
    assert "exchange" not in one
    # A decomposition gains nothing from a GPU that is fast at products.
    fast, faster = (seconds(subject, groups, work, Speed(s, s)) for s in (2e12, 2e14))
    assert fast["eigh"] == faster["eigh"]
    slow = seconds(subject, groups, work, Speed(1e9, 1e9, bandwidth=1e6))
    squares = flops(subject, groups, work)["lambda"]["squares"]
    assert slow["lambda"] - one["lambda"] == pytest.approx(6 * squares / 1e6)


def test_assigned_among_more_processes_than_there_are():
    assert assign_by_cost([1.0, 5.0, 3.0], among=2) == [1, 0, 1]
    assert assign_by_cost([1.0, 5.0, 3.0]) == [0, 0, 0]


def test_measured_speed_is_what_the_clock_says(monkeypatch):
    def typical(work, device):
        work()
        return 0.1

    monkeypatch.setattr(kfade.planning.cost, "_typical", typical)
    speed = measure_speed(torch.device("cpu"), torch.bfloat16)
    assert speed.products == speed.float32 == 2 * 1024**3 / 0.1
    assert speed.bandwidth == 12 * 2**25 / 0.1
