"""What is said of an update that is not there, is there already, or that no adapter can hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file

from kfade.cli import main
from kfade.method.update import Update
from kfade.models.load import save_model
from kfade.models.sources import Place, Resolved


@pytest.fixture
def desk(tmp_path) -> dict[str, str]:
    """A model, an update of it, and the model with that update."""
    save_model(zoo.tiny("llama", torch.float32), zoo.tokenizer(), tmp_path / "model")
    for name, rows in (("forget", "fghi"), ("retain", "abcdefghij")):
        lines = [json.dumps({"text": f"{x} k l m n o p q"}) + "\n" for x in rows]
        (tmp_path / name).write_text("".join(lines))
    names = ("model", "forget", "retain", "run", "edited", "out")
    desk = {name: str(tmp_path / name) for name in names}
    data = ["--forget", desk["forget"], "--retain", desk["retain"], "--sequence-length", "8"]
    assert main(["unlearn", desk["model"], *data, "--alpha", "0.05", "--out", desk["run"]]) == 0
    assert main(["apply", desk["model"], desk["run"], "--out", desk["edited"]]) == 0
    return desk


def said(capsys) -> str:
    return " ".join(capsys.readouterr().err.split())


def test_an_update_that_is_not_there_is_not_taken_away(desk, capsys):
    capsys.readouterr()
    assert main(["revert", desk["model"], desk["run"], "--out", desk["out"]]) == 2
    assert "so it does not contain the update" in said(capsys)
    assert not Path(desk["out"]).exists()
    assert main(["revert", desk["edited"], desk["run"], "--out", desk["out"]]) == 0
    assert "note" not in said(capsys)


def test_an_update_that_may_not_be_there_is_taken_away_and_that_is_said(desk, capsys):
    path = Path(desk["edited"]) / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"] += 1
    save_file(tensors, path, {"format": "pt"})
    capsys.readouterr()
    assert main(["revert", desk["edited"], desk["run"], "--out", desk["out"]]) == 0
    assert f"no record shows that {desk['edited']} contains this update" in said(capsys)


def test_an_update_that_is_there_already_is_said(desk, capsys):
    capsys.readouterr()
    assert main(["apply", desk["edited"], desk["run"], "--out", desk["out"]]) == 0
    error = said(capsys)
    assert f"{desk['edited']} contained this update already; it has been added again" in error
    assert "fine-tuned descendant" not in error


def test_the_digest_of_edited_weights_is_of_the_edited_model():
    model = zoo.tiny("llama", torch.float32)
    name = "model.layers.1.mlp.up_proj.weight"
    weight = model.get_parameter(name)
    before = weight.detach().clone()
    update = Update({name: torch.full_like(weight, 0.5)})
    update = Update(update.deltas, update.edited_digest(model))
    assert torch.equal(weight, before)
    assert update.is_in(model) is None  # nothing tells of the base
    update.apply(model)
    assert update.is_in(model) is True


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's calls of transformers
def test_an_adapter_is_not_put_on_an_adapter(desk, tmp_path, capsys):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(zoo.tiny("llama", torch.float32), config)
    adapted.peft_config["default"].base_model_name_or_path = desk["model"]
    with torch.no_grad():
        for name, tensor in adapted.named_parameters():
            if "lora_B" in name:
                tensor += 0.1
    adapter = str(tmp_path / "adapter")
    zoo.save(adapter, adapted)
    data = ["--forget", desk["forget"], "--retain", desk["retain"], "--sequence-length", "8"]
    assert main(["unlearn", adapter, *data, "--alpha", "0.05", "--out", desk["out"]]) == 0
    capsys.readouterr()
    export = ["export-lora", desk["out"], "--rank", "4"]
    assert main(export) == 2
    error = said(capsys)
    assert f"{adapter}: is an adapter itself, to which peft cannot add an adapter" in error
    assert "kfade apply" in error
    assert "give that folder as --model" in error
    assert not list(Path(desk["out"]).glob("lora*"))
    merged = tmp_path / "merged"
    save_model(adapted.merge_and_unload(), zoo.tokenizer(), merged)
    assert main([*export, "--model", str(merged)]) == 0
    assert "for a model with that adapter merged" in said(capsys)
    # The same weights, so that the update is at home there.
    assert main(["apply", str(merged), desk["out"], "--out", str(tmp_path / "e"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["base"] == "same"


def test_an_adapter_is_not_put_on_a_gguf_file(desk, monkeypatch, capsys):
    place = Place("folder", {"gguf_file": "m.gguf"})
    monkeypatch.setattr("kfade.runs.editing.resolve", lambda source: Resolved(place, place))
    capsys.readouterr()
    assert main(["export-lora", desk["run"], "--rank", "4", "--model", "m.gguf"]) == 2
    assert "m.gguf: is a GGUF file, to which peft cannot add an adapter" in said(capsys)


def test_updates_of_two_architectures_are_not_added(desk, tmp_path, capsys):
    def saved(name: str, weight: str, architecture: str | None) -> str:
        update = Update({weight: torch.ones(2, 2)}, {"architecture": architecture})
        (tmp_path / name).mkdir()
        update.save(tmp_path / name / "update.safetensors")
        return str(tmp_path / name)

    one = saved("a", "transformer.h.0.mlp.c_fc.weight", "GPT2LMHeadModel")
    other = saved("b", "model.layers.0.mlp.up_proj.weight", "LlamaForCausalLM")
    untold = saved("c", "model.layers.0.mlp.down_proj.weight", None)
    common = saved("d", "model.layers.1.mlp.up_proj.weight", "LlamaForCausalLM")
    capsys.readouterr()
    assert main(["merge", one, other, "--out", desk["out"]]) == 2
    line = "computed on a LlamaForCausalLM, " + one + " on a GPT2LMHeadModel"
    assert line in said(capsys)
    for number, pair in enumerate(((one, untold), (other, common))):
        assert main(["merge", *pair, "--out", f"{desk['out']}{number}"]) == 0
    manifest = json.loads((Path(desk["run"]) / "manifest.json").read_text())
    assert manifest["architecture"] == "LlamaForCausalLM"
