"""What is wrong with a checkpoint is one line, whatever library would have failed on it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file
from transformers import BertConfig, CLIPConfig, LlamaConfig, LlamaForCausalLM, T5Config

import kfade
from kfade.cli import main
from kfade.models.faults import check_report
from kfade.models.load import load_skeleton, load_tokenizer, save_model
from kfade.models.weights import digest_weights

DOWN = "model.layers.1.mlp.down_proj.weight"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 10640\n" % (b"4d" * 32)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    save_model(zoo.tiny("llama", torch.float32), zoo.tokenizer(), folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def refusal(folder: Path | str, **options) -> str:
    """The one line that says why a model is not loaded."""
    with pytest.raises(kfade.InputError) as found:
        kfade.load_model(str(folder), device="cpu", **options)
    line = str(found.value)
    assert "\n" not in line
    return line


def change_weights(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})


def change_json(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def shard(folder: Path) -> list[str]:
    """Weights in two files with an index; returns the names in the second."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    half = len(names) // 2
    where = {}
    for i, part in enumerate((names[:half], names[half:]), start=1):
        file = f"model-0000{i}-of-00002.safetensors"
        save_file({n: tensors[n] for n in part}, folder / file, {"format": "pt"})
        where.update(dict.fromkeys(part, file))
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return names[half:]


# --- weights that do not belong to the configuration -----------------------------------------


def test_a_whole_model_loads(folder, caplog):
    model, _ = kfade.load_model(str(folder), device="cpu")  # control of all that follows
    assert digest_weights(model) == digest_weights(zoo.tiny("llama", torch.float32))
    assert not caplog.records
    shard(folder)
    again, _ = kfade.load_model(str(folder), device="cpu")
    assert digest_weights(again) == digest_weights(model)


def test_a_missing_tensor_is_named(folder):
    change_weights(folder, lambda t: {k: v for k, v in t.items() if k != DOWN})
    assert f"one of the model's 21 tensors is not in its weights ({DOWN})" in refusal(folder)


def test_a_missing_tensor_ends_every_command_that_loads_weights(folder, tmp_path, capsys):
    change_weights(folder, lambda t: {k: v for k, v in t.items() if k != DOWN})
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps({"text": f"{x} b c"}) + "\n" for x in "abcd"))
    sets = ["--forget", str(data), "--retain", str(data)]
    for command in (["check", str(folder)], ["unlearn", str(folder), *sets, "--out", "o"]):
        assert main(command) == 2
        assert f"({DOWN})" in capsys.readouterr().err


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model.", "a.b."])
def test_a_prefix_before_all_names_is_named(folder, prefix):
    change_weights(folder, lambda t: {prefix + k: v for k, v in t.items()})
    line = refusal(folder)
    assert "21 of the model's 21 tensors are not in its weights" in line
    assert f"there the names begin with {prefix!r}" in line


def test_weights_of_the_base_model_alone_lack_the_head(folder, whole):
    def bare(tensors):
        return {k.removeprefix("model."): v for k, v in tensors.items() if k != "lm_head.weight"}

    change_weights(folder, bare)  # names without "model." are known to transformers
    assert "one of the model's 21 tensors is not in its weights (lm_head.weight)" in refusal(folder)


def test_a_tied_head_is_not_missing(tmp_path):
    config = LlamaConfig(**zoo.GROUPED, tie_word_embeddings=True)
    save_model(LlamaForCausalLM(config), zoo.tokenizer(), tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model, _ = kfade.load_model(str(tmp_path), device="cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"intermediate_size": 40}, r"model.layers.0.mlp.down_proj.weight is [16, 24], not [16, 4"),
        ({"num_hidden_layers": 3}, "9 of the model's 30 tensors are not in its weights (model.lay"),
        (
            {"num_hidden_layers": 1},
            "has no place for 9 of the tensors in its weights (model.layers",
        ),
        ({"vocab_size": 50}, "the shapes of 2 of 21 tensors in its weights are not those of its c"),
    ],
)
def test_a_configuration_of_another_model_is_told(folder, values, message):
    change_json(folder / "config.json", **values)
    assert message in refusal(folder)


def test_a_bias_without_a_place_is_refused(folder):
    # Left out, it would change every output: attention_bias is false in the configuration.
    name = "model.layers.0.self_attn.q_proj.bias"
    change_weights(folder, lambda t: {**t, name: torch.ones(16)})
    assert f"has no place for 1 of the tensors in its weights ({name})" in refusal(folder)


def test_a_value_head_is_left_out_and_said(folder, caplog):
    change_weights(folder, lambda t: {**t, "v_head.summary.weight": torch.zeros(1, 16)})
    kfade.load_model(str(folder), device="cpu")
    assert "no place for it: v_head.summary.weight;" in caplog.text


def test_computed_buffers_have_no_place_but_do_no_harm():
    model = zoo.tiny("llama")
    report = {"missing_keys": set(), "mismatched_keys": set()}
    inner = {"model.rotary_emb.inv_freq", "model.layers.0.self_attn.masked_bias"}
    assert check_report("m", model, {**report, "unexpected_keys": inner}) is None
    with pytest.raises(kfade.InputError, match="no place"):
        check_report("m", model, {**report, "unexpected_keys": {"model.norm.bias"}})


def test_a_tensor_that_the_index_names_and_no_file_holds(folder):
    second = shard(folder)
    path = folder / "model-00002-of-00002.safetensors"
    tensors = load_file(path)
    lost = tensors.pop(second[-1])
    save_file(tensors, path, {"format": "pt"})
    assert lost.numel()
    assert f"({second[-1]})" in refusal(folder)


def test_a_missing_shard_is_named(folder):
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors" in refusal(folder)


def test_a_gguf_file_with_a_missing_tensor(tmp_path, monkeypatch):
    model = zoo.tiny("llama", torch.float32)
    state = {k: v for k, v in model.state_dict().items() if k != DOWN}
    monkeypatch.setattr(model, "state_dict", lambda: state)
    zoo.write_gguf(model, tmp_path / "tiny.GGUF")  # capitals are a GGUF file's too
    assert f"is not in its weights ({DOWN})" in refusal(tmp_path / "tiny.GGUF")
    monkeypatch.undo()
    zoo.write_gguf(model, tmp_path / "whole.Gguf")
    loaded, _ = kfade.load_model(str(tmp_path / "whole.Gguf"), device="cpu")
    assert digest_weights(loaded) == digest_weights(model)


@pytest.mark.parametrize("left", [10, 900, 0.5, -1])
def test_a_gguf_file_that_is_cut_off(tmp_path, left):
    """Within its first words, its settings, its tensors, and by one byte."""
    path = tmp_path / "tiny.gguf"
    zoo.write_gguf(zoo.tiny("llama", torch.float32), path)
    whole = path.read_bytes()
    kept = whole[: left if isinstance(left, int) else int(left * len(whole))]
    path.write_bytes(kept)
    said = f"tiny.gguf is cut off after {len(kept)} bytes, or damaged; get a whole copy"
    assert refusal(path) == f"{path}: {said}"
    path.write_bytes(b"a page of a web site")
    assert refusal(path) == f"{path}: tiny.gguf is not a GGUF file; get a whole copy"


# --- files that are not whole ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.safetensors", POINTER, "model.safetensors is a pointer of git-lfs (130 bytes)"),
        ("tokenizer.json", POINTER, "tokenizer.json is a pointer of git-lfs"),
        ("config.json", POINTER, "config.json is a pointer of git-lfs"),
        ("model.safetensors", b"", "model.safetensors is empty"),
        ("model.safetensors", b"\x20\0\0\0\0\0\0\0{", "not a whole safetensors file (Error while"),
        ("model.safetensors", b"<html>404 not found", "is not a whole safetensors file"),
        ("config.json", b'{"model_type": ', "config.json is not valid JSON"),
        ("config.json", b"\xff\xfe{\x00", "config.json is not valid JSON"),
        ("config.json", b"[1]", "config.json holds a list, not settings by name"),
        ("config.json", b"{}", "its configuration could not be loaded (Unrecognized model"),
        ("tokenizer.json", b'{"version"', "tokenizer.json is not valid JSON"),
        ("tokenizer.json", b"{}", "its tokenizer could not be loaded (KeyError: 'added_tokens')"),
        ("tokenizer_config.json", b"{", "tokenizer_config.json is not valid JSON"),
        ("chat_template.jinja", b"\xff\xfe", "chat_template.jinja is not text in UTF-8"),
        ("model.safetensors.index.json", b"{}", None),
    ],
)
def test_a_file_that_is_not_whole_is_named(folder, file, content, message):
    (folder / file).write_bytes(content)
    if message is None:  # nothing reads it: there is a file with all weights
        kfade.load_model(str(folder), device="cpu")
    else:
        assert message in refusal(folder)


def test_a_cut_off_file_is_told(folder):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    line = "model.safetensors is not a whole safetensors file (Error while deserializing header: "
    assert f"{line}incomplete metadata, file not fully covered)" in refusal(folder)


@pytest.mark.parametrize("kind", ["cut off", "pointer"])
def test_pickled_weights(folder, kind):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    model, _ = kfade.load_model(str(folder), device="cpu")
    assert digest_weights(model) == digest_weights(zoo.tiny("llama", torch.float32))
    path = folder / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:1000] if kind == "cut off" else POINTER)
    said = "the model could not be loaded (RuntimeError: PytorchStreamReader failed"
    assert (said if kind == "cut off" else "pytorch_model.bin is a pointer") in refusal(folder)


def test_lack_of_memory_is_not_made_an_error_of_the_checkpoint(folder, monkeypatch):
    for error in (
        MemoryError(),
        KeyboardInterrupt(),
        RuntimeError("can't allocate memory: you tried to allocate 9 TB"),
    ):

        def fail(*arguments, error=error, **named):
            raise error

        monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", fail)
        with pytest.raises(type(error), match="allocate" if error.args else None):
            kfade.load_model(str(folder), device="cpu")


# --- what it is ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({}, "by a method that its quantization_config does not name"),
    ],
)
def test_a_quantised_checkpoint_names_its_method(folder, settings, method):
    change_json(folder / "config.json", quantization_config=settings)
    line = f"its weights are quantised ({method}); load the full-precision model"
    assert line in refusal(folder)
    with pytest.raises(kfade.InputError, match="quantised"):
        load_skeleton(str(folder))
    change_json(folder / "config.json", quantization_config=None)  # as some files have it
    kfade.load_model(str(folder), device="cpu")


def test_weights_of_8_bits_are_quantised_whatever_the_configuration_says(folder):
    change_weights(folder, lambda t: {**t, DOWN: (40 * t[DOWN]).to(torch.int8)})
    assert f"{DOWN} is stored as I8 in model.safetensors, so its weights are quantised" in refusal(
        folder
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BertConfig(), "bert reads text both ways, to fill in masked words"),
        (T5Config(), "t5 has an encoder and a decoder"),
        (CLIPConfig(), "clip is not a causal language model"),
    ],
)
def test_what_is_no_causal_language_model_is_told(folder, config, message):
    config.save_pretrained(folder)
    assert message in refusal(folder)


CODE = {
    "configuration_my.py": "from transformers import LlamaConfig\n\n\n"
    "class MyConfig(LlamaConfig):\n    model_type = 'my'\n",
    "modeling_my.py": "from transformers import LlamaForCausalLM\n\n"
    "from .configuration_my import MyConfig\n\n\n"
    "class MyModel(LlamaForCausalLM):\n    config_class = MyConfig\n",
}


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Code that comes with models is copied here, and forgotten afterwards."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    monkeypatch.syspath_prepend(tmp_path / "hf")
    yield
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


def with_code(folder: Path) -> None:
    for name, text in CODE.items():
        (folder / name).write_text(text)
    auto_map = {
        "AutoConfig": "configuration_my.MyConfig",
        "AutoModelForCausalLM": "modeling_my.MyModel",
    }
    change_json(folder / "config.json", model_type="my", auto_map=auto_map)


def test_code_of_its_own_needs_leave_and_is_written_too(folder, tmp_path, modules):
    with_code(folder)
    assert "pass --trust-remote-code" in refusal(folder)
    model, words = kfade.load_model(str(folder), device="cpu", trust_remote_code=True)
    assert type(model).__name__ == "MyModel"
    out = tmp_path / "written"
    save_model(model, words, out, kfade.models.load.Source(str(folder)))
    for name, text in CODE.items():
        assert (out / name).read_text() == text
    assert "pass --trust-remote-code" in refusal(out)
    again, _ = kfade.load_model(str(out), device="cpu", trust_remote_code=True)
    assert digest_weights(again) == digest_weights(model)


def test_code_that_is_not_there(folder, modules):
    with_code(folder)
    (folder / "configuration_my.py").unlink()
    assert "configuration_my.py" in refusal(folder, trust_remote_code=True)


# --- tokenizers ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_a_missing_tokenizer_names_the_option(family, tmp_path):
    # transformers makes one with nothing but special tokens for some of them.
    zoo.tiny(family, torch.float32).save_pretrained(tmp_path / "model")
    line = "it has no tokenizer; give another model's with --tokenizer"
    assert line in refusal(tmp_path / "model")
    with pytest.raises(kfade.InputError, match="no tokenizer"):
        load_tokenizer(str(tmp_path / "model"))
    zoo.tokenizer().save_pretrained(tmp_path / "words")
    _, words = kfade.load_model(
        str(tmp_path / "model"), device="cpu", tokenizer=str(tmp_path / "words")
    )
    assert words("a b </s>").input_ids == [7, 8, 2]


@pytest.mark.parametrize("special", [True, False])
def test_tokens_beyond_the_embedding_are_named(folder, special):
    words = zoo.tokenizer()
    words.add_tokens(["<one>", "<two>"], special_tokens=special)
    words.save_pretrained(folder)
    line = "the embedding has 37 rows, but 2 tokens lie beyond it ('<one>' is 37, '<two>' is 38)"
    assert line in refusal(folder)


def test_rows_without_a_token_are_fine(tmp_path):
    config = LlamaConfig(**{**zoo.GROUPED, "vocab_size": 64})
    save_model(LlamaForCausalLM(config), zoo.tokenizer(), tmp_path)
    kfade.load_model(str(tmp_path), device="cpu")


def test_marks_of_images_are_no_part_of_a_text(folder):
    words = zoo.tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    words.save_pretrained(folder)
    change_json(folder / "tokenizer_config.json", extra_special_tokens={"image_token": "<image>"})
    kfade.load_model(str(folder), device="cpu")


def test_what_a_class_adds_beyond_the_embedding_is_taken_out(tmp_path):
    # Qwen2's tokenizer puts <|endoftext|> in where no file names it: the model has no row for it.
    save_model(zoo.tiny("qwen2", torch.float32), zoo.tokenizer(), tmp_path)
    _, words = kfade.load_model(str(tmp_path), device="cpu")
    assert max(words("a <|endoftext|> b").input_ids) < zoo.VOCABULARY
    assert "<|endoftext|>" in load_tokenizer(str(tmp_path)).get_vocab()  # control


# --- names -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", "is a file; give the folder"),
        ("nowhere/at/all", "no such folder"),
        ("nowhere.GGUF", "no such GGUF file"),
    ],
)
def test_names_of_nothing(folder, name, message):
    assert message in refusal(folder / name)


def test_a_revision_is_the_hubs(folder):
    assert "revisions are of models of the hub" in refusal(folder, revision="main")
