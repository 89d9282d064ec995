"""``kfade fit``: what it writes, memory budgets, interruption, several processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import zoo
from processes import run_together
from safetensors.torch import load_file

from kfade.cli import main
from kfade.curvature.curvature import Curvature
from kfade.curvature.store import SumsCheckpoint
from kfade.errors import InputError
from kfade.runs.choices import bytes_of
from kfade.runs.config import FitConfig, ModelConfig, read_config
from kfade.runs.session import load

RETAIN = [{"text": f"line {i} of some text to keep"} for i in range(12)]


@pytest.fixture
def desk(tmp_path) -> dict[str, str]:
    zoo.save(tmp_path / "model")
    retain = tmp_path / "retain.jsonl"
    retain.write_text("".join(json.dumps(row) + "\n" for row in RETAIN))
    return {"model": str(tmp_path / "model"), "retain": str(retain), "out": str(tmp_path / "out")}


def arguments(desk: dict[str, str], *more: str) -> list[str]:
    given = ["--retain", desk["retain"], "--out", desk["out"], "--sequence-length", "8"]
    return ["fit", desk["model"], *given, "--batch-tokens", "16", "--no-pack", "--truncate", *more]


def blocks_of(folder: str) -> dict[str, torch.Tensor]:
    blocks = Curvature.load(Path(folder)).blocks
    return {
        name: block.matvec(torch.ones_like(block.eigenvalues)) for name, block in blocks.items()
    }


def in_processes(count: int, words: list[str], said: Path) -> str:
    """What ``kfade`` prints, in all of them together."""
    run_together(count, main, words, said=said)
    return "".join(path.read_text() for path in said.glob("*/stdout"))


def difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(((first[n] - second[n]).norm() / first[n].norm()).item() for n in first)


def test_a_fit_writes_what_it_promises(desk, capsys):
    assert main(arguments(desk, "--json")) == 0
    metrics = json.loads(capsys.readouterr().out)
    out = Path(desk["out"])
    names = {"curvature-000.safetensors", "manifest.json", "metrics.json", "config.yaml"}
    assert {path.name for path in out.iterdir()} == names
    assert {"load", "covariance", "eigh", "lambda", "save", "total"} == set(metrics["seconds"])
    written = (out / "curvature-000.safetensors").stat().st_size
    assert metrics["curvature_bytes"] == written
    assert {metrics["groups"], metrics["processes"]} == {1}
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["estimator"] == "kfac"
    assert manifest["weights_sha256"].keys() == load_targets(out).keys()


def load_targets(out: Path) -> dict[str, object]:
    return dict.fromkeys(Curvature.load(out).blocks)


@pytest.mark.parametrize("estimator", ["ekfac", "kfac", "diagonal"])
def test_blocks_that_run_again_change_no_byte(desk, tmp_path, estimator):
    assert main(arguments(desk, "--estimator", estimator)) == 0
    again = {**desk, "out": str(tmp_path / "again")}
    assert main(arguments(again, "--estimator", estimator, "--recompute")) == 0
    outs = [Path(d["out"]) for d in (desk, again)]
    plain, ours = ((out / "curvature-000.safetensors").read_bytes() for out in outs)
    assert plain == ours
    manifests = [json.loads((out / "manifest.json").read_text()) for out in outs]
    assert [m["config"]["fit"]["recompute"] for m in manifests] == [False, True]
    assert read_config(outs[1] / "config.yaml").fit.recompute
    # Negative control: another seed changes them.
    other = {**desk, "out": str(tmp_path / "other")}
    assert main(arguments(other, "--estimator", estimator, "--recompute", "--seed", "1")) == 0
    assert (tmp_path / "other" / "curvature-000.safetensors").read_bytes() != plain


@pytest.mark.parametrize("more", [[], ["--recompute"]], ids=["alike", "with less memory"])
def test_a_fit_killed_in_a_pass_resumes_to_the_same(desk, tmp_path, monkeypatch, capsys, more):
    assert main(arguments(desk)) == 0
    whole = load_file(Path(desk["out"]) / "curvature-000.safetensors")
    again = {**desk, "out": str(tmp_path / "again")}
    save, saved = SumsCheckpoint.save, []

    def save_and_die(self, batches, tensors):
        save(self, batches, tensors)
        saved.append(batches)
        if len(saved) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(SumsCheckpoint, "due", lambda self: True)  # at every batch
    monkeypatch.setattr(SumsCheckpoint, "save", save_and_die)
    assert main(arguments(again)) == 130
    assert list((tmp_path / "again.part" / "state").glob("sums-*.safetensors"))
    assert main(arguments(again)) == 2  # it must be asked for
    assert "--resume" in capsys.readouterr().err
    assert main(arguments(again, "--resume", *more)) == 0
    assert saved[:3] == [1, 2, 3]
    assert saved[3] == 4  # it went on, and did not start again
    resumed = load_file(tmp_path / "again" / "curvature-000.safetensors")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("spread", [[], ["--shard"]])
def test_two_processes_fit_the_same(desk, tmp_path, spread):
    # EK-FAC is left out: where eigenvalues coincide its basis, and so its Λ, is anyone's.
    assert main(arguments(desk, "--estimator", "kfac")) == 0
    two = {**desk, "out": str(tmp_path / "two")}
    words = arguments(two, "--estimator", "kfac", "--json", *spread)
    done = in_processes(2, words, tmp_path / "said")
    assert json.loads(done)["processes"] == 2  # one object, from one of them
    # Sums in another order, in float32: 1e-7 a term, more where a basis turns with it.
    assert difference(blocks_of(desk["out"]), blocks_of(two["out"])) < 1e-4


@pytest.mark.parametrize("count", [2, 4])
def test_processes_unlearn_the_same_with_a_spread_model(desk, tmp_path, count):
    texts = [" ".join(zoo.WORDS[i % 20 : i % 20 + 8]) for i in range(16)]
    forget, retain = tmp_path / "forget.jsonl", Path(desk["retain"])
    for path, own in ((forget, texts[:4]), (retain, texts[4:])):
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in own))
    given = ["--forget", str(forget), "--estimator", "kfac", "--kl", "0.01", "--memory", "2GB"]
    given += ["--quality", "fast"]  # a later step sees what the first one rounded
    assert main(["unlearn", *arguments(desk, *given)[1:]]) == 0
    two = {**desk, "out": str(tmp_path / "two")}
    words = ["unlearn", *arguments(two, *given, "--shard")[1:]]
    in_processes(count, words, tmp_path / "said")
    assert "has read the whole model" not in (tmp_path / "said/0/stderr").read_text()
    ours, theirs = (load_file(Path(d["out"]) / "update.safetensors") for d in (desk, two))
    assert difference(ours, theirs) < 1e-3  # a search meets its KL within 10 %, by the same trials


def test_a_spread_model_is_not_exported(desk, tmp_path, capsys):
    given = ["--forget", desk["retain"], "--shard", "--export-model"]
    assert main(["unlearn", *arguments(desk, *given)[1:]]) == 2
    assert "kfade apply" in capsys.readouterr().err


def test_a_model_is_not_spread_over_one_process(desk, tmp_path, capsys):
    assert main(arguments(desk, "--shard")) == 2
    assert "there is one process; start with torchrun" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))
    with pytest.raises(InputError, match="there is one process"):  # before a model is looked for
        load(ModelConfig("nowhere"), FitConfig(), shard=True)


def test_held_out_text_that_a_step_cannot_change_is_told(desk, tmp_path, capsys):
    """Every word of it is unknown to this tokenizer: one token over and over."""
    assert main(["unlearn", *arguments(desk, "--forget", desk["retain"], "--kl", "0.01")[1:]]) == 2
    assert "unknown words only" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_commands_that_do_not_share_work_refuse_several_processes(monkeypatch, capsys):
    monkeypatch.setattr("kfade.runtime.distributed.count", lambda: 2)
    assert main(["plan", "anything"]) == 2
    assert "kfade plan does not run in several processes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("size", "expected"),
    [("20GB", 20 * 10**9), ("1.5 GB", 1_500_000_000), ("800mb", 800 * 10**6), ("1000", 1000)],
)
def test_sizes(size, expected):
    assert bytes_of(size) == expected


@pytest.mark.parametrize("size", ["", "GB", "-1GB", "twenty", "1PB", "0"])
def test_sizes_that_are_none(size):
    with pytest.raises(InputError, match="write a size as 20GB"):
        bytes_of(size)
