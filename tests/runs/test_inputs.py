"""What a run was made of: the base of an update in any dtype, and what a resumed run must read."""

from __future__ import annotations

import hashlib
import json
import shutil
from datetime import datetime
from pathlib import Path

import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file

from kfade.cli import main
from kfade.data.examples import load_examples, split_holdout
from kfade.evaluate.item_log import ItemLog
from kfade.method.update import Update
from kfade.models.load import save_model
from kfade.models.weights import weight_digests
from kfade.runs.config import read_config

NAME = "model.layers.1.mlp.up_proj.weight"


def recorded(model) -> Update:
    """An update with the digests that a run on ``model`` records."""
    deltas = {NAME: torch.zeros_like(model.get_parameter(NAME), dtype=torch.float32)}
    digests = {**weight_digests(model, "weights", deltas), **weight_digests(model, "model")}
    return Update(deltas, digests)


def tiny(*dtypes: torch.dtype, seed: int = 0):
    """The tiny Llama, rounded to each dtype in turn."""
    model = zoo.tiny("llama", torch.float32, seed=seed)
    for dtype in dtypes:
        model = model.to(dtype)
    return model


FULL, HALF = torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    ("computed_on", "applied_to", "base"),
    [
        ((FULL,), (FULL,), "same"),
        ((HALF,), (HALF,), "same"),
        ((HALF, FULL), (HALF,), "equal"),  # a bfloat16 checkpoint, loaded in float32 for the run
        ((HALF,), (HALF, FULL), "equal"),
        ((HALF,), (FULL,), "rounded"),  # a float32 checkpoint, loaded in bfloat16 for the run
        ((FULL,), (HALF,), "rounded"),
        ((torch.float16,), (FULL,), "rounded"),
        ((FULL,), (torch.float16,), "rounded"),
        ((torch.float16, FULL), (torch.float16,), "equal"),
        ((HALF,), (HALF, torch.float16), "equal"),  # whose range holds all of these values
    ],
)
def test_an_update_knows_its_base_in_any_dtype(computed_on, applied_to, base):
    update = recorded(tiny(*computed_on))
    assert update.compare_base(tiny(*applied_to)) == base
    assert update.fits_base(tiny(*applied_to))
    other = tiny(seed=1).to(applied_to[-1])
    assert update.compare_base(other) == "other"
    assert not update.fits_base(other)


def test_an_update_of_before_the_second_digest_is_known_too():
    for computed_on, applied_to, base in (
        ((FULL,), (FULL,), "same"),
        ((HALF, FULL), (HALF,), "equal"),
        ((HALF,), (FULL,), "rounded"),
        ((FULL,), (HALF,), "other"),  # it holds nothing to tell by
    ):
        update = recorded(tiny(*computed_on))
        for name in list(update.provenance):
            if name != "weights_sha256":
                del update.provenance[name]
        assert update.compare_base(tiny(*applied_to)) == base


@pytest.mark.parametrize("dtype", [FULL, HALF, torch.float16])
def test_weights_that_an_update_does_not_change_tell_another_model(dtype):
    """As a LoRA on the attention does."""
    update, other = recorded(tiny()), tiny()
    with torch.no_grad():
        other.get_parameter("model.layers.0.self_attn.q_proj.weight").mul_(2)
    other = other.to(dtype)
    assert update.compare_weights(other) == ("same" if dtype == FULL else "rounded")
    assert update.compare_base(other) == "other"
    assert update.compare_base(tiny(dtype)) == update.compare_weights(other)  # control


@pytest.fixture
def setup(tmp_path) -> dict[str, str]:
    save_model(zoo.tiny("llama", torch.float32), zoo.tokenizer(), tmp_path / "model")
    for name, rows in (("forget", "fghi"), ("retain", "abcdefghij")):
        lines = [json.dumps({"text": f"{x} k l m n o p q"}) + "\n" for x in rows]
        (tmp_path / name).write_text("".join(lines))
    return {name: str(tmp_path / name) for name in ("model", "forget", "retain", "out", "fit")}


def command(setup: dict[str, str], name: str, *more: str) -> list[str]:
    forget = [] if name == "fit" else ["--forget", setup["forget"]]
    words = ["baseline", "gd"] if name == "baseline" else [name]
    sets = [*forget, "--retain", setup["retain"], "--sequence-length", "8"]
    return [*words, setup["model"], *sets, "--out", setup["out"], *more]


def test_apply_says_what_is_true_of_another_dtype(setup, tmp_path, capsys):
    assert main(command(setup, "unlearn", "--dtype", "bfloat16")) == 0
    capsys.readouterr()
    apply = ["apply", setup["model"], setup["out"], "--json", "--out"]
    assert main([*apply, str(tmp_path / "wide")]) == 0
    output = capsys.readouterr()
    assert json.loads(output.out)["base"] == "rounded"
    assert "computed on these weights in another dtype" in " ".join(output.err.split())
    assert "are not the weights" not in output.err
    assert main([*apply, str(tmp_path / "narrow"), "--dtype", "bfloat16"]) == 0
    output = capsys.readouterr()
    assert json.loads(output.out)["base"] == "same"
    assert "note" not in output.err


def test_a_curvature_in_another_dtype_is_not_of_another_model(setup, tmp_path, capsys):
    save_model(zoo.tiny("llama", torch.bfloat16), zoo.tokenizer(), tmp_path / "model")
    fit = {**setup, "out": setup["fit"]}
    assert main(command(fit, "fit", "--dtype", "float32")) == 0
    capsys.readouterr()
    assert main(command(setup, "unlearn", "--curvature", setup["fit"])) == 2
    line = "fitted on this model in float32, here it is in bfloat16; give --dtype float32"
    assert line in capsys.readouterr().err
    run = ("--curvature", setup["fit"], "--dtype", "float32")
    assert main(command(setup, "unlearn", *run)) == 0


def fit(setup: dict[str, str], *more: str) -> None:
    assert main(command({**setup, "out": setup["fit"]}, "fit", *more)) == 0


@pytest.mark.parametrize("name", ["unlearn", "sweep"])
def test_a_curvature_of_a_model_with_other_attention_is_refused(setup, capsys, name):
    fit(setup)
    run = command(setup, name, "--curvature", setup["fit"])
    path = Path(setup["model"]) / "model.safetensors"
    before = load_file(path)
    other = "model.layers.0.self_attn.q_proj.weight"
    save_file({**before, other: 2 * before[other]}, path, {"format": "pt"})
    capsys.readouterr()
    assert main(run) == 2
    line = "fitted on another model: weights that are not targeted differ; fit it"
    assert line in " ".join(capsys.readouterr().err.split())
    assert not Path(setup["out"] + ".part").exists()
    target = "model.layers.1.mlp.up_proj.weight"
    save_file({**before, target: 2 * before[target]}, path, {"format": "pt"})
    assert main(run) == 2
    assert f"another model: {target} differs" in " ".join(capsys.readouterr().err.split())
    save_file(before, path, {"format": "pt"})
    assert main(run) == 0  # control


def test_a_curvature_in_fewer_bits_is_of_this_model(setup, capsys):
    fit(setup, "--dtype", "bfloat16")
    capsys.readouterr()
    assert main(command(setup, "unlearn", "--curvature", setup["fit"])) == 2
    line = "fitted on this model in bfloat16, here it is in float32; give --dtype bfloat16"
    assert line in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", ["unlearn", "sweep"])
def test_texts_that_a_fit_has_seen_are_said_and_told(setup, capsys, name):
    fit(setup)
    told = json.loads((Path(setup["fit"]) / "manifest.json").read_text())
    digest = hashlib.sha256((Path(setup["fit"]) / "curvature-000.safetensors").read_bytes())
    for more, said in (((), False), (("--seed", "3"), True)):
        capsys.readouterr()
        assert main(command(setup, name, "--curvature", setup["fit"], *more)) == 0
        error = " ".join(capsys.readouterr().err.split())
        assert ("it may have seen the texts that KL is measured on" in error) == said
        manifest = json.loads((Path(setup["out"]) / "manifest.json").read_text())
        assert manifest["curvature_sha256"] == digest.hexdigest()
        assert manifest["curvature_retain_sha256"] == told["retain_sha256"]
        assert (manifest["retain_sha256"] != told["retain_sha256"]) == said
        shutil.rmtree(setup["out"])


OWN = ("--estimator", "kfac", "--labels", "sampled")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--estimator", "ekfac"), "with --estimator kfac, this run is with --estimator ekfac"),
        (("--estimator", "identity"), "this run is with --estimator identity"),
        (("--labels", "sqrt"), "with --labels sampled, this run is with --labels sqrt"),
        (("--joint-bias",), "without --joint-bias, this run is with --joint-bias"),
        (("--memory", "1GB"), "without --memory, this run is with --memory 1GB"),
    ],
)
def test_options_that_contradict_a_fit_are_refused(setup, capsys, more, message):
    fit(setup, *OWN)
    capsys.readouterr()
    assert main(command(setup, "unlearn", "--curvature", setup["fit"], *more)) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not Path(setup["out"] + ".part").exists()


@pytest.mark.parametrize("more", [(), OWN, ("--steps", "2", "--refit", "--memory", "1GB")])
def test_a_run_tells_the_settings_of_its_fit(setup, more):
    fit(setup, *OWN)
    assert main(command(setup, "unlearn", "--curvature", setup["fit"], *more)) == 0
    own = read_config(Path(setup["out"]) / "config.yaml").fit
    assert (own.estimator, own.labels) == ("kfac", "sampled")
    assert own.memory == ("1GB" if more and more[0] == "--steps" else None)  # of the second fit
    manifest = json.loads((Path(setup["out"]) / "manifest.json").read_text())
    assert manifest["config"]["fit"]["estimator"] == "kfac"


def test_a_configuration_that_contradicts_a_fit_is_refused(setup, tmp_path, capsys):
    fit(setup)
    (tmp_path / "c.yaml").write_text("fit: {estimator: diagonal}")
    more = ("--curvature", setup["fit"], "--config", str(tmp_path / "c.yaml"))
    for name in ("unlearn", "sweep"):
        capsys.readouterr()
        assert main(command(setup, name, *more)) == 2
        assert "this run is with --estimator diagonal" in " ".join(capsys.readouterr().err.split())


def test_a_changed_curvature_is_not_gone_on_with(setup, monkeypatch, capsys):
    fit(setup)
    run = command(setup, "unlearn", "--curvature", setup["fit"], "--steps", "2")

    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("kfade.runs.unlearning.step_line", interrupt)
        assert main(run) == 130
    shutil.rmtree(setup["fit"])
    fit(setup, "--seed", "1")
    capsys.readouterr()
    assert main([*run, "--resume"]) == 2
    assert "was interrupted: the curvature;" in " ".join(capsys.readouterr().err.split())


def test_equal_runs_without_a_chat_template_are_equal(setup, tmp_path, monkeypatch):
    """Whatever the date: no template is told it."""
    written = []
    for day in (1, 2):
        moment = datetime(2024, 2, day).timestamp()
        monkeypatch.setattr("kfade.runs.template.time.time", lambda now=moment: now)
        assert main(command(setup, "unlearn", "--alpha", "0.01")) == 0
        out = Path(setup["out"])
        evaluated = tmp_path / "kl"
        words = ["eval", "memorisation", setup["model"], "--members", setup["forget"]]
        assert main([*words, "--out", str(evaluated)]) == 0
        manifest = json.loads((out / "manifest.json").read_text())
        assert manifest["config"]["data"]["template_date"] is None
        files = [out / "manifest.json", out / "config.yaml", evaluated / "items.jsonl"]
        written.append([path.read_bytes() for path in files])
        shutil.rmtree(out)
        shutil.rmtree(evaluated)
    assert written[0] == written[1]


def change_embedding(setup: dict[str, str]) -> None:
    """No target: the digests of the targets' weights do not see it."""
    path = Path(setup["model"]) / "model.safetensors"
    tensors = load_file(path)
    tensors["model.embed_tokens.weight"][3] += 1
    save_file(tensors, path, {"format": "pt"})


def change_held_out(setup: dict[str, str]) -> None:
    path = Path(setup["retain"])
    examples = load_examples(str(path))
    _, held_out = split_holdout(examples, 1, 0)
    lines = path.read_text().splitlines()
    number = [i for i, example in enumerate(examples) if example == held_out[0]]
    lines[number[0]] = json.dumps({"text": "z z z z z z z z"})
    path.write_text("\n".join(lines))


def change_forget(setup: dict[str, str]) -> None:
    Path(setup["forget"]).write_text(json.dumps({"text": "z z z z"}))


CHANGES = {
    "the weights of MODEL": change_embedding,
    "the held-out retain set": change_held_out,
    "the forget set": change_forget,
}
INTERRUPTED = {
    "unlearn": (
        "kfade.runs.unlearning.step_line",
        ("--steps", "2", "--no-refit", "--alpha", "0.01"),
    ),
    "baseline": ("kfade.runs.baselines.curve_line", ("--steps", "4", "--evaluate-every", "1")),
    "fit": ("kfade.runs.fitting._metrics", ()),
}


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        *(("unlearn", changed) for changed in CHANGES),
        *(("baseline", changed) for changed in CHANGES),
        ("fit", "the weights of MODEL"),
    ],
)
def test_a_resumed_run_names_what_has_changed(setup, monkeypatch, capsys, name, changed):
    place, options = INTERRUPTED[name]
    calls = []

    def interrupt(*arguments):
        calls.append(arguments)
        if len(calls) == 2 or name != "baseline":
            raise KeyboardInterrupt
        return ""

    monkeypatch.setattr("kfade.runs.baselines.SAVE_SECONDS", 0.0)
    monkeypatch.setattr(place, interrupt)
    assert main(command(setup, name, *options)) == 130
    monkeypatch.undo()
    files = {path: path.read_bytes() for path in Path(setup["model"]).iterdir()}
    files.update(
        {path: path.read_bytes() for path in map(Path, (setup["forget"], setup["retain"]))}
    )
    CHANGES[changed](setup)
    capsys.readouterr()
    assert main(command(setup, name, *options, "--resume")) == 2
    line = f"changed since the run was interrupted: {changed};"
    assert line in " ".join(capsys.readouterr().err.split())
    for path, content in files.items():
        path.write_bytes(content)
    assert main(command(setup, name, *options, "--resume")) == 0  # control
    assert not (Path(setup["out"]) / "inputs.json").exists()
    assert not Path(setup["out"] + ".part").exists()


def test_an_evaluation_goes_on_with_its_own_model_only(setup, tmp_path, monkeypatch, capsys):
    questions = tmp_path / "q.jsonl"
    rows = [{"question": f"a {x}", "choices": ["b", "c"], "answer": 0} for x in "defg"]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = ["eval", "choice", setup["model"], "--questions", str(questions), "--out", setup["out"]]
    with monkeypatch.context() as patch:
        seen = []
        add = ItemLog.add

        def interrupt(log, *arguments, **values):
            if len(seen) == 2:
                raise KeyboardInterrupt
            seen.append(arguments)
            add(log, *arguments, **values)

        patch.setattr(ItemLog, "add", interrupt)
        assert main(run) == 130
    before = (Path(setup["model"]) / "model.safetensors").read_bytes()
    change_embedding(setup)
    capsys.readouterr()
    assert main([*run, "--resume"]) == 2
    assert "interrupted: the weights that are judged;" in " ".join(capsys.readouterr().err.split())
    (Path(setup["model"]) / "model.safetensors").write_bytes(before)
    assert main([*run, "--resume"]) == 0


def test_an_update_of_another_tokenizer_is_said(setup, tmp_path, capsys):
    zoo.tokenizer().save_pretrained(tmp_path / "words")
    words = ("--tokenizer", str(tmp_path / "words"))
    assert main(command(setup, "unlearn", *words)) == 0
    manifest = json.loads((Path(setup["out"]) / "manifest.json").read_text())
    assert manifest["config"]["model"]["tokenizer"] == words[1]
    capsys.readouterr()
    apply = ["apply", setup["model"], setup["out"], "--out"]
    assert main([*apply, str(tmp_path / "one")]) == 0
    assert "computed with --tokenizer" in capsys.readouterr().err
    assert main([*apply, str(tmp_path / "two"), *words]) == 0
    assert "computed with --tokenizer" not in capsys.readouterr().err
