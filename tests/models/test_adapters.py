"""Adapters that peft wrote: merged, they compute what peft computes; otherwise they are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import zoo
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
)

import kfade
from kfade.models.load import save_model

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # what peft says of tied weights
TOKENS = torch.arange(3, 13)[None]
VISION = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "image_size": 14}


def a_base(folder: Path, kind: str) -> Path:
    """A random model whose head is its embedding."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "nested":  # the whole configuration and that of the text model both say so
            text = {
                **zoo.SHAPE,
                "head_dim": 8,
                "num_key_value_heads": 2,
                "tie_word_embeddings": True,
            }
            vision = {**VISION, "patch_size": 14, "num_attention_heads": 1}
            config = Gemma3Config(
                text_config=text, vision_config=vision, mm_tokens_per_image=1, image_token_index=1
            )
            model = Gemma3ForConditionalGeneration(config)
            for parameter in model.parameters():
                parameter.data += 0.3 * torch.randn_like(parameter)
        else:
            config = LlamaConfig(**zoo.SHAPE, tie_word_embeddings=True)
            model = LlamaForCausalLM(config)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    save_model(model.eval(), zoo.tokenizer(), folder)
    return folder


def an_adapter(base: Path, folder: Path, **settings) -> torch.Tensor:
    """Write a random adapter for ``base``; what peft computes with it."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_pretrained(base)
        config = peft.LoraConfig(r=2, lora_alpha=4, task_type="CAUSAL_LM", **settings)
        adapted = peft.get_peft_model(model, config).eval()
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data += 0.3 * torch.randn_like(parameter)
    adapted.save_pretrained(folder)
    with torch.no_grad():
        return adapted(input_ids=TOKENS).logits


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("kind", ["plain", "nested"])
@pytest.mark.parametrize(
    ("settings", "tied"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, False),
        ({"target_modules": ["q_proj", "embed_tokens"]}, False),
        ({"target_modules": ["lm_head", "embed_tokens"]}, False),
        ({"target_modules": ["lm_head"], "use_dora": True}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, False),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]}, True),
        ({"target_modules": ["q_proj"]}, True),
    ],
)
def test_an_adapter_on_tied_weights_is_what_peft_computes(tmp_path, kind, settings, tied):
    base = a_base(tmp_path / "base", kind)
    expected = an_adapter(base, tmp_path / "adapter", **settings)
    plain = logits(AutoModelForCausalLM.from_pretrained(base))
    assert (expected - plain).abs().max() > 0.1
    merged, words = kfade.load_model(str(tmp_path / "adapter"), device="cpu")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    shared = merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    assert shared is tied
    for config in (merged.config, merged.config.get_text_config()):
        assert config.tie_word_embeddings is tied
    save_model(merged, words, tmp_path / "written")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "written")
    assert torch.equal(logits(again), logits(merged))


def test_an_adapter_on_a_layer_that_stands_in_two_places_is_refused(tmp_path, monkeypatch):
    base = a_base(tmp_path / "base", "plain")
    one = {"target_modules": ["q_proj"], "layers_to_transform": [0]}
    an_adapter(base, tmp_path / "adapter", **one)

    def repeated(*args, own=AutoModelForCausalLM.from_pretrained, **options):
        model, report = own(*args, **options)
        blocks = model.model.layers
        blocks[1].self_attn.q_proj = blocks[0].self_attn.q_proj
        return model, report

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", repeated)
    with pytest.raises(kfade.InputError, match=r"layers\.0\.self_attn\.q_proj, which the model ha"):
        kfade.load_model(str(tmp_path / "adapter"), device="cpu")


@pytest.fixture
def written(tmp_path) -> Path:
    base = a_base(tmp_path / "base", "plain")
    an_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    return tmp_path / "adapter"


def settle(adapter: Path, **settings) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def refusal(adapter: Path) -> str:
    with pytest.raises(kfade.InputError) as caught:
        kfade.load_model(str(adapter), device="cpu")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_adapter_without_weights_names_the_file(written, monkeypatch):
    (written / "adapter_model.safetensors").unlink()
    shutil.rmtree(written.parent / "base")  # nothing of it is read, and no hub is asked
    a_base(written.parent / "base", "plain")
    said = refusal(written)
    assert said.startswith(f"{written}: holds adapter_config.json but no adapter_model.safetensors")


def test_an_adapter_of_another_base_names_both_shapes(written, tmp_path):
    config = LlamaConfig(**{**zoo.SHAPE, "hidden_size": 32, "head_dim": 8})
    save_model(LlamaForCausalLM(config), zoo.tokenizer(), tmp_path / "wide")
    settle(written, base_model_name_or_path=str(tmp_path / "wide"))
    said = refusal(written)
    assert "layers.0.self_attn.q_proj.lora_A" in said
    assert "of shape [2, 16]" in said
    assert f"base {tmp_path / 'wide'} (model.layers.0.self_attn.q_proj is of shape [16, 32]" in said
    assert "ask for [2, 32]" in said


def test_a_base_without_the_adapters_layers_is_named(written, tmp_path):
    save_model(zoo.tiny("gpt2", torch.float32), zoo.tokenizer(), tmp_path / "gpt2")
    settle(written, base_model_name_or_path=str(tmp_path / "gpt2"))
    said = refusal(written)
    assert said.startswith(f"{written} on its base {tmp_path / 'gpt2'}: ")
    assert "q_proj" in said


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "XLORA"])
def test_kinds_that_are_no_change_of_weights_are_refused_by_kind(written, kind):
    settle(written, peft_type=kind)
    (written.parent / "base" / "model.safetensors").unlink()  # before the base's weights are read
    assert f"an adapter of the kind {kind}, which is not a change of weights" in refusal(written)


def test_a_kind_that_peft_does_not_know_is_named(written):
    settle(written, peft_type="LATER")
    assert "'LATER', which this version of peft does not know" in refusal(written)
