"""Sums of updates, and updates as LoRA adapters."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import zoo
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensor

from kfade.cli import main
from kfade.errors import InputError
from kfade.export.lora import to_lora
from kfade.method.gauge import parameter_changes
from kfade.method.update import Update
from kfade.models.layers import find_targets
from kfade.models.load import load_skeleton
from kfade.models.weights import digest_weights, weight_digests


def random_update(model, seed: int = 0, rank: int | None = None, layers: str | None = None):
    """A random change of every target, of that rank if one is given, with honest provenance."""
    generator = torch.Generator().manual_seed(seed)
    changes = {}
    targets = find_targets(model, layers=layers)
    for target in targets:
        out, inner = target.shape
        middle = rank or min(out, inner)
        left, right = (
            torch.randn(s, generator=generator) for s in ((out, middle), (middle, inner))
        )
        changes[target.name] = 0.01 * left @ right
    deltas = parameter_changes(targets, changes)
    return Update(deltas, {"model": "tiny", "weights_sha256": digest_weights(model, deltas)})


def save(update: Update, folder: Path) -> str:
    folder.mkdir()
    update.save(folder / "update.safetensors")
    return str(folder)


def test_a_sum_of_three(tmp_path, capsys):
    model = zoo.tiny("llama", torch.float32)
    updates = [random_update(model, seed) for seed in (1, 2)]
    updates.append(random_update(model, 3, layers="1"))  # only some of the weights
    paths = [save(update, tmp_path / f"u{i}") for i, update in enumerate(updates)]
    out = tmp_path / "sum"
    assert main(["merge", *paths, "--out", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["notes"] == []
    merged = Update.load(out)
    for name, delta in merged.deltas.items():
        parts = [u.deltas[name] for u in updates if name in u.deltas]
        assert len(parts) == (3 if ".1." in name else 2)
        assert torch.equal(delta, sum(parts[1:], parts[0]))
    assert merged.provenance["merged"] == [u.provenance for u in updates]
    assert merged.provenance["model"] == "tiny"
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["kind"] == "merge"
    assert manifest["updates"] == paths
    squares = sum(d.double().square().sum().item() for d in merged.deltas.values())
    assert told["norm"] == pytest.approx(squares**0.5, rel=1e-6)


def test_a_sum_of_one_base_still_knows_it(tmp_path):
    model = zoo.tiny("llama", torch.float32)
    paths = [save(random_update(model, s), tmp_path / f"u{s}") for s in (1, 2)]
    assert main(["merge", *paths, "--out", str(tmp_path / "sum")]) == 0
    assert Update.load(tmp_path / "sum").fits_base(model)
    assert not Update.load(tmp_path / "sum").fits_base(zoo.tiny("llama", torch.float32, seed=1))


def test_a_sum_of_other_weights_of_one_base_still_knows_it(tmp_path, capsys):
    model = zoo.tiny("llama", torch.float32)
    updates = [random_update(model, number, layers=str(number)) for number in (0, 1)]
    assert updates[0].deltas.keys().isdisjoint(updates[1].deltas)
    digests = weight_digests(model, "model")
    paths = [
        save(Update(update.deltas, {**update.provenance, **digests}), tmp_path / f"u{number}")
        for number, update in enumerate(updates)
    ]
    assert main(["merge", *paths, "--out", str(tmp_path / "sum")]) == 0
    merged = Update.load(tmp_path / "sum")
    assert merged.compare_base(model) == "same"
    assert merged.is_in(model) is False
    assert merged.compare_base(copy.deepcopy(model).to(torch.bfloat16)) == "rounded"
    assert merged.compare_base(copy.deepcopy(model).to(torch.float64)) == "equal"
    other = copy.deepcopy(model)
    other.lm_head.weight.data[0, 0] += 1.0  # a weight that no part changes
    assert merged.compare_base(other) == "other"
    folders = {"base": model, "other": other}
    for name, its in folders.items():
        zoo.save(tmp_path / name, its)
        capsys.readouterr()
        edit = [str(tmp_path / name), "--update", str(tmp_path / "sum")]
        assert main(["apply", *edit, "--out", str(tmp_path / f"{name}-edited")]) == 0
        said = " ".join(capsys.readouterr().err.split())
        assert ("these are not the weights" in said) == (name == "other")
    # Without digests of the model nothing can be shown.
    assert updates[0].plus(updates[1].deltas).compare_base(model) == "other"
    assert (updates[0] + updates[1]).compare_base(model) == "other"


def test_other_bases_are_said(tmp_path, capsys):
    first = random_update(zoo.tiny("llama", torch.float32))
    second = random_update(zoo.tiny("llama", torch.float32, seed=1))
    paths = [save(first, tmp_path / "a"), save(second, tmp_path / "b")]
    assert main(["merge", *paths, "--out", str(tmp_path / "sum")]) == 0
    assert "b was computed on other weights than" in " ".join(capsys.readouterr().err.split())
    merged = Update.load(tmp_path / "sum")
    assert "weights_sha256" not in merged.provenance
    assert not merged.fits_base(zoo.tiny("llama", torch.float32))
    third = Update(random_update(zoo.tiny("llama", torch.float32), layers="0").deltas,
                   {"model": "another"})  # fmt: skip
    paths = [paths[0], save(third, tmp_path / "c")]
    assert main(["merge", *paths, "--out", str(tmp_path / "sum2"), "--json"]) == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert len(notes) == 1
    assert "a was computed on tiny" in notes[0]
    assert "c on another" in notes[0]


def test_updates_of_other_shapes_are_refused(tmp_path, capsys):
    first = random_update(zoo.tiny("llama", torch.float32))
    name = next(iter(first.deltas))
    second = Update({name: first.deltas[name][:1]})  # would be broadcast
    paths = [save(first, tmp_path / "a"), save(second, tmp_path / "b")]
    assert main(["merge", *paths, "--out", str(tmp_path / "sum")]) == 2
    assert f"changes {name} of shape (1, 16)" in capsys.readouterr().err
    assert not list(tmp_path.glob("sum*"))
    assert main(["merge", paths[0], "--out", str(tmp_path / "sum")]) == 2
    assert "only one update" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi"])
def test_an_update_of_low_rank_is_its_adapter(family):
    model = zoo.tiny(family, torch.float32)
    update = random_update(model, rank=3)
    lora = to_lora(update, model, 3)
    assert lora.error < 1e-5
    transposed = zoo.FAMILIES[family].transposed
    assert lora.config["fan_in_fan_out"] is transposed
    for name, delta in update.deltas.items():
        layer = name.removesuffix(".weight")
        a = lora.tensors[f"base_model.model.{layer}.lora_A.weight"]
        b = lora.tensors[f"base_model.model.{layer}.lora_B.weight"]
        out, inner = delta.T.shape if transposed else delta.shape
        assert a.shape == (3, inner)
        assert b.shape == (out, 3)
        product = (b @ a).T if transposed else b @ a
        assert torch.allclose(product, delta, atol=1e-6)


def test_the_error_by_hand():
    """Singular values 3, 2, 1 at rank 1: √5 / √14; with a weight of rank 1: √5 / √(14 + 25)."""
    model = zoo.tiny("llama", torch.float32)
    first, second = zoo.FAMILIES["llama"].weights[:2]
    deltas = {name: torch.zeros(24, 16) for name in (first, second)}
    deltas[first][[4, 2, 7], [1, 5, 0]] = torch.tensor([3.0, -2.0, 1.0])
    deltas[second][0, :2] = torch.tensor([3.0, 4.0])
    lora = to_lora(Update(deltas), model, 1)
    assert lora.errors[first] == pytest.approx((5 / 14) ** 0.5, rel=1e-6)
    assert lora.errors[second] == pytest.approx(0.0, abs=1e-6)
    assert lora.error == pytest.approx((5 / 39) ** 0.5, rel=1e-6)
    product = (
        lora.tensors[f"base_model.model.{first[:-7]}.lora_B.weight"]
        @ lora.tensors[f"base_model.model.{first[:-7]}.lora_A.weight"]
    )
    expected = torch.zeros(24, 16)
    expected[4, 1] = 3.0
    assert torch.allclose(product, expected, atol=1e-6)


def test_the_error_falls_to_nothing_with_the_rank():
    model = zoo.tiny("llama", torch.float32)
    update = random_update(model)
    errors = [to_lora(update, model, rank).error for rank in (1, 4, 8, 15, 16)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.5
    assert errors[-1] < 1e-6


@pytest.mark.parametrize(("rank", "message"), [(0, "--rank 0: give 1 to 16"), (17, "--rank 17")])
def test_ranks_that_are_none(rank, message):
    model = zoo.tiny("llama", torch.float32)
    with pytest.raises(InputError, match=message):
        to_lora(random_update(model), model, rank)


def test_what_an_adapter_cannot_hold():
    model = zoo.tiny("phi", torch.float32)
    with pytest.raises(InputError, match=r"changes model\.layers\.0\.mlp\.fc1\.bias, which is not"):
        to_lora(Update({"model.layers.0.mlp.fc1.bias": torch.zeros(24)}), model, 1)
    with pytest.raises(InputError, match=r"changes model\.embed_tokens\.weight, which is not"):
        to_lora(Update({"model.embed_tokens.weight": torch.zeros(37, 16)}), model, 1)
    with pytest.raises(InputError, match=r"of shape \(2, 16\), the model has \(24, 16\)"):
        to_lora(Update({"model.layers.0.mlp.fc1.weight": torch.zeros(2, 16)}), model, 1)
    with pytest.raises(InputError, match="the update is empty"):
        to_lora(Update({}), model, 1)


def files(tmp_path: Path, family: str, rank: int) -> tuple[str, str, Update]:
    """(model folder, update folder, update)."""
    model = zoo.tiny(family, torch.float32)
    folder = str(tmp_path / "model")
    zoo.save(folder, model)
    made = random_update(model, rank=rank)
    update = Update(made.deltas, {**made.provenance, "model": folder})
    return folder, save(update, tmp_path / "run"), update


def test_export_writes_what_peft_documents(tmp_path, capsys):
    folder, path, update = files(tmp_path, "llama", 4)
    assert main(["export-lora", path, "--rank", "2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    out = Path(path) / "lora-2"
    assert told["out"] == str(out)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == folder
    assert config["r"] == config["lora_alpha"] == 2
    assert (config["peft_type"], config["task_type"]) == ("LORA", "CAUSAL_LM")
    assert set(config["target_modules"]) == {name.removesuffix(".weight") for name in update.deltas}
    tensors = load_file(out / "adapter_model.safetensors")
    assert set(tensors) == {
        f"base_model.model.{name.removesuffix('weight')}lora_{part}.weight"
        for name in update.deltas
        for part in "AB"
    }
    assert 0.1 < told["relative_error"] < 0.9
    assert set(told["relative_errors"]) == set(update.deltas)
    assert main(["export-lora", path, "--rank", "0"]) == 2
    assert "--rank 0" in capsys.readouterr().err
    assert main(["export-lora", path, "--rank", "1", "--model", "nowhere/at-all"]) == 2
    assert not (Path(path) / "lora-1").exists()


def test_a_skeleton_has_no_weights(tmp_path):
    folder, _, _ = files(tmp_path, "gpt2", 1)
    skeleton = load_skeleton(folder)
    whole = zoo.tiny("gpt2", torch.float32)
    shapes = {name: p.shape for name, p in skeleton.named_parameters()}
    assert shapes == {name: p.shape for name, p in whole.named_parameters()}
    assert all(isinstance(p, FakeTensor) for p in skeleton.parameters())


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's calls of transformers
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi"])
def test_peft_loads_it(tmp_path, family):
    peft = pytest.importorskip("peft")
    _, path, update = files(tmp_path, family, 3)
    assert main(["export-lora", path, "--rank", "3", "--out", str(tmp_path / "lora")]) == 0
    model = zoo.tiny(family, torch.float32)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    merged = peft.PeftModel.from_pretrained(model, str(tmp_path / "lora")).merge_and_unload()
    after = dict(merged.named_parameters())
    assert after.keys() == before.keys()
    for name, weight in before.items():
        wanted = weight + update.deltas[name] if name in update.deltas else weight
        assert torch.allclose(after[name], wanted, atol=1e-5), name
