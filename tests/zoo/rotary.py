"""Tiny models whose rotary frequencies follow the length of the input."""

from __future__ import annotations

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from zoo.families import GROUPED, SLIDING, WIDTH

TRAINED = 16
HALF = WIDTH // 2 // 2  # frequencies of a head
LONG = {"short_factor": [1.0] * HALF, "long_factor": [8.0] * HALF}


def tiny(build) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return build().eval()


def llama(window: int = 64, **rope):
    shape = {**GROUPED, "max_position_embeddings": window}
    return tiny(lambda: LlamaForCausalLM(LlamaConfig(**shape, rope_parameters=rope)))


def dynamic(window: int = TRAINED):
    return llama(window, rope_type="dynamic", factor=8.0, rope_theta=10.0)


def longrope(**more):
    rope = {"rope_type": "longrope", "rope_theta": 100.0, **LONG, **more}
    return llama(original_max_position_embeddings=TRAINED, **rope)


def phi3():
    shape = {**GROUPED, "max_position_embeddings": 64, "num_key_value_heads": 2}
    rope = {"type": "longrope", "rope_theta": 100.0, **LONG}
    return tiny(
        lambda: Phi3ForCausalLM(
            Phi3Config(**shape, original_max_position_embeddings=TRAINED, rope_scaling=rope)
        )
    )


def gemma3(kind: str):
    scaled = {
        "dynamic": {"rope_type": "dynamic", "factor": 8.0, "rope_theta": 10.0},
        "longrope": {
            "rope_type": "longrope",
            "rope_theta": 100.0,
            "original_max_position_embeddings": TRAINED,
            **LONG,
        },
    }[kind]
    plain = {"rope_type": "default", "rope_theta": 10.0}
    shape = {**GROUPED, "max_position_embeddings": TRAINED if kind == "dynamic" else 64}
    return tiny(
        lambda: Gemma3ForCausalLM(
            Gemma3TextConfig(
                **shape,
                head_dim=8,
                query_pre_attn_scalar=8,
                sliding_window=SLIDING,
                layer_types=["sliding_attention", "full_attention"],
                rope_parameters={"sliding_attention": plain, "full_attention": scaled},
            )
        )
    )


def gemma3_longrope():
    if Version(transformers.__version__) < Version("5.21"):
        pytest.skip("transformers fails at a second long text of longrope by kinds of layers")
    return gemma3("longrope")


MODELS = {
    "dynamic": dynamic,
    "longrope": longrope,
    "longrope, attention factor": lambda: longrope(attention_factor=1.7),
    "phi3": phi3,
    "gemma3 dynamic": lambda: gemma3("dynamic"),
    "gemma3 longrope": gemma3_longrope,
}
