"""What rounding to a model's dtype alone measures as, and what is refused because of it."""

from __future__ import annotations

import json

import pytest
import torch
import zoo
from helpers import NoFit, flat, measured_kl, random_sequences, tiny_llama

import kfade
from kfade import Damping
from kfade.cli import main
from kfade.curvature.factors import CovarianceSum
from kfade.data.batches import make_batches
from kfade.errors import InputError
from kfade.method.gauge import Gauge
from kfade.method.grid import Point
from kfade.method.measure import rounding_changes
from kfade.method.size import StepSize
from kfade.method.sweep import Shared, sweep
from kfade.method.update import Update
from kfade.models.layers import find_targets
from kfade.models.weights import parameter_names

LOW = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", LOW)
def test_changes_like_rounding_move_weights_by_a_unit_in_the_last_place(dtype):
    model = tiny_llama(dtype, layers=6)
    names = parameter_names(find_targets(model))
    weights = dict(model.named_parameters())
    with torch.no_grad():
        weights[names[0]][0, :6] = torch.tensor([0.0, 1.0, -1.0, 2.0, 1.5, -0.25])
    moved, count = [], 0
    for name, change in rounding_changes(model, names, seed=3).items():
        weight = weights[name].detach()
        assert change.dtype == dtype
        there = weight + change  # has a place in the dtype: taken back it is the weight again
        assert torch.equal(there - change, weight)
        steps = (there.view(torch.int16).int() - weight.view(torch.int16).int()).abs()
        # From a power of two downwards two of the smaller units.
        assert ((steps <= 1) | ((steps == 2) & (there.abs() < weight.abs()))).all()
        assert (change[weight == 0] == 0).all()
        moved.append((change != 0).sum().item())
        count += change.numel()
    assert sum(moved) / count == pytest.approx(1 / 12, rel=0.3)


@pytest.fixture
def data():
    return {
        "forget": random_sequences(2, seed=2),
        "held_out": random_sequences(4, seed=1),
        "retain": random_sequences(6),
    }


def floor_of(model, data) -> float:
    batches = make_batches(data["held_out"])
    return Gauge(model, batches, make_batches(data["forget"])).rounding_kl(find_targets(model))


def test_the_floor_is_what_such_a_change_measures(data):
    model = tiny_llama(torch.bfloat16)
    changes = rounding_changes(model, parameter_names(find_targets(model)))
    floor = floor_of(model, data)
    assert floor == measured_kl(model, make_batches(data["held_out"]), Update(changes))
    # In float32 the same change of the same weights measures less: activations are not rounded.
    exact = measured_kl(
        tiny_llama(torch.bfloat16).float(),
        make_batches(data["held_out"]),
        Update({name: change.float() for name, change in changes.items()}),
    )
    assert 0 < exact < floor < 1e-2
    assert floor_of(tiny_llama(torch.float32), data) == 0


def test_a_kl_below_the_floor_is_refused_before_the_fit(data):
    model = tiny_llama(torch.bfloat16)
    floor = floor_of(model, data)

    told = rf"rounding to bfloat16 alone measures as {floor:.1e} .*--dtype float32"
    for size in ({"kl": 0.9 * floor}, {"until": 9.0, "max_kl": 0.9 * floor}):
        flag = "--max-kl" if "max_kl" in size else "--kl"
        with pytest.raises(InputError, match=f"{flag} [0-9.e-]+: {told}"):
            kfade.unlearn(model, **data, fit=NoFit(), **flat(**size))
    with pytest.raises(InputError, match=f"in --steps 3: the first step aims at .*{told}"):
        kfade.unlearn(model, **data, fit=NoFit(), **flat(kl=5 * floor, steps=3))
    # Negative controls: a KL above it, and the same KL in float32.
    with pytest.raises(AssertionError, match="fitted"):
        kfade.unlearn(model, **data, fit=NoFit(), **flat(kl=1.1 * floor))
    with pytest.raises(AssertionError, match="fitted"):
        kfade.unlearn(model.float(), **data, fit=NoFit(), **flat(kl=0.9 * floor))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_in_float32_a_kl_near_rounding_is_refused_too(data, dtype):
    model = tiny_llama(torch.float32).to(dtype)

    targets = find_targets(model)
    gauge = Gauge(model, make_batches(data["held_out"]), make_batches(data["forget"]))
    floor = gauge.rounding_kl(targets, 1e-30)
    changes = rounding_changes(model, parameter_names(targets))
    assert floor == measured_kl(model, make_batches(data["held_out"]), Update(changes))
    eps = torch.finfo(dtype).eps
    assert (0.01 * eps) ** 2 < floor < 1e-11
    told = (
        rf"--kl [0-9.e-]+: rounding to {str(dtype)[6:]} alone measures as {floor:.1e} .*data; ask"
    )
    for size in ({"kl": 0.9 * floor}, {"alpha": 1.0, "max_kl": 0.9 * floor}):
        with pytest.raises(
            InputError, match=told.replace("kl", next(reversed(size))).replace("_", "-")
        ) as refused:
            kfade.unlearn(model, **data, fit=NoFit(), **flat(**size))
        assert "--dtype" not in str(refused.value)  # there is none that is finer
    with pytest.raises(AssertionError, match="fitted"):
        kfade.unlearn(model, **data, fit=NoFit(), **flat(kl=1.1 * floor))


def test_in_float32_a_kl_far_above_rounding_costs_no_pass(data, monkeypatch):
    model = tiny_llama(torch.float32)
    gauge = Gauge(model, make_batches(data["held_out"]), make_batches(data["forget"]))
    monkeypatch.setattr("kfade.method.gauge.rounding_changes", None)
    assert gauge.rounding_kl(find_targets(model), 1e-8) == 0


def test_a_run_in_low_precision_meets_a_kl_above_the_floor(data):
    model = tiny_llama(torch.bfloat16)
    asked = 30 * floor_of(model, data)
    update = kfade.unlearn(model, **data, **flat(kl=asked))
    assert update.provenance["steps"][-1]["retain_kl"] == pytest.approx(asked, rel=0.1)


def test_points_of_a_sweep_below_the_floor_fail_and_say_why(data):
    model = tiny_llama(torch.bfloat16)
    targets, floor = find_targets(model), floor_of(model, data)
    points = [
        Point("margin", "all", Damping(0.1), StepSize(kl=times * floor)) for times in (0.5, 30.0)
    ]
    curvature = kfade.KFAC().fit(model, make_batches(data["retain"]), targets)
    shared = Shared(curvature, targets, {"margin": kfade.margin})
    low, high = sweep(model, points, shared, forget=data["forget"], held_out=data["held_out"])
    assert "rounding to bfloat16 alone measures as" in low.failure
    assert high.failure is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_check_passes_on_a_model_that_is_fine(tmp_path, capsys, family, dtype):
    zoo.save(tmp_path / "model", zoo.tiny(family, dtype=torch.float32))
    letters = "abcdefghijklmnopqrstuvwxyz"
    texts = [" ".join(letters[i % 26] for i in range(k, 15 * k, k)) for k in range(1, 12)]
    lines = "\n".join(json.dumps({"text": text}) for text in texts)
    (tmp_path / "retain.jsonl").write_text(lines)
    given = ["--retain", str(tmp_path / "retain.jsonl"), "--dtype", dtype, "--json"]
    assert main(["check", str(tmp_path / "model"), *given]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["passed"]


def test_float16_is_refused_where_gradients_are_computed(data):
    model = tiny_llama(torch.float16)
    targets, batches = find_targets(model), make_batches(data["retain"])
    told = "is float16, whose range is too small.*--dtype bfloat16"
    with pytest.raises(InputError, match=told):
        kfade.unlearn(model, **data, **flat(kl=0.1))
    with pytest.raises(InputError, match=told):
        kfade.KFAC().fit(model, batches, targets)
    assert floor_of(model, data) > 0  # forward passes are not


def test_float16_could_not_hold_the_square_of_an_activation():
    """Why it is refused: such activations are common at the first position of a text."""
    rows = torch.full((4, 3), 300.0)
    for dtype, fits in ((torch.float16, False), (torch.bfloat16, True)):
        total = CovarianceSum(3, torch.float32, rows.device)
        total.add(rows.to(dtype))
        assert torch.isfinite(total.sum_).all() == fits
