"""`kfade plan`: what the command says, shows and refuses."""

from __future__ import annotations

import json

import pytest
import torch
import zoo
from helpers import command_line
from plan_models import LLAMA_7B, LLAMA_70B, SMALL, grouped, saved
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, MixtralConfig

import kfade.planning.cost
from kfade import Correction, Run
from kfade.cli import main
from kfade.cli.plan_page import duration, size
from kfade.models.load import load_skeleton
from kfade.planning.trace import trace_pass


@pytest.fixture
def traced_once(monkeypatch):
    """Plans of one model for other devices trace its pass once: it takes many seconds."""
    traces: dict = {}

    def trace(model, targets, shape, *, recompute):
        names = tuple(target.name for target in targets)
        key = (model.config.to_json_string(), names, shape, recompute)
        if key not in traces:
            traces[key] = trace_pass(model, targets, shape, recompute=recompute)
        return traces[key]

    monkeypatch.setattr("kfade.planning.memory.trace_pass", trace)


def planned(capsys, *arguments: str) -> dict:
    """The plan of one step without corrections, unless the arguments say otherwise."""
    one = ["--steps", "1", "--correct", "0", "--noise", "0"]
    assert main(["plan", *command_line(one, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.usefixtures("traced_once")
@grouped
def test_command_on_a_large_model(tmp_path, capsys):
    arguments = ["--speed", "400", "--float32-speed", "60", "--bandwidth", "3000"]
    folder = saved(LLAMA_70B, tmp_path)
    found = planned(capsys, folder, *arguments, "--memory", "80GB", "--devices", "8")
    assert found["parameters"]["all"] / 1e9 == pytest.approx(69.0, abs=0.05)
    assert found["bytes"]["model"] == pytest.approx(2 * found["parameters"]["all"], rel=1e-6)
    # Per block: 8192² + 28672² of A, 2·28672² + 8192² of S.
    assert found["bytes"]["factors"] == 80 * 4 * (2 * 8192**2 + 3 * 28672**2)
    assert found["groups"] is None
    assert "lower --batch-tokens" in found["problem"]
    one, eight = found["seconds"]["1"], found["seconds"]["8"]
    # Twice the parameters a token and direction, and attention, at 400 TFLOP/s.
    tokens = 4000 * 511
    least = 4 * 68.4e9 * tokens / 400e12
    assert least < one["covariance"] < 4 * least
    assert one["covariance"] == pytest.approx(8 * eight["covariance"])
    assert eight["total"] < one["total"] / 4
    few = ["--layers", "3-6", "--batch-tokens", "1024", "--memory", "80GB", "--devices", "8"]
    assert planned(capsys, folder, *few)["problem"] is not None
    spread = planned(capsys, folder, *few, "--shard")
    assert spread["problem"] is None
    assert spread["over_memory"] == []
    assert spread["groups"] == 1  # 10.4 GB of factors a block, of which each process keeps a part
    factors = spread["bytes"]["factors"]
    covariance = spread["peak_bytes"]["planned"]["covariance"]
    assert factors / 8 < covariance - spread["bytes"]["model"] < factors
    assert spread["bytes"]["model"] < found["bytes"]["model"] / 6


def test_command_plans_refinements(tmp_path, capsys):
    """Each iteration costs a product and the measuring of one more direction."""
    arguments = ["--speed", "400", "--sequence-length", "64"]
    folder = saved(SMALL, tmp_path)
    plain, one, three = (
        planned(capsys, folder, *arguments, *more)
        for more in ([], ["--refine", "1"], ["--refine", "3"])
    )
    assert "refine" not in plain["flops"]
    # Two products, not one, and four: the first serves the K-FADE direction itself.
    assert three["flops"]["refine"]["forward"] == pytest.approx(
        2 * one["flops"]["refine"]["forward"]
    )
    # Per position of the product, four forward passes where a trial makes one.
    trial = plain["flops"]["gradient"]["forward"] / (2500 * 512 * 63 / 64)
    assert one["flops"]["refine"]["forward"] == pytest.approx(2 * 4 * trial * 64 * 63)
    small = planned(capsys, folder, *arguments, "--refine", "1", "--refine-sequences", "16")
    assert small["flops"]["refine"]["head"] == pytest.approx(one["flops"]["refine"]["head"] / 4)
    for stage in ("step", "check"):
        first, second, fourth = (p["flops"][stage]["forward"] for p in (plain, one, three))
        assert fourth - first == pytest.approx(3 * (second - first))
        assert second > first
    vector = plain["bytes"]["vector"]
    peaks = [p["peak_bytes"]["planned"] for p in (plain, one)]
    assert peaks[1]["check"] - peaks[0]["check"] == 6 * vector  # g, r, s, p, q, the best so far
    assert peaks[1]["refine"] > peaks[1]["gradient"] + 5 * vector
    assert one["seconds"]["1"]["total"] > plain["seconds"]["1"]["total"]


def test_command_plans_corrections(tmp_path, capsys):
    """Each costs two gradients, two directions, and its measurements."""
    arguments = ["--speed", "400", "--sequence-length", "64", "--tokens", "640000"]
    folder = saved(SMALL, tmp_path)
    plain, one, three, few = (
        planned(capsys, folder, *arguments, *more)
        for more in (
            [],
            ["--correct", "1"],
            ["--correct", "3"],
            ["--correct", "1", "--correct-sequences", "100"],
        )
    )
    assert "correct" not in plain["flops"]
    assert {k: v for k, v in one["flops"].items() if k != "correct"} == plain["flops"]
    for kind, amount in one["flops"]["correct"].items():
        assert three["flops"]["correct"][kind] == pytest.approx(3 * amount)
    # One direction of the step, and three to choose its damping.
    assert one["flops"]["correct"]["rotations"] == 2 / 4 * plain["flops"]["step"]["rotations"]
    # The gradient of the forget set, and those of the KL, on held-out data too, by their positions.
    gradient, positions = plain["flops"]["gradient"], 2500 * 512 * 63 / 64
    for sequences, found in ((5_000, one), (100, few)):  # half of them if not told
        expected = gradient["backward"] * (1 + (sequences + 64) * 63 / positions)
        assert found["flops"]["correct"]["backward"] == pytest.approx(expected)
    vector = plain["bytes"]["vector"]
    peaks = [p["peak_bytes"]["planned"] for p in (plain, one, few)]
    assert "correct" not in peaks[0]
    hidden = 4_900 * 63 * SMALL.hidden_size * 4  # float32
    assert peaks[1]["correct"] - peaks[2]["correct"] == hidden
    assert peaks[2]["correct"] > peaks[2]["check"] + 2 * vector
    assert one["seconds"]["1"]["total"] > plain["seconds"]["1"]["total"]


def test_command_plans_steps(tmp_path, capsys):
    """By default the run that kfade unlearn makes by default. Later steps have an update. Those
    before the last are measured on a quarter."""
    arguments = [saved(SMALL, tmp_path), "--speed", "400", "--sequence-length", "64"]
    one, four = (planned(capsys, *arguments, "--steps", n) for n in ("1", "4"))
    step = {"rotations": (4 + 3) / (1 + 3)}  # each step, and three dampings
    # In passes over all held-out data: forms of steps in three bands, and of three dampings in one;
    # then of each step but the first three slopes, on four times as many forget sequences.
    for kind, of_step, of_damping in (("forward", 7, 3), ("head", 4, 2)):
        whole = of_step + 3 * of_damping
        parts = of_step * (3 / 4 + 1) + 3 * of_damping / 4 + 3 * 4 * 3 / 4
        step[kind] = parts / whole
    # What a step begins with, on all and before the last step on a quarter, too; then two trials:
    # in the last step on all, before that on a quarter.
    check = {"forward": (4 + 3 / 4 + 3 * 2 / 4 + 2) / (1 + 2)}
    times = {"gradient": dict.fromkeys(one["flops"]["gradient"], 4), "step": step, "check": check}
    for stage, kinds in one["flops"].items():
        for kind, amount in kinds.items():
            if (stage, kind) != ("check", "head"):  # two heads a trial on held-out data
                expected = times.get(stage, {}).get(kind, 1) * amount
                assert four["flops"][stage][kind] == pytest.approx(expected)
    noisy = planned(capsys, *arguments, "--noise", "0.1")["flops"]
    for stage, kinds in one["flops"].items():
        for kind, amount in kinds.items():
            assert noisy[stage][kind] == (2 if stage == "gradient" else 1) * amount
    first, later = (p["peak_bytes"]["planned"] for p in (one, four))
    vector = one["bytes"]["vector"]
    assert later["gradient"] - first["gradient"] == 2 * vector  # weights in float32 are as large
    # The choice of the damping, before the first step, holds the gradient already.
    assert later["step"] - first["step"] == vector
    assert later["check"] - first["check"] == vector
    assert later["covariance"] == first["covariance"]
    usual = ["--steps", str(Run.steps), "--correct", str(Correction.count), "--noise", "0.25"]
    assert main(["plan", *arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == planned(capsys, *arguments, *usual)
    assert main(["plan", *arguments]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert f"Work of a run of {Run.steps} steps" in said
    assert main(["plan", *arguments, "--steps", "0"]) == 2
    assert main(["plan", *arguments, "--noise", "1"]) == 2


def test_command_plans_blocks_that_run_again(tmp_path, capsys):
    four = LlamaConfig(**{**LLAMA_7B.to_dict(), "num_hidden_layers": 4})
    folder = saved(four, tmp_path)
    arguments = [folder, "--estimator", "ekfac", "--speed", "400", "--batch-tokens", "8192"]
    plain, ours = (planned(capsys, *arguments, *more) for more in ([], ["--recompute"]))
    assert (plain["work"]["recompute"], ours["work"]["recompute"]) == (False, True)
    positions = 16 * 511
    # The inputs of four blocks, the last norm's in float32 and its scale, and the output.
    kept = positions * (5 * 4096 * 2 + 4096 * 4 + 4)
    assert ours["bytes"]["activations"] == kept
    assert plain["bytes"]["activations"] > 5 * kept
    assert plain["bytes"]["inputs"] == 4 * ours["bytes"]["inputs"]
    for stage in ("covariance", "lambda", "gradient"):
        assert ours["peak_bytes"]["planned"][stage] < plain["peak_bytes"]["planned"][stage]
        assert ours["seconds"]["1"][stage] > plain["seconds"]["1"][stage]
        forward = ours["flops"][stage]["forward"]
        assert forward == pytest.approx(2 * plain["flops"][stage]["forward"])
    assert main(["plan", folder, "--recompute", "--layers", "3"]) == 0
    assert "blocks run again in backward passes" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
@pytest.mark.usefixtures("traced_once")
def test_command_finds_groups_for_a_device(tmp_path, capsys):
    folder = saved(LLAMA_7B, tmp_path)
    arguments = [folder, "--batch-tokens", "2048", "--estimator", "ekfac"]
    free = planned(capsys, *arguments)
    assert free["groups"] == 1
    assert free["passes"] == 2
    assert free["seconds"] == {}
    assert free["memory"] is None
    big = planned(capsys, *arguments, "--memory", "80GB,48GB")
    assert (big["memory"], big["devices"]) == (48 * 10**9, 2)
    assert big["groups"] > planned(capsys, *arguments, "--memory", "80GB")["groups"] > 1
    assert big["passes"] == 2 * big["groups"]
    stages = ("covariance", "eigh", "lambda")
    assert all(big["peak_bytes"]["planned"][stage] <= 48 * 10**9 for stage in stages)
    assert any(big["peak_bytes"]["one_group"][stage] > 48 * 10**9 for stage in stages)
    assert (big["over_memory"], big["offload"], free["offload"]) == ([], True, False)
    held = planned(capsys, *arguments, "--memory", "48GB", "--offload", "device")
    assert held["over_memory"] == ["step"]
    assert held["advice"] == "--memory 48GB --offload auto"


def test_command_reads_gguf_and_dtypes(tmp_path, capsys):
    model = zoo.tiny("llama", torch.float32)
    zoo.write_gguf(model, tmp_path / "m.gguf")
    found = planned(capsys, str(tmp_path / "m.gguf"))
    assert found["dtype"] == "float32"
    assert found["weights"] == 6
    folder = saved(model.config, tmp_path / "m")
    half = planned(capsys, folder, "--dtype", "bfloat16", "--target", "*down_proj.weight")
    assert half["weights"] == 2
    frequencies = 2 * 4 * 4  # of the rotations: float32 in both
    assert 2 * (half["bytes"]["model"] - frequencies) == found["bytes"]["model"] - frequencies
    assert half["bytes"]["vector"] == 2 * 4 * zoo.WIDTH * zoo.INNER


def test_command_shows_a_page(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(kfade.planning.cost, "_typical", lambda work, device: 0.1)
    folder = saved(SMALL, tmp_path)
    arguments = ["plan", folder, "--measure", "--memory", "454.2MB", "--batch-tokens", "64"]
    assert main([*arguments, "--sequence-length", "33", "--devices", "2"]) == 0
    output = capsys.readouterr()
    assert output.out == ""
    for text in ("9 weights targeted", "covariance", "exchange", "2 devices", "total", "groups"):
        assert text in output.err
    assert main(["plan", folder, "--memory", "1GB"]) == 0
    assert "fits 1.00 GB, the layers in 1 group" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--speed", "1", "--measure"], "not both"),
        (["--float32-speed", "1", "--measure"], "not both"),
        (["--bandwidth", "1"], "without --speed"),
        (["--speed", "0"], "positive"),
        (["--memory", "lots"], "20GB"),
        (["--memory", "1GB,2GB", "--devices", "3"], "one for each device"),
        (["--devices", "0"], "1 or more"),
        (["--tokens", "0"], "--tokens"),
        (["--refine", "-1"], "--refine must be 0 or more"),
        (["--refine-sequences", "0"], "--refine-sequences 1 or more"),
        (["--correct", "-1"], "--correct must be 0 or more"),
        (["--correct-sequences", "0"], "--correct-sequences 1 or more"),
        (["--sequence-length", "1"], "2 or more"),
        (["--estimator", "best"], "ekfac, kfac"),
        (["--layers", "9"], "blocks 0 to 2"),
        (["--dtype", "float8"], "--dtype"),
    ],
)
def test_command_refuses(tmp_path, capsys, arguments, message):
    assert main(["plan", saved(SMALL, tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("experts", ["all", "1", "none"])
def test_routed_experts_are_planned_by_their_rows(tmp_path, capsys, experts):
    config = MixtralConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=37,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    given = ["--experts", experts, "--sequence-length", "33", "--batch-tokens", "64"]
    given += ["--estimator", "ekfac"]
    found = planned(capsys, saved(config, tmp_path), *given, "--forget-tokens", "66")
    if experts == "none":
        return
    spread = [*given, "--shard", "--devices"]
    half = planned(capsys, str(tmp_path), *spread, "2")
    assert half["bytes"]["vector"] == found["bytes"]["vector"] // 2
    assert main(["plan", str(tmp_path), *spread, "5"]) == 2
    assert "5 processes cannot divide each expert's 48 x 16 numbers" in capsys.readouterr().err
    count = {"all": 4, "1": 1}[experts]
    assert found["weights"] == 2 * 2 * count
    numbers = 16 * 48 + 24 * 16  # of an expert's two matrices
    assert found["parameters"]["targeted"] == 2 * count * numbers
    # Each expert reads half of the positions.
    assert found["flops"]["gradient"]["float32"] == 2 * 2 * count * numbers * 64 / 2
    assert found["bytes"]["inputs"] == 4 * 2 * count * (16 + 24) * 64 / 2
    assert found["flops"]["eigh"]["decompositions"] == 12 * 2 * count * (
        16**3 + 48**3 + 24**3 + 16**3
    )
    assert found["bytes"]["factors"] == 4 * 2 * count * (16**2 + 48**2 + 24**2 + 16**2)
    shared = planned(capsys, str(tmp_path), *given, "--expert-inputs", "shared")
    assert shared["bytes"]["factors"] == 4 * 2 * (16**2 + 24**2 + count * (48**2 + 16**2))
    assert shared["flops"]["eigh"]["decompositions"] == 12 * 2 * (
        16**3 + 24**3 + count * (48**3 + 16**3)
    )
    # The passes are the same.
    assert shared["flops"]["covariance"] == found["flops"]["covariance"]
    assert shared["flops"]["lambda"] == found["flops"]["lambda"]
    assert shared["bytes"]["inputs"] == found["bytes"]["inputs"]


def test_sizes_and_durations_for_a_person():
    assert [size(n) for n in (12, 3456, 1.234e7, 5.08e10, 1.06e12)] == [
        "12 B",
        "3.46 kB",
        "12.3 MB",
        "50.8 GB",
        "1.06 TB",
    ]
    assert [duration(s) for s in (0.5, 119, 600, 9000)] == ["0.5 s", "119 s", "10 min", "2.5 h"]


def test_skeletons_hold_no_numbers(tmp_path):
    with FakeTensorMode():
        kind = type(torch.empty(1))
    skeleton = load_skeleton(saved(LLAMA_70B, tmp_path))
    assert all(isinstance(p, kind) for p in skeleton.parameters())
