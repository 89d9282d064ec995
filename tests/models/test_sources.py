"""Where a model comes from (adapters, revisions, other tokenizers), and what is written of it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file
from transformers import Qwen3_5Config, Qwen3_5ForCausalLM

import kfade
from kfade.cli import main
from kfade.export.lora import to_lora
from kfade.method.update import Update
from kfade.models.load import load_skeleton, provenance, save_model
from kfade.models.sources import Source
from kfade.models.weights import digest_weights

BESIDE = {  # what save_pretrained does not know
    "preprocessor_config.json": b'{ "size":  224}\n',
    "processor_config.json": b"{}",
    "tokenizer.model": b"\x0a\x0d\x00pieces",
    "chat_template.jinja": b"{{ bos_token }}{{ messages[0]['content'] }}",
    "generation_config.json": b'{"temperature": 0.7, "do_sample": true, "eos_token_id": [2, 4]}',
    "LICENSE": b"free\r\n",
    "README.md": b"# a model\n",
    "1_Pooling/config.json": b'{"mode": "mean"}',
}
NOT_WRITTEN = {
    "pytorch_model.bin": b"weights",
    "original/consolidated.00.pth": b"weights",
    "model.safetensors.index.json": b"{}",
    ".gitattributes": b"x",
}


def put(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def an_update(model) -> Update:
    """A change of two weights, of full rank 2."""
    generator = torch.Generator().manual_seed(0)
    deltas = {}
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        shape = model.get_parameter(name).shape
        left = torch.randn(shape[0], 2, generator=generator)
        deltas[name] = 0.1 * left @ torch.randn(2, shape[1], generator=generator)
    return Update(deltas, {"weights_sha256": digest_weights(model, deltas)})


@pytest.fixture
def base(tmp_path) -> Path:
    folder = tmp_path / "base"
    save_model(zoo.tiny("llama", torch.float32), zoo.tokenizer(), folder)
    return folder


# --- what is written -------------------------------------------------------------------------


def test_apply_and_revert_keep_what_lies_beside_the_model(base, tmp_path):
    put(base, {**BESIDE, **NOT_WRITTEN})
    (base / "linked.txt").symlink_to(base / "LICENSE")  # as the hub's cache has files
    model = zoo.tiny("llama", torch.float32)
    update = an_update(model)
    update.save(tmp_path / "u.safetensors")
    edited, back = tmp_path / "edited", tmp_path / "back"
    run = ["--out", str(edited), "--device", "cpu"]
    assert main(["apply", str(base), str(tmp_path / "u.safetensors"), *run]) == 0
    assert main(["revert", str(edited), str(tmp_path / "u.safetensors"), "--out", str(back)]) == 0
    for folder in (edited, back):
        for name, content in {**BESIDE, "linked.txt": BESIDE["LICENSE"]}.items():
            assert (folder / name).read_bytes() == content, name
        for name in NOT_WRITTEN:
            assert not (folder / name).exists(), name
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert (folder / name).read_bytes() == (base / name).read_bytes()
    assert not (edited / "linked.txt").is_symlink()
    loaded, _ = kfade.load_model(str(edited), device="cpu")
    update.apply(model)
    assert digest_weights(loaded) == digest_weights(model)  # the edited weights, not the base's


def test_a_folder_within_the_models_own_is_written_too(base, tmp_path):
    update = an_update(zoo.tiny("llama", torch.float32))
    update.save(tmp_path / "u.safetensors")
    out = base / "runs" / "edited"
    assert main(["apply", str(base), str(tmp_path / "u.safetensors"), "--out", str(out)]) == 0
    assert (out / "tokenizer.json").is_file()
    assert not (out / "runs").exists()


def test_the_language_model_of_a_larger_one_is_not_written(tmp_path, capsys):
    text = {**zoo.GROUPED, "head_dim": 8, "layer_types": ["full_attention"] * zoo.BLOCKS}
    whole = Qwen3_5Config(text_config=text)
    with torch.random.fork_rng():
        model = Qwen3_5ForCausalLM(whole.text_config)
    folder = tmp_path / "model"
    save_model(model, zoo.tokenizer(), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors = {k.replace("model.", "model.language_model.", 1): v for k, v in tensors.items()}
    tensors["model.visual.patch_embed.weight"] = torch.zeros(2, 2)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    whole.save_pretrained(folder)
    loaded, words = kfade.load_model(str(folder), device="cpu")
    assert digest_weights(loaded) == digest_weights(model)
    line = "of which the language model alone"
    with pytest.raises(kfade.InputError, match=line):
        save_model(loaded, words, tmp_path / "out", Source(str(folder)))
    update = Update({"model.layers.0.mlp.up_proj.weight": torch.zeros(zoo.INNER, zoo.WIDTH)})
    update.save(tmp_path / "u.safetensors")
    run = ["apply", str(folder), str(tmp_path / "u.safetensors"), "--out", str(tmp_path / "out")]
    assert main(run) == 2
    assert line in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- tokenizers from elsewhere ---------------------------------------------------------------


def test_a_tokenizer_from_elsewhere_is_used_and_written(base, tmp_path):
    other = zoo.tokenizer(chat=True)
    other.save_pretrained(tmp_path / "words")
    (tmp_path / "words" / "tokenizer.model").write_bytes(b"theirs")
    (base / "tokenizer.model").write_bytes(b"ours")
    source = Source(str(base), tokenizer=str(tmp_path / "words"))
    model, words = kfade.load_model(str(base), device="cpu", tokenizer=source.tokenizer)
    assert words.chat_template == zoo.CHAT_TEMPLATE
    save_model(model, words, tmp_path / "out", source)
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"theirs"
    _, again = kfade.load_model(str(tmp_path / "out"), device="cpu")
    assert again.chat_template == zoo.CHAT_TEMPLATE
    assert again("a b </s>").input_ids == words("a b </s>").input_ids


def test_weights_in_other_forms_are_left_out_and_named(base, tmp_path, caplog):
    put(base, {"onnx/config.json": b"{}", "onnx/model.onnx": b"old", "onnx/model.onnx_data": b"o"})
    put(base, {"tf_model.h5": b"old", "pytorch_model.bin": b"old", ".cache/x.bin": b"of the hub"})
    model, words = kfade.load_model(str(base), device="cpu")
    save_model(model, words, tmp_path / "out", Source(str(base)))
    save_model(model, words, base / "out", Source(str(base)))
    assert (tmp_path / "out" / "onnx" / "config.json").read_bytes() == b"{}"
    assert [path.name for path in (tmp_path / "out" / "onnx").iterdir()] == ["config.json"]
    said = (
        f"note: {base}: not copied, since its weights are those before the edit: "
        "onnx/model.onnx, onnx/model.onnx_data, tf_model.h5"
    )
    assert caplog.messages == [said, said]


@pytest.mark.parametrize("word", ["apply", "revert"])
def test_a_model_without_a_tokenizer_is_edited_all_the_same(base, tmp_path, word):
    for path in base.glob("*token*"):
        path.unlink()
    put(base, {"LICENSE": b"free", "tokenizer_config.json": b'{"of": "no vocabulary"}'})
    model = zoo.tiny("llama", torch.float32)
    # Of another model: it could not be taken away from the very weights that it is to be added to.
    update = an_update(zoo.tiny("llama", torch.float32, seed=3))
    update.save(tmp_path / "u.safetensors")
    out = tmp_path / "edited"
    run = [word, str(base), str(tmp_path / "u.safetensors"), "--device", "cpu"]
    assert main([*run, "--out", str(out)]) == 0
    (update if word == "apply" else -update).apply(model)
    written = load_file(out / "model.safetensors")
    for name in update.deltas:
        assert torch.equal(written[name], model.get_parameter(name).cpu())
    names = {path.name for path in out.iterdir()}
    assert names == {path.name for path in base.iterdir()}
    assert (out / "tokenizer_config.json").read_bytes() == b'{"of": "no vocabulary"}'
    assert main([*run, "--out", str(tmp_path / "x"), "--tokenizer", str(base)]) == 2
    with pytest.raises(kfade.InputError, match="it has no tokenizer"):
        kfade.load_model(str(base), device="cpu")


# --- adapters --------------------------------------------------------------------------------


@pytest.fixture
def adapter(base, tmp_path) -> Path:
    """What kfade export-lora writes of an update of rank 2, without error."""
    model = zoo.tiny("llama", torch.float32)
    lora = to_lora(an_update(model), model, 2, base="base")
    folder = tmp_path / "adapter"
    folder.mkdir()
    lora.save(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(lora.config))
    return folder


def named(adapter: Path, name: object) -> None:
    path = adapter / "adapter_config.json"
    config = {**json.loads(path.read_text()), "base_model_name_or_path": name}
    path.write_text(json.dumps(config))


def test_an_adapter_without_peft_says_what_to_install(adapter, base, monkeypatch):
    named(adapter, str(base))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(kfade.InputError, match=r"pip install 'kfade\[adapters\]'"):
        kfade.load_model(str(adapter), device="cpu")
    assert load_skeleton(str(adapter)).config.model_type == "llama"  # needs no weights


@pytest.mark.parametrize("path", ["absolute", "beside", "working directory"])
def test_an_adapter_is_merged_into_its_base(adapter, base, tmp_path, monkeypatch, path):
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    name = {"absolute": str(base), "beside": "../base", "working directory": "./base"}[path]
    if path == "beside":
        monkeypatch.chdir("/")
    named(adapter, name)
    model = zoo.tiny("llama", torch.float32)
    plain = digest_weights(model)
    update = an_update(model)
    update.apply(model)
    loaded, words = kfade.load_model(str(adapter), device="cpu")
    assert digest_weights(loaded) != plain
    for key, weight in model.named_parameters():
        torch.testing.assert_close(loaded.get_parameter(key), weight, rtol=1e-5, atol=1e-6)
    assert words("a b").input_ids == [7, 8]
    assert Path(provenance(Source(str(adapter)))["adapter_base"]).samefile(base)


def test_a_run_on_an_adapter_tells_its_base(adapter, base, tmp_path):
    pytest.importorskip("peft")
    named(adapter, str(base))
    (base / "LICENSE").write_bytes(b"free")
    for name in ("forget", "retain"):
        rows = [{"text": f"{x} {name[0]} k l m n o p q"} for x in "abcdefgh"]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    sets = ["--forget", str(tmp_path / "forget"), "--retain", str(tmp_path / "retain")]
    out = tmp_path / "out"
    run = ["unlearn", str(adapter), *sets, "--out", str(out), "--sequence-length", "8"]
    assert main([*run, "--export-model"]) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["model"] == str(adapter)
    assert manifest["adapter_base"] == str(base)
    assert (out / "model" / "LICENSE").read_bytes() == b"free"
    assert not (out / "model" / "adapter_config.json").exists()
    edited, _ = kfade.load_model(str(out / "model"), device="cpu")
    merged, _ = kfade.load_model(str(adapter), device="cpu")
    Update.load(out).apply(merged)
    assert digest_weights(edited) == digest_weights(merged)


def test_an_adapters_own_tokenizer_goes_first(adapter, base):
    pytest.importorskip("peft")
    named(adapter, str(base))
    zoo.tokenizer(chat=True).save_pretrained(adapter)
    _, words = kfade.load_model(str(adapter), device="cpu")
    assert words.chat_template == zoo.CHAT_TEMPLATE


def test_tensors_that_the_base_has_no_place_for_are_refused(adapter, base):
    pytest.importorskip("peft")
    named(adapter, str(base))
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({k.replace("layers.1", "layers.7"): v for k, v in tensors.items()}, path)
    with pytest.raises(kfade.InputError, match=r"layers\.[17].*do not match the base"):
        kfade.load_model(str(adapter), device="cpu")
    path.unlink()
    with pytest.raises(kfade.InputError, match="adapter"):
        kfade.load_model(str(adapter), device="cpu")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (None, "does not name its base"),
        ("", "does not name its base"),
        ("/nowhere/at/all", r"base cannot be found \(/nowhere/at/all: no such folder\)"),
        ("../nothing", r"base cannot be found \(\.\./nothing: no such folder\)"),
    ],
)
def test_an_adapter_whose_base_is_not_there(adapter, name, message):
    named(adapter, name)
    with pytest.raises(kfade.InputError, match=message):
        kfade.load_model(str(adapter), device="cpu")


def test_an_adapter_on_an_adapter_is_refused(adapter, base, tmp_path):
    named(adapter, str(base))
    upper = Path(shutil.copytree(adapter, tmp_path / "upper"))
    named(upper, str(adapter))
    with pytest.raises(kfade.InputError, match="an adapter on top of another"):
        kfade.load_model(str(upper), device="cpu")
    (upper / "adapter_config.json").write_text("{")
    with pytest.raises(kfade.InputError, match=r"adapter_config\.json is not valid JSON"):
        kfade.load_model(str(upper), device="cpu")


def test_an_adapter_beside_whole_weights_is_unclear(adapter, base):
    for path in adapter.iterdir():
        shutil.copy(path, base)
    with pytest.raises(kfade.InputError, match=r"holds an adapter .* and weights of a whole model"):
        kfade.load_model(str(base), device="cpu")


# --- the hub ---------------------------------------------------------------------------------


@pytest.fixture
def hub(base, tmp_path, monkeypatch) -> Path:
    """A cache of the hub that holds two revisions of one model; nothing else can be reached."""
    cache = tmp_path / "hub"
    repository = cache / "models--someone--tiny"
    for commit, branch, seed in (("a" * 40, "main", 0), ("b" * 40, "older", 5)):
        snapshot = repository / "snapshots" / commit
        save_model(zoo.tiny("llama", torch.float32, seed=seed), zoo.tokenizer(), snapshot)
        (snapshot / "LICENSE").write_text(branch)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / branch).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(cache))
    return cache


@pytest.mark.parametrize(("revision", "seed"), [(None, 0), ("older", 5), ("b" * 40, 5)])
def test_a_revision_is_loaded_recorded_and_written(hub, tmp_path, revision, seed):
    source = Source("someone/tiny", revision)
    model, words = kfade.load_model("someone/tiny", device="cpu", revision=revision)
    assert digest_weights(model) == digest_weights(zoo.tiny("llama", torch.float32, seed=seed))
    assert provenance(source) == {"commit": ("b" if seed else "a") * 40}
    save_model(model, words, tmp_path / "out", source)
    assert (tmp_path / "out" / "LICENSE").read_text() == ("older" if seed else "main")
    with pytest.raises(kfade.InputError, match="its configuration could not be loaded"):
        kfade.load_model("someone/tiny", device="cpu", revision="newer")


@pytest.mark.parametrize("command", ["choice", "attack"])
def test_what_judges_a_revision_records_it_and_its_commit(hub, tmp_path, command):
    out, data = tmp_path / "out", tmp_path / "data.jsonl"
    row = {"question": "a b", "choices": ["c", "d"], "answer": 0}
    asked = ["eval", "choice", "someone/tiny", "--questions", str(data)]
    if command == "attack":
        row = {"text": "a b c d e"}
        asked = ["attack", "someone/tiny", "--data", str(data), "--forget", str(data)]
        asked += ["--steps", "1", "--at", "0", "--sequence-length", "8"]
    data.write_text(json.dumps(row) + "\n")
    assert main([*asked, "--revision", "older", "--device", "cpu", "--out", str(out)]) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["commit"] == "b" * 40
    config = manifest["config"]
    assert (config if command == "choice" else config["run"]["model"])["revision"] == "older"
