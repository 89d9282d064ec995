"""What a run was made of: the base of an update in any dtype, and what a resumed run must read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file

from kfade.cli import main
from kfade.data.examples import load_examples, split_holdout
from kfade.evaluate.log import ItemLog
from kfade.method.update import Update
from kfade.models.layers import digest_weights
from kfade.models.load import save_model

NAME = "model.layers.1.mlp.up_proj.weight"


def recorded(model) -> Update:
    """An update with the digests that a run on ``model`` records."""
    deltas = {NAME: torch.zeros_like(model.get_parameter(NAME), dtype=torch.float32)}
    digests = {
        "weights_sha256": digest_weights(model, deltas),
        "weights_bfloat16_sha256": digest_weights(model, deltas, torch.bfloat16),
    }
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
        del update.provenance["weights_bfloat16_sha256"]
        assert update.compare_base(tiny(*applied_to)) == base


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
    "unlearn": ("kfade.cli.unlearn.step_line", ("--steps", "2", "--no-refit", "--alpha", "0.01")),
    "baseline": ("kfade.cli.baseline.curve_line", ("--steps", "4", "--evaluate-every", "1")),
    "fit": ("kfade.cli.fit._metrics", ()),
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

    monkeypatch.setattr("kfade.cli.baseline.SAVE_SECONDS", 0.0)
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
