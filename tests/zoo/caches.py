"""Tiny models that keep other states than a Llama's cache, or none, and what may share a batch."""

from __future__ import annotations

from transformers import (
    BloomConfig,
    BloomForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

from zoo.families import VOCABULARY, WIDTH, WINDOW

SMALL = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2}
OTHERS = {  # model, and which prompts may share a batch
    "a state that is masked": (
        lambda: MambaForCausalLM(MambaConfig(**SMALL, state_size=4, initializer_range=0.3)),
        "any",
    ),
    "a state that sees padding": (
        lambda: RecurrentGemmaForCausalLM(
            RecurrentGemmaConfig(
                **{**SMALL, "num_hidden_layers": 3},
                num_attention_heads=2,
                head_dim=8,
                intermediate_size=24,
                lru_width=WIDTH,
                attention_window_size=WINDOW,
                logits_soft_cap=1e6,
            )
        ),
        "equal",
    ),
    "a cache that mixes rows": (
        lambda: RwkvForCausalLM(RwkvConfig(**SMALL, attention_hidden_size=WIDTH)),
        "none",
    ),
    "alibi": (
        lambda: BloomForCausalLM(BloomConfig(**SMALL, n_head=2, initializer_range=0.3)),
        "any",
    ),
    "no cache": (
        lambda: OpenAIGPTLMHeadModel(
            OpenAIGPTConfig(
                vocab_size=VOCABULARY,
                n_embd=WIDTH,
                n_layer=2,
                n_head=2,
                n_positions=64,
                initializer_range=0.3,
            )
        ),
        "any",
    ),
}
