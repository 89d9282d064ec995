"""Models and sequences for the tests of plans."""

from __future__ import annotations

import pytest
import torch
from torch.torch_version import TorchVersion
from transformers import LlamaConfig, LlamaForCausalLM

from kfade.data.sequences import TokenSequence

LLAMA_7B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    vocab_size=32000,
    dtype="bfloat16",
)
LLAMA_70B = LlamaConfig(
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    vocab_size=32000,
    dtype="bfloat16",
)
SMALL = LlamaConfig(  # wide enough that products are cut into panels and headers are small
    hidden_size=64,
    intermediate_size=224,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=50,
    max_position_embeddings=64,
    initializer_range=0.3,
)


def saved(config, folder) -> str:
    config.save_pretrained(folder)
    return str(folder)


def small(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(SMALL).to(dtype).eval()


def packed(count: int, length: int) -> list[TokenSequence]:
    """Sequences of one length, every token scored."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 50, (count, length), generator=generator).tolist()
    return [TokenSequence(tuple(row), (False, *[True] * (length - 1))) for row in tokens]


# What is held and counted depends on the kernel: up to torch 2.8 the CPU's fused attention
# knows no grouped queries, so that keys are repeated or scores are kept.
grouped = pytest.mark.skipif(
    TorchVersion(torch.__version__) < "2.10", reason="torch has no fused grouped queries on the CPU"
)
