"""A tiny model as a GGUF file."""

from __future__ import annotations

from pathlib import Path

import gguf
from transformers import LlamaForCausalLM

from zoo.families import VOCABULARY
from zoo.words import WORDS


def write_gguf(model: LlamaForCausalLM, path: Path, quantise: bool = False) -> None:
    """``model`` and a byte-level tokenizer as a GGUF file, in float32 or with Q8_0 weights."""
    config, writer = model.config, gguf.GGUFWriter(str(path), "llama")
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads["q_proj"])
    writer.add_head_count_kv(heads["k_proj"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*WORDS[:-1], "ab"])
    writer.add_token_types([control if i < 3 else normal for i in range(VOCABULARY)])
    # Twice: transformers up to 5.16 takes an array of one string apart into letters.
    writer.add_token_merges(["a b", "a b"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        count = next((n for part, n in heads.items() if part in name), None)
        if count:  # GGUF keeps each rotated pair of a head side by side
            halves = tensor.view(count, 2, -1, tensor.shape[1])
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        data, kind = tensor.numpy(), None
        if quantise and tensor.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            data = gguf.quantize(data, kind)
        name = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
