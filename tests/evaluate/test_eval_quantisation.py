"""Round-to-nearest: the grids by hand, models restored to the bit, what survives of an update."""

from __future__ import annotations

import json

import pytest
import torch
import zoo
from helpers import Snapshot, tiny_llama
from transformers import GptOssConfig, GptOssForCausalLM

from kfade.cli import main
from kfade.errors import InputError
from kfade.evaluate.log import read_log
from kfade.evaluate.quantisation import (
    int4,
    int8,
    linear_weights,
    overall,
    quantised,
    rounding_of,
    survival,
)
from kfade.method.update import Update


def test_int8_by_hand():
    # Scales 1 and 2 per row: steps of 1 up to 127, and of 2 up to 254.
    weight = torch.tensor([[127.0, 0.4, -0.6, 100.5], [-254.0, 0.9, 1.1, 3.0]])
    expected = torch.tensor([[127.0, 0.0, -1.0, 100.0], [-254.0, 0.0, 2.0, 4.0]])
    assert torch.equal(int8(weight), expected)


def test_int4_by_hand():
    """130 inputs: 128 share one scale, the last two another."""
    weight = torch.zeros(1, 130)
    weight[0, :3] = torch.tensor([7.0, 1.4, -3.6])
    weight[0, 128:] = torch.tensor([70.0, 14.0])
    rounded = int4(weight)
    assert rounded[0, :3].tolist() == [7.0, 1.0, -4.0]
    assert rounded[0, 128:].tolist() == [70.0, 10.0]
    assert rounded[0, 3:128].abs().max() == 0
    short = torch.tensor([[7.0, 1.4], [0.0, 0.0]])  # a whole row where it is shorter
    assert int4(short).tolist() == [[7.0, 1.0], [0.0, 0.0]]


@pytest.mark.parametrize(("rounding", "levels"), [(int8, 127), (int4, 7)])
def test_error_is_at_most_half_a_step(rounding, levels):
    weight = torch.randn(16, 300, generator=torch.Generator().manual_seed(0))
    group = 300 if levels == 127 else 128
    rounded = rounding(weight)
    for row in range(16):
        for start in range(0, 300, group):
            part = slice(start, start + group)
            step = weight[row, part].abs().max() / levels
            assert (rounded[row, part] - weight[row, part]).abs().max() <= step * 0.5001
            assert len(rounded[row, part].unique()) <= 2 * levels + 1
    assert torch.allclose(rounding(rounded), rounded, rtol=1e-5)  # on the grid already
    assert rounding(weight.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("rounding", [int8, int4])
def test_a_model_is_rounded_and_restored(family, rounding):
    model = zoo.tiny(family, dtype=torch.float32)
    before = Snapshot.of(model)
    names = set(linear_weights(model))
    blocks = zoo.FAMILIES[family].blocks
    assert names == {
        f"{name}.weight"
        for name, module in model.named_modules()
        if name.startswith(blocks) and getattr(module, "weight", torch.zeros(1)).ndim == 2
    }
    with quantised(model, rounding):
        for name, parameter in model.named_parameters():
            old = before.weights[name]
            if name not in names:
                assert torch.equal(parameter, old), name
            elif family == "gpt2":  # stored the other way round: a scale for each column
                assert torch.equal(parameter.T, rounding(old.T)), name
            else:
                assert torch.equal(parameter, rounding(old)), name
    assert before.differences(model) == []


def test_restored_after_an_error_and_with_an_update():
    model = tiny_llama(torch.bfloat16)
    before = Snapshot.of(model)
    name = "model.layers.0.mlp.up_proj.weight"
    update = Update({name: torch.ones(12, 8)})

    def fail_within():
        with update.applied_to(model), quantised(model, int4):
            assert not torch.equal(model.get_parameter(name), before.weights[name])
            raise RuntimeError("within")

    with pytest.raises(RuntimeError, match="within"):
        fail_within()
    assert before.differences(model) == []
    with quantised(model, None):
        assert before.differences(model) == []


def test_words():
    assert (rounding_of(None), rounding_of("int8"), rounding_of("int4")) == (None, int8, int4)
    with pytest.raises(InputError, match="give int8 or int4"):
        rounding_of("int2")


def test_survival_by_hand():
    model = tiny_llama(torch.float32)
    name = "model.layers.0.mlp.up_proj.weight"
    weight = model.get_parameter(name)
    with torch.no_grad():
        weight.zero_()
        weight[:, 0] = 127.0  # int8 steps of 1, int4 steps of 127/7
    whole = torch.zeros(12, 8)
    whole[:, 1:] = 3.0  # on int8's grid; below half a step of int4's
    half = torch.zeros(12, 8)
    half[0, 1], half[0, 2] = 1.0, 0.25  # the first is kept, the second lost
    found = survival(model, Update({name: whole}))[name]
    assert found["int8"]["surviving"] == pytest.approx(1.0)
    assert found["int8"]["lost"] == pytest.approx(0.0, abs=1e-6)
    assert (found["int4"]["surviving"], found["int4"]["lost"]) == (0.0, 1.0)
    assert found["bfloat16"]["surviving"] == pytest.approx(1.0)
    found = survival(model, Update({name: half}))[name]
    assert found["int8"]["surviving"] == pytest.approx(1 / 1.0625)
    assert found["int8"]["lost"] == pytest.approx(0.25 / 1.0625**0.5)


def test_overall_is_that_of_one_long_vector():
    model = tiny_llama(torch.float32)
    generator = torch.Generator().manual_seed(0)
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1)]
    deltas = {
        n: (i + 1) * 0.01 * torch.randn(12, 8, generator=generator) for i, n in enumerate(names)
    }
    norm = "model.layers.0.input_layernorm.weight"
    found = survival(model, Update({**deltas, norm: torch.ones(8)}))
    assert set(found) == set(names)  # a norm's weight is not rounded
    seen = torch.cat(
        [int8(model.get_parameter(n) + d) - int8(model.get_parameter(n)) for n, d in deltas.items()]
    )
    delta = torch.cat(list(deltas.values()))
    figures = overall(found)["int8"]
    assert figures["surviving"] == pytest.approx(
        ((seen * delta).sum() / delta.square().sum()).item()
    )
    assert figures["lost"] == pytest.approx(((seen - delta).norm() / delta.norm()).item(), rel=1e-5)


def test_no_change_at_all_survives():
    model = tiny_llama(torch.float32)
    found = survival(model, Update({"model.layers.0.mlp.up_proj.weight": torch.zeros(12, 8)}))
    figures = overall(found)
    assert figures["int4"] == {"surviving": 1.0, "lost": 0.0}


def test_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = zoo.tiny("gpt2", dtype=torch.float32)
    zoo.save("model", model)
    weight = "transformer.h.0.mlp.c_fc.weight"
    delta = 0.3 * torch.randn(zoo.WIDTH, zoo.INNER, generator=torch.Generator().manual_seed(0))
    Update({weight: delta}).save(tmp_path / "update.safetensors")
    command = ["eval", "quantisation", "model", "--update", "update.safetensors"]
    assert main([*command, "--out", "out", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    rounding = printed["rounding"]
    assert rounding["bfloat16"]["lost"] < rounding["int8"]["lost"] < rounding["int4"]["lost"]
    assert printed["weights"] == 1
    assert list(read_log(tmp_path / "out/items.jsonl").items) == [weight]
    Update({"none": delta}).save(tmp_path / "other.safetensors")
    assert main([*command[:3], "--update", "other.safetensors", "--out", "o2"]) == 2
    assert "computed on another model" in capsys.readouterr().err
    assert not (tmp_path / "o2.part").exists()


def test_experts_are_rounded_and_their_update_survives_or_not():
    """gpt-oss stores an expert's matrix as [I, O]: its scales are per output all the same."""
    config = GptOssConfig(
        hidden_size=8,
        intermediate_size=6,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
        vocab_size=11,
    )
    torch.manual_seed(0)
    model = GptOssForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    fused = model.model.layers[0].mlp.experts.down_proj
    before = fused.detach().clone()
    with quantised(model, int8):
        for expert in range(3):
            assert torch.equal(fused[expert], int8(before[expert].T).T)
        assert not torch.equal(fused, before)
    assert torch.equal(fused, before)
    name = "model.layers.0.mlp.experts.down_proj[1]"
    change = torch.zeros_like(before[1])
    change[2, 5] = 100.0  # input 2, output 5: sets the scale of its output's row, and no other
    found = survival(model, Update({name: change}))
    assert found.keys() == {name}
    lost = int8((before[1] + change).T) - int8(before[1].T) - change.T
    assert found[name]["int8"]["lost"] == pytest.approx(lost.norm().item() / 100, rel=1e-5)
    assert not lost[:5].any()
