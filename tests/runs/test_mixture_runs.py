"""Experts of a mixture on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import zoo
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM
from zoo.rows import FORGET, RETAIN

from kfade.cli import main

ALL = ["--expert-rows", "1"]


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Path:
    """A mixture of four experts in two layers."""
    root = tmp_path_factory.mktemp("mixture")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = MixtralConfig(
        **sizes,
        **heads,
        num_local_experts=4,
        num_experts_per_tok=2,
        vocab_size=zoo.tokenizer().vocab_size,
    )
    model = MixtralForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.normal_(std=1.0)  # experts see different numbers of tokens
    zoo.save(root / "model", model)
    for name, rows in (("forget", FORGET), ("retain", RETAIN * 3)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (root / f"{name}.jsonl").write_text(text)
    return root


def words(desk: Path, command: str, out: Path, *more: str) -> list[str]:
    forget = [] if command == "fit" else ["--forget", str(desk / "forget.jsonl"), "--kl", "1e-4"]
    data = [*forget, "--retain", str(desk / "retain.jsonl"), "--sequence-length", "16"]
    return [command, str(desk / "model"), *data, "--out", str(out), *more]


def changed(out: Path) -> set[str]:
    return set(load_file(out / "update.safetensors"))


def test_chosen_experts_are_changed_and_the_checkpoint_stays_as_it_ships(desk, tmp_path, capsys):
    assert main(words(desk, "unlearn", tmp_path / "out", "--experts", "0,3", *ALL)) == 0
    found = changed(tmp_path / "out")
    assert found == {
        f"model.layers.{block}.mlp.experts.{kind}_proj[{expert}]"
        for block in (0, 1)
        for kind in ("gate_up", "down")
        for expert in (0, 3)
    }
    applied = [str(desk / "model"), "--update", str(tmp_path / "out")]
    assert main(["apply", *applied, "--out", str(tmp_path / "applied")]) == 0
    before, after = (
        AutoModelForCausalLM.from_pretrained(path)
        for path in (desk / "model", tmp_path / "applied")
    )
    parameters = dict(after.named_parameters())
    for name, parameter in before.named_parameters():
        moved = parameter != parameters[name]
        if ".experts." in name:
            assert moved.flatten(1).any(dim=1).tolist() == [True, False, False, True]
        else:
            assert not moved.any()
    reverted = [str(tmp_path / "applied"), "--update", str(tmp_path / "out")]
    assert main(["revert", *reverted, "--out", str(tmp_path / "reverted")]) == 0
    again = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "reverted").named_parameters())
    for name, parameter in before.named_parameters():
        # Rounded to float32 when added and when subtracted: half a unit of each result.
        half = torch.finfo(torch.float32).eps / 2
        most = half * (parameters[name].abs() + again[name].abs())
        assert ((parameter - again[name]).abs() <= most).all()


def test_experts_that_see_little_are_left_alone(desk, tmp_path, capsys):
    assert main(words(desk, "unlearn", tmp_path / "all", *ALL)) == 0
    every = changed(tmp_path / "all")
    capsys.readouterr()
    assert main(words(desk, "unlearn", tmp_path / "seen", "--expert-rows", "220")) == 0
    said = " ".join(capsys.readouterr().err.split())
    seen = changed(tmp_path / "seen")
    assert seen < every
    missing = 16 - len(seen)
    assert (
        f"left alone, since fewer than 220 retain tokens reach their experts: {missing} weig"
        in said
    )
    assert main(words(desk, "unlearn", tmp_path / "none", "--expert-rows", "100000")) == 2
    assert "fewer than 100000 retain tokens reach each of the chosen" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_saved_curvature_says_which_experts_there_are(desk, tmp_path):
    assert main(words(desk, "fit", tmp_path / "fit", "--expert-rows", "220")) == 0
    fitted = ["--curvature", str(tmp_path / "fit")]
    assert main(words(desk, "unlearn", tmp_path / "out", *fitted)) == 0
    assert main(words(desk, "unlearn", tmp_path / "own", "--expert-rows", "220")) == 0
    assert changed(tmp_path / "out") == changed(tmp_path / "own")


def test_experts_of_a_layer_may_share_their_input_factor(desk, tmp_path, capsys):
    shared, sizes = ["--expert-inputs", "shared"], {}
    for name, more in (("own", []), ("shared", shared)):
        assert main(words(desk, "fit", tmp_path / name, *ALL, *more)) == 0
        sizes[name] = json.loads((tmp_path / name / "metrics.json").read_text())["curvature_bytes"]
    # Q_I of 3 of 4 experts in each of 2 layers, inputs of width 32 and 24, in float32.
    saved = 4 * 2 * 3 * (32**2 + 24**2)
    assert sizes["own"] - sizes["shared"] == pytest.approx(saved, rel=0.1)  # and in headers
    manifest = json.loads((tmp_path / "shared" / "manifest.json").read_text())
    assert manifest["settings"]["expert_inputs"] == "shared"
    curvature = ["--curvature", str(tmp_path / "shared")]
    assert main(words(desk, "unlearn", tmp_path / "out", *ALL, *shared)) == 0
    assert main(words(desk, "unlearn", tmp_path / "again", *curvature)) == 0
    one, other = (load_file(tmp_path / name / "update.safetensors") for name in ("out", "again"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    capsys.readouterr()
    for given, word in (("own", "shared"), ("shared", "own")):
        refused = ["--curvature", str(tmp_path / word), "--expert-inputs", given]
        assert main(words(desk, "unlearn", tmp_path / "bad", *refused)) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert f"with --expert-inputs {word}, this run is with --expert-inputs {given}" in said
    assert main(words(desk, "fit", tmp_path / "bad", "--expert-inputs", "all")) == 2
    assert "--expert-inputs all: give own (one for each expert)" in capsys.readouterr().err
    assert not (tmp_path / "bad").exists()


def test_the_experts_that_carry_most(desk, tmp_path, capsys):
    more = [*ALL, "--experts", "top:1"]
    one_step = [*more, "--steps", "1"]  # each step chooses anew
    assert main(words(desk, "unlearn", tmp_path / "top", *one_step)) == 0
    found = changed(tmp_path / "top")
    assert len(found) == 4
    assert len({name.partition("[")[2] + name.split(".")[2] for name in found}) == 2
    assert main(words(desk, "fit", tmp_path / "fit", *more)) == 2
    assert "give it to kfade unlearn with the curvature" in capsys.readouterr().err
    assert main(words(desk, "unlearn", tmp_path / "bad", "--experts", "top:x")) == 2
    assert "--experts top:x: write top:N" in capsys.readouterr().err


def test_an_adapter_of_experts_is_refused(desk, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(words(desk, "unlearn", out, "--experts", "1", *ALL)) == 0
    capsys.readouterr()
    given = [str(out), "--rank", "2", "--out", str(tmp_path / "lora")]
    assert main(["export-lora", *given]) == 2
    said = capsys.readouterr().err
    assert "mlp.experts.gate_up_proj[1], which is not the weight of a linear layer" in said
    assert "with --experts none" in said
    assert not (tmp_path / "lora").exists()


def test_experts_of_a_model_without_any_are_refused(desk, tmp_path, capsys):
    zoo.save(tmp_path / "dense", zoo.tiny("llama", dtype=torch.float32))
    for option in ("--experts 3", "--experts top:2", "--expert-inputs shared"):
        given = words(desk, "unlearn", tmp_path / "out", *option.split())
        assert main(["unlearn", str(tmp_path / "dense"), *given[2:]]) == 2
        said = capsys.readouterr().err
        assert f"{option}: no weight that is to be changed belongs to a routed" in said
        assert not (tmp_path / "out").exists()


def test_a_glob_of_experts_that_are_left_out_is_refused(desk, tmp_path, capsys):
    glob = "*.experts.down_proj"
    given = words(desk, "unlearn", tmp_path / "out", "--target", glob, "--experts", "none")
    assert main(given) == 2
    assert (
        f"--target {glob} matches routed experts only, and --experts none leaves these out"
        in " ".join(capsys.readouterr().err.split())
    )
    missing = words(desk, "unlearn", tmp_path / "out", "--target", "*.x", "--experts", "none")
    assert main(missing) == 2
    assert "no weight matches '*.x'" in capsys.readouterr().err


def test_a_check_of_a_mixture(desk, capsys):
    code = main(["check", str(desk / "model"), "--retain", str(desk / "retain.jsonl"), "--json"])
    result = json.loads(capsys.readouterr().out)
    assert "4 x mlp.experts.gate_up_proj" not in result["findings"][0]["text"]
    assert "8 x mlp.experts.gate_up_proj [48, 32]" in result["findings"][0]["text"]
    assert code == 0
