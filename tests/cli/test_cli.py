"""The command line from end to end on tiny models: what it writes, and every way to be refused."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import zoo
from helpers import command_line
from processes import start
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from zoo.rows import FORGET, RETAIN

from kfade.cli import main
from kfade.cli.session import show
from kfade.method.update import Update
from kfade.runs.config import read_config


def write_lines(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def setup(tmp_path, model_dir) -> dict[str, str]:
    return {
        "model": str(model_dir),
        "forget": str(write_lines(tmp_path / "forget.jsonl", FORGET)),
        "retain": str(write_lines(tmp_path / "retain.jsonl", RETAIN)),
        "out": str(tmp_path / "out"),
    }


def unlearn(setup: dict[str, str], *more: str) -> int:
    given = [
        *("unlearn", setup["model"], "--forget", setup["forget"], "--retain", setup["retain"]),
        *("--out", setup["out"], "--sequence-length", "8"),
    ]
    return main(command_line(given, more))


def leftovers(setup: dict[str, str]) -> list[str]:
    return [p.name for p in Path(setup["out"]).parent.iterdir() if p.name.startswith("out")]


def test_a_run_writes_what_it_promises(setup, capsys):
    assert unlearn(setup, "--kl", "0.01", "--json", "--export-model", "--steps", "2") == 0
    printed = json.loads(capsys.readouterr().out)  # one JSON object and nothing else
    out = Path(setup["out"])
    names = {p.name for p in out.iterdir()}
    assert names == {
        *("update.safetensors", "manifest.json", "metrics.json", "config.yaml", "log.jsonl"),
        "model",
    }
    metrics = json.loads((out / "metrics.json").read_text())
    assert {**metrics, "out": setup["out"]} == printed
    assert len(metrics["steps"]) == 2
    for step in metrics["steps"]:
        assert {"predicted_kl", "measured_kl", "forget_loss_before", "forget_loss_after"} <= set(
            step
        )
    assert metrics["retain_kl"] == pytest.approx(0.01, rel=0.1)
    assert metrics["forget_loss"]["after"] > metrics["forget_loss"]["before"]
    stages = {"load", "fit", "gradient", "step", "check", "correct", "total"}
    assert stages == set(metrics["seconds"])
    assert {"retain", "forget"} <= set(metrics["tokens"])
    assert metrics["peak_bytes"] > 0
    # The exported model is the base plus the update, to the bit.
    edited, _ = AutoModelForCausalLM.from_pretrained(out / "model"), None
    base = AutoModelForCausalLM.from_pretrained(setup["model"])
    Update.load(out).apply(base)
    for name, parameter in base.named_parameters():
        assert torch.equal(parameter, dict(edited.named_parameters())[name]), name


def test_a_run_says_what_it_read(setup, capsys):
    """A short set is one packed sequence; a small model has thousands of parameters, not 0.0 M."""
    texts = [{"text": f"a b c {letter}"} for letter in "defgh"]
    write_lines(Path(setup["forget"]), texts)
    write_lines(Path(setup["retain"]), texts)
    for length, packed in (("32", "1 sequence (packed)"), ("8", "3 sequences (packed)")):
        assert unlearn(setup, "--sequence-length", length, "--alpha", "0.01", "--holdout", "1") == 0
        said = " ".join(capsys.readouterr().err.split())
        assert "6 weights targeted, " in said
        assert " k parameters" in said
        assert f"forget: 5 texts in {packed}; retain: 4 texts in " in said
        assert "held-out retain: 1 text in 1 sequence (packed)" in said
        shutil.rmtree(setup["out"])
    assert unlearn(setup, "--no-pack", "--alpha", "0.01", "--holdout", "1") == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "forget: 5 texts in 5 sequences; retain: 4 texts in 4 sequences; held-out" in said


def test_config_replays_a_run(setup, tmp_path):
    assert unlearn(setup, "--alpha", "0.05", "--labels", "sampled", "--layers", "1") == 0
    config = Path(setup["out"]) / "config.yaml"
    arguments = ["unlearn", setup["model"], "--config", str(config), "--out", str(tmp_path / "o2")]
    assert main(arguments) == 0
    first = load_file(Path(setup["out"]) / "update.safetensors")
    second = load_file(tmp_path / "o2" / "update.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    # An option given goes before the file.
    other = str(tmp_path / "o3")
    assert main([*arguments[:4], "--alpha", "0.01", "--out", other]) == 0
    third = load_file(Path(other) / "update.safetensors")
    assert any(not torch.equal(first[name], third[name]) for name in first)


def test_apply_then_revert(setup, tmp_path, capsys):
    assert unlearn(setup, "--kl", "0.01") == 0
    edited, back = str(tmp_path / "edited"), str(tmp_path / "back")
    assert main(["apply", setup["model"], setup["out"], "--out", edited, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["base_weights"] is True
    assert main(["revert", edited, setup["out"], "--out", back]) == 0
    base = load_file(Path(setup["model"]) / "model.safetensors")
    changed = load_file(Path(edited) / "model.safetensors")
    restored = load_file(Path(back) / "model.safetensors")
    assert any(not torch.equal(base[name], changed[name]) for name in base)
    for name in base:  # one rounding of a float32 weight
        assert torch.allclose(base[name], restored[name], rtol=1e-6, atol=1e-8)


def test_apply_to_a_descendant_is_allowed_and_said(setup, tmp_path, capsys):
    assert unlearn(setup, "--kl", "0.01") == 0
    child = tmp_path / "child"
    model = AutoModelForCausalLM.from_pretrained(setup["model"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    zoo.save(child, model)
    assert main(["apply", str(child), setup["out"], "--out", str(tmp_path / "o"), "--json"]) == 0
    output = capsys.readouterr()
    assert json.loads(output.out)["base_weights"] is False
    assert "fine-tuned" in output.err


def test_a_saved_curvature_gives_the_same_update(setup, tmp_path, capsys):
    fitted, second = str(tmp_path / "fit"), str(tmp_path / "o2")
    arguments = ["--retain", setup["retain"], "--sequence-length", "8"]
    assert main(["fit", setup["model"], *arguments, "--out", fitted, "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert {"load", "covariance", "eigh", "lambda", "save", "total"} == set(metrics["seconds"])
    assert unlearn(setup, "--kl", "0.01") == 0
    assert unlearn({**setup, "out": second}, "--kl", "0.01", "--curvature", fitted) == 0
    ours = load_file(Path(setup["out"]) / "update.safetensors")
    theirs = load_file(Path(second) / "update.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_saved_curvature_of_another_model_is_refused(setup, tmp_path, capsys):
    fitted, other = str(tmp_path / "fit"), tmp_path / "other"
    arguments = ["--retain", setup["retain"], "--sequence-length", "8"]
    assert main(["fit", setup["model"], *arguments, "--layers", "0", "--out", fitted]) == 0
    zoo.save(other, zoo.tiny("llama", dtype=torch.float32, seed=5))
    capsys.readouterr()
    changed = {**setup, "model": str(other)}
    assert unlearn(changed, "--curvature", fitted, "--layers", "0") == 2
    assert "fitted on another model" in capsys.readouterr().err
    assert unlearn(setup, "--curvature", fitted) == 2
    assert "does not cover" in capsys.readouterr().err
    assert leftovers(setup) == []


@pytest.mark.parametrize(
    ("refit", "memory"), [("--refit", "--no-recompute"), ("--no-refit", "--recompute")]
)
def test_a_killed_run_resumes_to_the_same_update(setup, tmp_path, monkeypatch, refit, memory):
    """Cut off after its first step, as if by a signal, and resumed, if need be with less memory;
    without --refit from the fit that it kept."""
    arguments = ("--alpha", "0.02", "--steps", "3", "--forget-batch", "2", refit)
    arguments += ("--later-objective", "ce")
    whole = {**setup, "out": str(tmp_path / "whole")}
    assert unlearn(whole, *arguments) == 0
    calls = []

    def interrupted(*line):
        calls.append(line)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr("kfade.runs.unlearning.step_line", interrupted)
    assert unlearn(setup, *arguments) == 130
    monkeypatch.undo()
    assert leftovers(setup) == ["out.part"]
    assert unlearn(setup, *arguments) == 2  # not without being told to
    assert unlearn(setup, *arguments, "--seed", "1", "--resume") == 2  # nor another run
    assert unlearn(setup, *arguments, "--resume", memory) == 0
    assert leftovers(setup) == ["out"]
    first = load_file(Path(whole["out"]) / "update.safetensors")
    second = load_file(Path(setup["out"]) / "update.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "other", [(), ("--steps", "2", "--no-refit", "--objective", "ce", "--refine", "1")]
)
def test_a_refused_size_keeps_the_fit_and_other_settings_go_on_from_it(
    setup, tmp_path, monkeypatch, capsys, other
):
    """Another size, or another number of steps, as the message advises."""
    again = ("--kl", "0.01", *other)
    assert unlearn(setup, "--until", "forget_loss=1e6") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "--until forget_loss=1e+06 (a rise of 5e+05 nats in this step) cannot be" in said
    assert "ask for less, or take more --steps" in said
    kept = f"what was finished is kept in {setup['out']}.part: --resume continues from it, also"
    assert (
        f"{kept} with other settings of size, step, refinement, correction; for a new run" in said
    )
    assert unlearn(setup, *again) == 2  # not without being told to
    assert unlearn(setup, *again, "--seed", "1", "--resume") == 2  # nor another fit

    def fits_again(*arguments, **options):
        raise AssertionError("the fit began anew")

    with monkeypatch.context() as patched:
        patched.setattr("kfade.curvature.fit.run_pass", fits_again)
        assert unlearn(setup, *again, "--resume") == 0
        whole = {**setup, "out": str(tmp_path / "whole")}
        with pytest.raises(AssertionError, match="began anew"):  # control
            unlearn(whole, *again)
    assert unlearn(whole, *again) == 0
    first, second = (load_file(Path(s["out"]) / "update.safetensors") for s in (setup, whole))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_size_cannot_change_once_a_step_is_kept(setup, monkeypatch, capsys):
    def interrupted(*line):
        raise KeyboardInterrupt

    monkeypatch.setattr("kfade.runs.unlearning.step_line", interrupted)
    assert unlearn(setup, "--alpha", "0.02", "--steps", "2") == 130
    monkeypatch.undo()
    assert unlearn(setup, "--alpha", "0.01", "--steps", "2", "--resume") == 2
    assert "--alpha 0.02 (here 0.01)" in capsys.readouterr().err


def test_a_run_that_is_refused_before_it_kept_anything_leaves_nothing(setup, tmp_path, capsys):
    fitted = str(tmp_path / "fit")
    arguments = ["--retain", setup["retain"], "--sequence-length", "8"]
    assert main(["fit", setup["model"], *arguments, "--out", fitted]) == 0
    capsys.readouterr()
    assert unlearn(setup, "--until", "forget_loss=1e6", "--curvature", fitted) == 2
    assert "kept" not in capsys.readouterr().err
    assert leftovers(setup) == []


def test_sigkill_leaves_something_to_resume_or_nothing(setup, tmp_path):
    """Killed for real at some moment: the folder DIR never exists half-written."""
    command = ["unlearn", setup["model"], "--out", setup["out"]]
    command += ["--forget", setup["forget"], "--retain", setup["retain"], "--alpha", "0.01"]
    command += ["--steps", "400", "--sequence-length", "8"]
    part = Path(setup["out"] + ".part")
    process = start(main, command, said=tmp_path / "said")
    deadline = time.time() + 120
    while time.time() < deadline and not list((part / "state").glob("update-*")):
        assert process.exitcode is None, "ended before it could be killed"
        time.sleep(0.05)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert leftovers(setup) == ["out.part"]
    newest = sorted((part / "state").glob("update-*"))[-1]
    assert len(Update.load(newest).provenance["steps"]) >= 1  # whole, not torn


def test_check_passes_on_a_sound_model(setup, capsys):
    code = main(["check", setup["model"], "--retain", setup["retain"], "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["passed"], result
    assert code == 0
    names = [finding["name"] for finding in result["findings"]]
    assert names == [
        *("targets", "padding and batch size", "batched generation"),
        *("exact quadratic form", "fitted curvature"),
    ]


def test_check_fails_when_padding_leaks(setup, capsys, monkeypatch):
    """Control: a model that looks at the width of its batch must not pass."""
    import kfade.curvature.passes as passes

    honest = passes.hidden_states

    def leaky(model, input_BT):
        return honest(model, input_BT) * (1 + 0.1 * input_BT.shape[1])

    monkeypatch.setattr(passes, "hidden_states", leaky)
    assert main(["check", setup["model"], "--retain", setup["retain"], "--json"]) == 1
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert [f["passed"] for f in findings if f["name"] == "padding and batch size"] == [False]


def corrupt(path: Path, name: str) -> None:
    tensors = load_file(path)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--forget", "nowhere.jsonl"), "nowhere.jsonl: no such file"),
        (("--retain", "nowhere.jsonl"), "nowhere.jsonl: no such file"),
        (("--target", "*.nothing.weight"), r"no weight matches '\*.nothing.weight'"),
        (("--layers", "0-99"), "this model has blocks 0 to"),
        (("--layers", "first"), "write block numbers as"),
        (("--alpha", "-1"), "--alpha -1.0: give a positive, finite number"),
        (("--kl", "nan"), "--kl nan: give a positive"),
        (("--kl", "0.1", "--alpha", "0.1"), "give exactly one of"),
        (("--max-kl", "0"), "--max-kl 0.0: give a positive"),
        (("--until", "loss=3"), "write forget_loss=NUMBER"),
        (("--until", "forget_probability=1"), "forget_probability=1.0: give a number between"),
        (("--until", "forget_probability=0.9"), "=0.9: the probability is .* already; ask"),
        (("--until", "forget_loss=0.0001"), "already; ask for more"),
        (("--until", "forget_loss=-1"), "--until -1.0: give a positive"),
        (("--damping", "-1"), "--damping -1.0: give a finite number"),
        (("--damping", "1", "--relative-damping", "1"), "not both"),
        (("--steps", "0"), "--steps 0: give 1 or more"),
        (("--forget-batch", "99"), "the forget set has 4"),
        (("--holdout", "10"), "--holdout 10: give 1 to 9"),
        (("--estimator", "shampoo"), "--estimator shampoo: give ekfac"),
        (("--labels", "true"), "--labels true: give sqrt"),
        (("--objective", "loss"), "--objective loss: give margin"),
        (("--bound", "-1"), "--bound -1.0: give a positive, finite number, or 0"),
        (("--noise", "1"), "--noise 1.0: give a number from 0"),
        (("--later-objective", "loss", "--steps", "2"), "--later-objective loss: give margin"),
        (
            ("--later-objective", "ce", "--steps", "1"),
            "--later-objective ce needs a second step: give --steps",
        ),
        (("--template", "llama"), "--template llama: give auto"),
        (("--template", "chat"), "no chat template"),
        (("--sequence-length", "100000"), "over the model's window"),
        (("--sequence-length", "1"), "--sequence-length must be 2 or more"),
        (("--dtype", "int8"), "--dtype int8: give one of"),
        (("--curvature", "nowhere"), "no such curvature"),
        (("--config", "nowhere.yaml"), "nowhere.yaml: no such configuration"),
    ],
)
def test_bad_options(setup, capsys, more, message):
    """One line, exit code 2, nothing left on disk."""
    import re

    assert unlearn(setup, *more) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("kfade: ")]
    assert len(lines) == 1
    assert re.search(message, lines[0]), lines[0]
    assert leftovers(setup) == []


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"text": "a b"}', "{oops"], "line 2: not valid JSON"),
        (['{"txt": "a b"}'], "line 1: has the keys txt"),
        ([], "holds no examples"),
        (['{"text": " "}'], "line 1: the text to score is blank"),
        (['{"prompt": "' + "a " * 200 + '", "completion": "b"}'], "over the model's window"),
    ],
)
def test_bad_forget_data(setup, capsys, lines, message):
    Path(setup["forget"]).write_text("\n".join(lines))
    assert unlearn(setup) == 2
    assert message in capsys.readouterr().err
    assert leftovers(setup) == []


def test_long_sequences_are_cut_only_when_asked(setup):
    row = {"prompt": "a b", "completion": " c d e f" * 50}
    write_lines(Path(setup["forget"]), [row])
    assert unlearn(setup, "--kl", "0.01") == 2
    assert unlearn(setup, "--kl", "0.01", "--truncate") == 0


def test_an_output_folder_of_another_run_is_refused(setup, capsys):
    Path(setup["out"]).mkdir()
    (Path(setup["out"]) / "manifest.json").write_text("{}")
    assert unlearn(setup) == 2
    assert "already exists and is not empty" in capsys.readouterr().err
    assert [p.name for p in Path(setup["out"]).iterdir()] == ["manifest.json"]


def test_an_output_that_cannot_be_written_is_refused(setup, capsys):
    blocker = Path(setup["out"]).with_name("file")
    blocker.write_text("")
    assert unlearn({**setup, "out": str(blocker / "run")}) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_an_update_of_another_model_is_refused(setup, tmp_path, capsys):
    assert unlearn(setup, "--kl", "0.01") == 0
    for family, message in (("gpt2", "does not have"), ("qwen3", "the model has")):
        folder = tmp_path / family
        model = zoo.tiny(family, dtype=torch.float32)
        if family == "qwen3":  # same names; make the shapes differ
            for block in model.model.layers:
                for linear in (block.mlp.gate_proj, block.mlp.up_proj, block.mlp.down_proj):
                    linear.weight = torch.nn.Parameter(linear.weight.detach().repeat(2, 1))
            with pytest.raises(Exception, match="the model has"):
                Update.load(setup["out"]).apply(model)
            continue
        zoo.save(folder, model)
        assert main(["apply", str(folder), setup["out"], "--out", str(tmp_path / "o")]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "o").exists()


def test_nan_in_weights_names_the_weight(setup, tmp_path, capsys):
    broken = tmp_path / "broken"
    zoo.save(broken)
    corrupt(broken / "model.safetensors", "model.layers.1.mlp.up_proj.weight")
    assert unlearn({**setup, "model": str(broken)}) == 2
    assert "NaN or Inf in model.layers.1.mlp.up_proj.weight" in capsys.readouterr().err
    assert leftovers(setup) == []


def test_overflowing_activations_name_the_layer(setup, tmp_path, capsys):
    """Finite weights, infinite activations: the first layer that shows it is named."""
    broken = tmp_path / "broken"
    model = zoo.tiny("llama", dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(3e38)
    zoo.save(broken, model)
    assert unlearn({**setup, "model": str(broken)}) == 2
    assert "activations of model.layers.0.mlp.down_proj.weight" in capsys.readouterr().err
    assert leftovers(setup) == []


def test_out_of_memory_says_what_to_lower(setup, capsys, monkeypatch):
    def full(*arguments, **named):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 TB")

    monkeypatch.setattr("kfade.runs.unlearning.unlearn_model", full)
    assert unlearn(setup) == 2
    assert "lower --batch-tokens" in capsys.readouterr().err
    assert leftovers(setup) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "step:\n  stepz: 2\n",
            "c.yaml, step: unknown key 'stepz'; did you mean steps? known",
        ),
        (
            "kl: 0.02\n",
            "c.yaml: unknown key 'kl'; did you mean kl under size? known",
        ),
        ("sizes:\n  kl: 0.02\n", "unknown key 'sizes'; did you mean size? known"),
        ("step:\n  forget: f\n", "unknown key 'forget'; did you mean forget under data? known"),
        ("fit:\n  joint-bias: true\n", "unknown key 'joint-bias'; did you mean joint_bias? known"),
        ("fit:\n  seed: 1\n", "unknown key 'seed'; did you mean seed, not indented? known keys"),
        ("zzz: 1\n", "c.yaml: unknown key 'zzz'; known keys are model, data, fit"),
        ("step:\n  steps: two\n", "c.yaml, step, steps: 'two' is not a whole number"),
        ("step:\n  refit: 1\n", "refit: 1 is not true or false"),
        ("size:\n  kl: true\n", "kl: True is not a number or null"),
        ("fit:\n  layers: 1.5\n", "layers: 1.5 is not text or null; write text in quotes"),
        ("data:\n  template_args: a=1\n", "template_args: 'a=1' is not a list, as in [a, b]"),
        ("step: [1]\n", "c.yaml, step: expected settings as 'name: value', found [1]; known keys"),
        ("step: {", "not valid YAML"),
    ],
)
def test_unknown_config_keys_and_types(setup, tmp_path, capsys, text, message):
    config = tmp_path / "c.yaml"
    config.write_text(text)
    assert unlearn(setup, "--config", str(config)) == 2
    assert message in capsys.readouterr().err


def test_text_in_yaml_needs_no_quotes(tmp_path):
    """Also where YAML reads it as a number or a date."""
    config = tmp_path / "c.yaml"
    config.write_text("fit: {layers: 0}\ndata: {template_date: 2026-01-31}\n")
    run = read_config(config)
    assert (run.fit.layers, run.data.template_date) == ("0", "2026-01-31")


@pytest.mark.parametrize("command", ["unlearn", "fit", "apply", "revert", "check", "demo"])
def test_help_names_every_option(command, capsys):
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert "Usage" in text
    assert "--json" in text


def test_brackets_in_what_a_model_says_are_printed(capsys):
    show({}, False, ["said '[/INST]' and [[rating]]"])
    assert capsys.readouterr().err == "said '[/INST]' and [[rating]]\n"
