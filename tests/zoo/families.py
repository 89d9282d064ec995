"""Tiny random models of every family that kfade must handle, and random token sequences.

Every model has two blocks, a vocabulary of 37 and weights large enough that its outputs are far
from uniform and its soft caps and windows matter; biases are random, since a fresh one is zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from kfade.data.sequences import TokenSequence

VOCABULARY = 37
WIDTH = 16
INNER = 24
BLOCKS = 2
WINDOW = 32  # the longest input
SLIDING = 5  # Mistral's and Gemma's sliding window, shorter than most sequences here

SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 2,
    "max_position_embeddings": WINDOW,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**SHAPE, "num_key_value_heads": 1}
GATED = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@dataclass(frozen=True)
class Family:
    """A model family: how to build a tiny one, and what kfade must find in it."""

    build: Callable[[], nn.Module]
    blocks: str
    """Name of the list of decoder blocks."""
    suffixes: tuple[str, ...]
    """The feed-forward linear maps of a block, in the order of the forward pass."""
    biases: bool = False
    transposed: bool = False
    """Weights are stored as [I, O] (Conv1D)."""

    @property
    def weights(self) -> list[str]:
        """Parameter names of all targets, in order."""
        return [f"{self.blocks}.{i}.{s}.weight" for i in range(BLOCKS) for s in self.suffixes]


FAMILIES = {
    "llama": Family(lambda: LlamaForCausalLM(LlamaConfig(**GROUPED)), "model.layers", GATED),
    "mistral": Family(
        lambda: MistralForCausalLM(MistralConfig(**GROUPED, head_dim=8, sliding_window=SLIDING)),
        "model.layers",
        GATED,
    ),
    "qwen2": Family(lambda: Qwen2ForCausalLM(Qwen2Config(**GROUPED)), "model.layers", GATED),
    "qwen3": Family(
        lambda: Qwen3ForCausalLM(Qwen3Config(**GROUPED, head_dim=8)), "model.layers", GATED
    ),
    "gemma2": Family(
        lambda: Gemma2ForCausalLM(
            Gemma2Config(
                **GROUPED,
                head_dim=8,
                sliding_window=SLIDING,
                query_pre_attn_scalar=8,
                attn_logit_softcapping=1.0,
                final_logit_softcapping=2.0,
            )
        ),
        "model.layers",
        GATED,
    ),
    "gemma3": Family(
        lambda: Gemma3ForCausalLM(
            Gemma3TextConfig(
                **GROUPED,
                head_dim=8,
                sliding_window=SLIDING,
                query_pre_attn_scalar=8,
                layer_types=["sliding_attention", "full_attention"],
            )
        ),
        "model.layers",
        GATED,
    ),
    "phi": Family(
        lambda: PhiForCausalLM(PhiConfig(**SHAPE, partial_rotary_factor=0.5)),
        "model.layers",
        ("mlp.fc1", "mlp.fc2"),
        biases=True,
    ),
    "gpt_neox": Family(
        lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE)),
        "gpt_neox.layers",
        ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        biases=True,
    ),
    "gpt2": Family(
        lambda: GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY,
                n_positions=WINDOW,
                n_embd=WIDTH,
                n_inner=INNER,
                n_layer=BLOCKS,
                n_head=2,
                initializer_range=0.3,
                bos_token_id=1,
                eos_token_id=2,
            )
        ),
        "transformer.h",
        ("mlp.c_fc", "mlp.c_proj"),
        biases=True,
        transposed=True,
    ),
}


def tiny(family: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """A tiny model of ``family`` in evaluation mode, the same one for one seed."""
    with torch.random.fork_rng(), torch.device("cpu"):  # the same weights on every device
        torch.manual_seed(seed)
        model = FAMILIES[family].build()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.2)
    return model.to(dtype).to(torch.get_default_device()).eval()


class Double(TorchFunctionMode):
    """float64 throughout: where a model asks for float32 (norms, softmax), it gets float64.

    Without it every norm rounds to float32, and nothing could be compared more closely than 1e-6.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = [torch.float64 if arg is torch.float32 else arg for arg in args]
        kwargs = {
            key: torch.float64 if value is torch.float32 else value
            for key, value in (kwargs or {}).items()
        }
        return func(*args, **kwargs)


def sequences(lengths: tuple[int, ...], seed: int = 0, prompt: int = 0) -> list[TokenSequence]:
    """Random tokens (none of them special); the first ``prompt`` tokens of each are not scored."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length in lengths:
        tokens = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        made.append(TokenSequence(tuple(tokens), tuple(t >= max(prompt, 1) for t in range(length))))
    return made
