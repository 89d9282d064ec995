"""Mixtures of many families: predictions, batches, files, processes and bfloat16, with experts."""

from __future__ import annotations

import pytest
import torch
from expert_families_worker import (
    FAMILIES,
    found_in,
    gradient_of,
    mixture,
    muse_spark,
    retain,
    step_of,
)
from helpers import relative_error, same_bits
from processes import run_together

from kfade import Update, find_targets
from kfade.models.experts import ExpertLayer, is_expert_layer, routed

KLS = (1e-8, 1e-9)  # a larger step changes which experts run, and outputs jump


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return mixture(request.param)


def test_all_experts_are_targets(model):
    layers = [module for module in model.modules() if is_expert_layer(module)]
    assert layers
    found = [target for target in find_targets(model) if target.is_routed]
    assert len(found) == sum(2 * layer.num_experts for layer in layers)


def test_a_norm_after_each_expert_and_choices_of_no_expert():
    family = pytest.importorskip("transformers.models.muse_spark.modeling_muse_spark")
    experts = family.MuseSparkExperts(muse_spark())
    torch.manual_seed(0)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    assert is_expert_layer(experts)
    assert experts.has_post_expert_norm
    hidden_ND, weights_NK = torch.randn(20, experts.down_proj.shape[1]), torch.rand(20, 2)
    numbers = torch.arange(experts.num_experts + 1)  # the last one means none
    chosen_NK = torch.stack([numbers.roll(n)[:2] for n in range(20)])
    layer, rows = ExpertLayer(experts), []
    for map_ in layer.first:
        map_.register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    with torch.no_grad():
        expected = experts(hidden_ND, chosen_NK, weights_NK)
        with routed([layer]):
            found = experts(hidden_ND, chosen_NK, weights_NK)
    assert sum(rows) == (chosen_NK < experts.num_experts).sum() < chosen_NK.numel()
    assert relative_error(found, expected) < 1e-6


def test_predictions_hold_as_the_step_becomes_small(model):
    for kl in KLS:
        [step] = step_of(model, kl=kl).provenance["steps"]
        ratios = (
            step["measured_kl"] / step["exact_kl"],
            step["measured_objective_change"] / step["predicted_objective_change"],
        )
        if all(abs(ratio - 1) < 0.05 for ratio in ratios):
            break
    assert ratios == pytest.approx((1, 1), abs=0.05)
    assert step["measured_objective_change"] > 0


def test_batches_and_padding_do_not_matter(model):
    alone, together = (gradient_of(model, retain(), budget) for budget in (1, 1000))
    other = gradient_of(model, retain(seed=9), 1000)
    for name, gradient in alone.items():
        # Sums of float32 in another order.
        assert relative_error(together[name], gradient) < 1e-3
    assert any(relative_error(other[n], g) > 0.1 for n, g in alone.items())  # control


def test_an_update_survives_its_file_and_is_taken_back(model, tmp_path):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    update = step_of(model, alpha=0.05)
    update.save(tmp_path / "update.safetensors")
    loaded = Update.load(tmp_path / "update.safetensors")
    assert any(name.endswith("]") for name in loaded.deltas)
    with loaded.applied_to(model):
        inside = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert any(not same_bits(inside[name], weight) for name, weight in before.items())
    assert all(same_bits(p.detach(), before[name]) for name, p in model.named_parameters())
    loaded.apply(model)
    assert all(same_bits(p.detach(), inside[name]) for name, p in model.named_parameters())
    loaded.revert(model)
    for name, parameter in model.named_parameters():
        assert (parameter.detach() - before[name]).abs().max() <= 1e-6
        with torch.no_grad():
            parameter.copy_(before[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_in_bfloat16(family):
    [step] = step_of(mixture(family).bfloat16(), alpha=0.5).provenance["steps"]
    assert 0 < step["measured_kl"] < 10
    assert step["measured_objective_change"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_processes_find_what_one_finds(count, tmp_path):
    import expert_families_worker

    run_together(count, expert_families_worker.main, tmp_path, said=tmp_path / "said")
    expected = found_in("mixtral")
    for rank in range(count):
        found = torch.load(tmp_path / f"{rank}.pt")
        for name, tensor in expected.items():
            # float32 sums in another order, through eigenvectors.
            assert relative_error(found[name], tensor) < 1e-3
