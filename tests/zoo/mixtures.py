"""Tiny mixtures of experts in float64, for comparisons with exact results."""

from __future__ import annotations

import torch
from torch import nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)


def mixture(family: str, experts: int = 4, each: int = 2, inner: int = 5) -> nn.Module:
    """A mixture whose router is undecided enough to use every expert.

    Args:
        each: experts of a position.
        inner: inner width of each expert.
    """
    sizes = {"hidden_size": 6, "num_hidden_layers": 2, "vocab_size": 17}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
    build, config = {
        "mixtral": (MixtralForCausalLM, MixtralConfig),
        "gpt_oss": (GptOssForCausalLM, GptOssConfig),
        "qwen3_moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig),
    }[family]
    counts = {"num_experts": experts} if family == "qwen3_moe" else {"num_local_experts": experts}
    width = "moe_intermediate_size" if family == "qwen3_moe" else "intermediate_size"
    settings = {**sizes, **heads, **counts, width: inner, "num_experts_per_tok": each}
    model = build(config(**settings))
    model = model.double().eval()
    model.set_experts_implementation("eager")  # the library's other ones have no float64
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.01 if "router.bias" in name else 0.5)
    return model
