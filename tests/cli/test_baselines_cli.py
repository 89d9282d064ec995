"""``kfade baseline`` from end to end on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import command_line, relative_error
from interrupted_worker import interrupted
from processes import run_together
from safetensors.torch import load_file
from zoo.rows import EXTRA, FORGET, RETAIN

from kfade.cli import main
from kfade.method.update import Update
from kfade.runtime.run_dir import RunDir

NAMES = (
    *("ga", "gd", "kl-min", "npo", "npo-sam", "simnpo", "wga", "satimp", "undial", "soul", "rmu"),
    *("repselect", "elm"),
)


@pytest.fixture
def baseline(tmp_path, model_dir):
    """Run a method into tmp_path / out; returns the exit code."""
    for name, rows in (("forget", FORGET), ("retain", RETAIN)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    data = ("--forget", f"{tmp_path}/forget.jsonl", "--retain", f"{tmp_path}/retain.jsonl")

    def run(method: str, *more: str, out: str = "out", processes: int = 1, cut: int = 0) -> int:
        given = [
            *("baseline", method, str(model_dir), *data, "--out", f"{tmp_path}/{out}"),
            *("--sequence-length", "8", *EXTRA.get(method, ())),
        ]
        words = command_line(given, more)
        if processes > 1:
            work = (interrupted, words, cut) if cut else (main, words)
            run_together(processes, *work, said=tmp_path / "said" / out)
            return 0
        return main(words)

    return run


def read(path: Path, name: str = "metrics.json") -> dict:
    return json.loads((path / name).read_text())


@pytest.mark.parametrize("method", NAMES)
def test_a_run_writes_what_it_promises(baseline, tmp_path, capsys, method):
    assert baseline(method, "--lr", "0.01", "--json", "--batch", "2") == 0
    printed = json.loads(capsys.readouterr().out)
    out = tmp_path / "out"
    names = {p.name for p in out.iterdir()}
    assert names == {"update.safetensors", "manifest.json", "metrics.json", "log.jsonl"}
    metrics, manifest = read(out), read(out, "manifest.json")
    assert {**metrics, "out": str(out)} == printed
    assert manifest["kind"] == "baseline"
    assert manifest["method"] == method
    assert set(metrics["seconds"]) == {"load", "reference", "train", "check", "total"}
    assert set(metrics["tokens"]) == {"forget", "retain", "held_out"}
    assert metrics["peak_bytes"] > 0
    curve = metrics["curve"]
    assert len(curve) in range(3, 12)
    assert [row["step"] for row in curve][:2] == [0, curve[-1]["step"] // 10 or 1]
    assert metrics["forget_loss"] == {
        "before": curve[0]["forget_loss"],
        "after": curve[-1]["forget_loss"],
    }
    assert metrics["retain_kl"] == curve[-1]["retain_kl"] > 0
    events = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events] == [row["step"] for row in curve[1:]]
    update = Update.load(out)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(manifest["model"])
    assert update.fits_base(model)
    whole = {name for name, _ in model.named_parameters()}
    trained = {name for name, delta in update.deltas.items() if delta.abs().max() > 0}
    if method == "rmu":
        assert trained == {f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)}
    elif method == "repselect":
        assert trained == {n for n in whole if "mlp" in n}
    elif method == "elm":
        assert trained == {n for n in whole if "layers" in n and "proj" in n}
    else:
        assert trained == whole


def test_defaults_are_the_methods_own(baseline, tmp_path):
    assert baseline("npo") == 0
    # Four sequences are fewer than a batch of 32, so one batch: ten epochs are ten steps.
    found = read(tmp_path / "out", "manifest.json")["settings"]
    assert found == {
        **{"lr": 1e-5, "steps": 10, "batch": 32, "accumulate": 1, "warm_up": 1, "decay": True},
        **{"weight_decay": 0.01, "clip": 1.0, "optimizer": "AdamW"},
    }
    assert baseline("repselect", "--components", "3", out="repselect") == 0
    found = read(tmp_path / "repselect", "manifest.json")["settings"]
    assert found == {
        **{"lr": 0.05, "steps": 10, "batch": 8, "accumulate": 1, "warm_up": 0, "decay": False},
        **{"weight_decay": 0.0, "clip": None, "optimizer": "SGD"},
        "selection": {"components": 3, "adapter_lr": 0.01},
    }
    options = ("--batch", "1", "--epochs", "5", "--no-decay", "--clip", "0")
    assert baseline("soul", *options, out="soul") == 0
    found = read(tmp_path / "soul", "manifest.json")["settings"]
    assert found == {
        **{"lr": 5e-6, "steps": 20, "batch": 1, "accumulate": 1, "warm_up": 2, "decay": False},
        **{"weight_decay": 0.1, "clip": None, "optimizer": "Sophia"},
    }


@pytest.mark.parametrize("method", ["kl-min", "elm"])
def test_an_interrupted_run_goes_on(baseline, tmp_path, capsys, monkeypatch, method):
    options = ("--lr", "0.01", "--batch", "2", "--steps", "4")[: 4 if method == "elm" else 6]
    assert baseline(method, *options, "--evaluate-every", "1", out="whole") == 0
    monkeypatch.setattr("kfade.runs.baselines.SAVE_SECONDS", 0.0)
    log = RunDir.log

    def cut(self, event, **facts):
        if facts["step"] == 3:
            raise KeyboardInterrupt
        log(self, event, **facts)

    monkeypatch.setattr(RunDir, "log", cut)
    assert baseline(method, *options, "--evaluate-every", "1") == 130
    monkeypatch.setattr(RunDir, "log", log)
    assert baseline(method, *options, "--evaluate-every", "1") == 2
    assert "pass --resume" in capsys.readouterr().err
    assert baseline(method, *options, "--evaluate-every", "1", "--resume") == 0
    assert "resuming after step 2" in capsys.readouterr().err
    first, second = (load_file(tmp_path / o / "update.safetensors") for o in ("whole", "out"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert read(tmp_path / "whole")["curve"] == read(tmp_path / "out")["curve"]


def test_every_evaluation_can_be_kept_and_chosen_from(baseline, tmp_path, model_dir, capsys):
    options = ("--lr", "0.003", "--batch", "2", "--epochs", "2", "--evaluate-every", "1")
    assert baseline("gd", *options, "--checkpoints", "--max-kl", "0.02", "--export-model") == 0
    out = tmp_path / "out"
    metrics = read(out)
    files = sorted(p.name for p in (out / "checkpoints").iterdir())
    assert files == [f"step-{i:06}.safetensors" for i in range(1, 5)]
    step = metrics["kept_step"]
    assert step < 4
    assert metrics["retain_kl"] <= 0.02 < metrics["curve"][-1]["retain_kl"]
    kept = load_file(out / "update.safetensors")
    chosen = load_file(out / "checkpoints" / f"step-{step:06}.safetensors")
    assert all(torch.equal(kept[name], chosen[name]) for name in kept)
    last = out / "checkpoints" / files[-1]
    assert main(["apply", str(model_dir), str(last), "--out", str(tmp_path / "edited")]) == 0
    exported = load_file(out / "model" / "model.safetensors")
    base = load_file(model_dir / "model.safetensors")
    for name, delta in kept.items():
        assert torch.equal(exported[name], base[name] + delta)
    assert baseline("gd", *options, "--max-kl", "1e-9", out="small") == 0
    assert "no evaluation was within --max-kl 1e-09" in capsys.readouterr().err


def update_of(folder: Path) -> torch.Tensor:
    deltas = load_file(folder / "update.safetensors")
    return torch.cat([deltas[name].flatten() for name in sorted(deltas)])


def test_two_processes_write_what_one_writes(baseline, tmp_path):
    options = ("--lr", "0.003", "--batch", "2", "--epochs", "2", "--evaluate-every", "1")
    options = (*options, "--checkpoints", "--export-model", "--json")
    assert baseline("gd", *options) == baseline("gd", *options, out="two", processes=2) == 0
    one, two = tmp_path / "out", tmp_path / "two"
    names = [sorted(str(p.relative_to(out)) for p in out.rglob("*")) for out in (one, two)]
    assert names[0] == names[1]
    # Float32: where a gradient is nearly zero, AdamW makes steps of its rounding.
    assert relative_error(update_of(two), update_of(one)) < 1e-3
    for mine, wanted in zip(read(two)["curve"], read(one)["curve"], strict=True):
        assert mine == pytest.approx(wanted, rel=1e-3, abs=1e-6)
    said = [(tmp_path / f"said/two/{rank}/stdout").read_text() for rank in (0, 1)]
    assert json.loads(said[0])["curve"] == read(two)["curve"]
    assert said[1] == ""


def test_two_processes_train_a_sharded_model(baseline, tmp_path):
    options = ("--lr", "0.003", "--batch", "2", "--steps", "4", "--evaluate-every", "1")
    assert baseline("kl-min", *options) == 0
    sharded = {"processes": 2, "out": "two"}
    assert baseline("kl-min", *options, "--shard", "--checkpoints", **sharded) == 0
    assert relative_error(update_of(tmp_path / "two"), update_of(tmp_path / "out")) < 1e-3
    last = load_file(tmp_path / "two/checkpoints/step-000004.safetensors")
    ours = load_file(tmp_path / "two/update.safetensors")
    assert all(torch.equal(last[name], ours[name]) for name in ours)
    one, two = (read(tmp_path / out, "manifest.json") for out in ("out", "two"))
    assert one["model_sha256"] == two["model_sha256"]
    # Interrupted, and gone on with by as many processes.
    again = {"processes": 2, "out": "again"}
    assert baseline("kl-min", *options, "--shard", **again, cut=3) == 0
    assert (tmp_path / "again.part/state/training.safetensors").is_file()
    assert baseline("kl-min", *options, "--shard", "--resume", **again) == 0
    assert "resuming after step 2" in (tmp_path / "said/again/0/stderr").read_text()
    assert torch.equal(update_of(tmp_path / "again"), update_of(tmp_path / "two"))
    assert read(tmp_path / "again")["curve"] == read(tmp_path / "two")["curve"]


@pytest.mark.parametrize(
    ("method", "more", "trained"),
    [
        ("ga", ("--layers", "1"), ["gate_proj", "up_proj", "down_proj"]),
        ("ga", ("--target", "*.q_proj.weight", "--layers", "0"), ["q_proj"]),
        (
            "ga",
            ("--lora", "2", "--layers", "1"),
            ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        ),
        ("rmu", ("--target", "*.up_proj.weight", "--layers", "0-1"), ["up_proj", "up_proj"]),
        ("elm", ("--target", "*.up_proj.weight", "--lora", "0"), ["up_proj", "up_proj"]),
    ],
)
def test_weights_can_be_chosen(baseline, tmp_path, method, more, trained):
    assert baseline(method, "--lr", "0.01", *more) == 0
    update = Update.load(tmp_path / "out")
    assert sorted(name.split(".")[-2] for name in update.deltas) == sorted(trained)
    ranks = [torch.linalg.matrix_rank(delta, rtol=1e-4) for delta in update.deltas.values()]
    assert (max(ranks) <= 2) == ("2" in more)


@pytest.mark.parametrize(
    ("method", "more", "message"),
    [
        ("dpo", (), "METHOD dpo: give ga, gd, kl-min, npo, npo-sam, simnpo, wga, satimp, undial,"),
        ("ga", ("--beta", "1"), "--beta is not an option of ga"),
        ("soul", ("--retain-weight", "1"), "--retain-weight is not an option of soul"),
        ("gd", ("--layer", "1"), "--layer is not an option of gd"),
        ("npo", ("--layer", "1"), "--layer is not an option of npo"),
        ("npo", ("--sam-radius", "1"), "--sam-radius is not an option of npo"),
        ("npo-sam", ("--sam-radius", "0"), "--sam-radius 0.0: give a finite number above 0"),
        ("npo-sam", ("--dtype", "bfloat16"), "--sam-radius 0.01 moves weights by less than 16 bit"),
        ("wga", ("--beta2", "1"), "--beta2 is not an option of wga"),
        ("satimp", ("--beta", "1"), "--beta is not an option of satimp"),
        ("gd", ("--steps", "2", "--epochs", "2"), "give --steps or --epochs, not both"),
        ("gd", ("--batch", "0"), "--batch, --accumulate and --epochs must be above 0"),
        ("gd", ("--steps", "0"), "--steps 0: give 1 or more"),
        ("gd", ("--evaluate-every", "0"), "--evaluate-every 0: give 1 or more"),
        ("gd", ("--max-kl", "-1"), "--max-kl -1.0: give a number above 0"),
        ("gd", ("--layers", "5"), "--layers 5: this model has blocks 0 to 1"),
        ("gd", ("--lora", "-1"), "--lora must be 0 or more"),
        ("gd", ("--lora", "2", "--lora-dropout", "1"), "--lora-dropout 0 or more and below 1"),
        ("gd", ("--lr", "1e30", "--batch", "1"), "the loss is not finite; lower --lr"),
        ("gd", ("--shard",), "--shard: there is one process; start with torchrun"),
        ("elm", ("--shard",), "--shard does not work with elm"),
        ("repselect", ("--shard",), "--shard does not work with repselect"),
        ("repselect", ("--lora", "2"), "--lora does not work with repselect"),
        ("repselect", ("--components", "1"), "--components 1: give 2 or more"),
        ("repselect", ("--components", "999"), "--components 999: model.layers.0.mlp."),
        ("repselect", ("--adapter-lr", "-1"), "--adapter-lr -1.0: give a finite number, 0 or more"),
        ("repselect", ("--adapter-lr", "1e30"), "the loss is not finite; lower --adapter-lr"),
        ("repselect", ("--lr", "1e30"), "the loss is not finite; lower --lr"),
        ("repselect", ("--beta", "1"), "--beta is not an option of repselect"),
        ("gd", ("--shard", "--export-model"), "--export-model does not work with --shard"),
    ],
)
def test_bad_options(baseline, tmp_path, capsys, method, more, message):
    assert baseline(method, *more) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("kfade: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("out")]


def test_what_elm_and_rmu_need(tmp_path, model_dir, baseline, capsys, monkeypatch):
    monkeypatch.setitem(EXTRA, "elm", ())
    assert baseline("elm") == 2
    assert "--concept is missing" in capsys.readouterr().err
    assert baseline("elm", "--concept", "a b") == 2  # its blocks are 4 to 7
    assert "--layers 4-7: this model has blocks 0 to 1" in capsys.readouterr().err
    monkeypatch.setitem(EXTRA, "rmu", ())
    assert baseline("rmu") == 2
    assert "--layer 7: this model has blocks 0 to 1" in capsys.readouterr().err
    assert baseline("rmu", "--layer", "0", "--layers", "0-1") == 2
    assert "lies above block 0, where rmu stops" in capsys.readouterr().err


def test_help_names_every_option(capsys):
    assert main(["baseline", "--help"]) == 0
    text = capsys.readouterr().out
    for option in ("--lr", "--warm-up", "--max-kl", "--checkpoints", "--lora", "--concept"):
        assert option in text
