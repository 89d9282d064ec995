"""Tiny models of families whose parts are unlike a Llama's: mixtures, states, another attention."""

from __future__ import annotations

import torch
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MptConfig,
    MptForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)

from zoo.families import GROUPED, VOCABULARY

TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
WIDE = {**TOKENS, "initializer_range": 0.3}


def qwen3_moe():
    config = Qwen3MoeConfig(
        **GROUPED, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8
    )
    return Qwen3MoeForCausalLM(config)


def bloom():
    return BloomForCausalLM(BloomConfig(**WIDE, hidden_size=16, n_layer=2, n_head=2))


def mamba():
    config = MambaConfig(
        **WIDE, hidden_size=16, num_hidden_layers=2, state_size=4, time_step_rank=4
    )
    return MambaForCausalLM(config)


def opt():
    config = OPTConfig(
        **TOKENS,
        init_std=0.3,
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    return OPTForCausalLM(config)


def recurrent_gemma():
    config = RecurrentGemmaConfig(
        **{**GROUPED, "num_hidden_layers": 3, "initializer_range": 0.3},
        lru_width=16,
        head_dim=8,
        attention_window_size=8,
        block_types=["recurrent", "recurrent", "attention"],
    )
    return RecurrentGemmaForCausalLM(config)


def falcon():
    config = FalconConfig(**WIDE, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    return FalconForCausalLM(config)


def mpt():
    return MptForCausalLM(MptConfig(**WIDE, d_model=16, n_layers=2, n_heads=2, max_seq_len=32))


FAMILIES = {
    "opt": opt,
    "bloom": bloom,
    "falcon": falcon,
    "mpt": mpt,
    "mamba": mamba,
    "recurrent_gemma": recurrent_gemma,
    "qwen3_moe": qwen3_moe,
}


def built(family: str) -> nn.Module:
    """A model of ``family`` in evaluation mode, float32, always the same one."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return FAMILIES[family]().float().eval()
