"""What large models need: the plan of an unlearning step on devices of several sizes.

    python benchmarks/plan_sizes.py              # all models
    python benchmarks/plan_sizes.py gpt-oss-20b  # these, the rows of others are kept

Reads no weights: each model is its configuration. All feed-forward weights are changed, with EK-FAC
on 4000 x 512 tokens. For each device the first of these settings that fits is taken: as they are;
blocks run again in backward passes; a smaller batch; both. Mixtures of experts are planned on one
80 GB device and on eight: with 12,288 targets a trace takes minutes.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import (
    GptOssConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3MoeConfig,
)

from kfade.runs import PlanRequest, plan
from kfade.runs.config import EstimatorConfig, ModelSource
from kfade.runs.planning import AmountConfig, DeviceConfig
from kfade.runs.step_config import CorrectionAmount

RESULTS = Path(__file__).parent / "results" / "plan_sizes.jsonl"
BATCHES = (4096, 2048, 1024, 512)
SHOWN = ("fits", "groups", "offload", "recompute", "batch_tokens")
DEVICES = {
    "24 GiB": DeviceConfig(memory=["25.7GB"]),  # what such a card has
    "80 GB": DeviceConfig(memory=["80GB"]),
    "8 x 80 GB": DeviceConfig(memory=["80GB"], devices=8, shard=True),
}


def llama(width: int, inner: int, layers: int, heads: int) -> PreTrainedConfig:
    return LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        vocab_size=128_256,
        max_position_embeddings=8192,
        dtype="bfloat16",
    )


MODELS = {
    "Llama-3-8B": llama(4096, 14336, 32, 32),
    "Qwen2.5-14B": Qwen2Config(
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=48,
        num_attention_heads=40,
        num_key_value_heads=8,
        vocab_size=152_064,
        max_position_embeddings=32768,
        dtype="bfloat16",
    ),
    "Llama-3-70B": llama(8192, 28672, 80, 64),
    "gpt-oss-20b": GptOssConfig(
        hidden_size=2880,
        intermediate_size=2880,
        num_hidden_layers=24,
        num_local_experts=32,
        num_experts_per_tok=4,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=201_088,
        dtype="bfloat16",
    ),
    "Qwen3-30B-A3B": Qwen3MoeConfig(
        hidden_size=2048,
        moe_intermediate_size=768,
        intermediate_size=6144,
        num_hidden_layers=48,
        num_experts=128,
        num_experts_per_tok=8,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        vocab_size=151_936,
        max_position_embeddings=32768,
        dtype="bfloat16",
    ),
}
MIXTURES = ("gpt-oss-20b", "Qwen3-30B-A3B")


def fitting(folder: str, device: DeviceConfig) -> dict[str, Any]:
    """The plan of the first settings that fit; of the last if none do."""
    found: dict[str, Any] = {}
    for batch in BATCHES:
        for recompute in (False, True):
            request = PlanRequest(
                ModelSource(folder),
                data=AmountConfig(batch_tokens=batch, steps=1),
                fit=EstimatorConfig(recompute=recompute),
                correction=CorrectionAmount(correct=0),
                device=replace(device),
            )
            found = plan(request)
            if found["problem"] is None and not found["over_memory"]:
                return {**found, "fits": True}
    return {**found, "fits": False}


def rows_of_others(names: list[str]) -> list[str]:
    """Rows of models that are not planned now, as they were."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return [line for line in lines if json.loads(line)["name"] not in names]


def main() -> None:
    names = sys.argv[1:] or list(MODELS)
    rows: list[str] = []
    with tempfile.TemporaryDirectory() as root:
        for name in names:
            MODELS[name].save_pretrained(f"{root}/{name}")
            for device, given in DEVICES.items():
                if name in MIXTURES and device == "24 GiB":
                    continue
                found = fitting(f"{root}/{name}", given)
                work = found["work"]
                record = {
                    "name": name,
                    "device": device,
                    "fits": found["fits"],
                    "groups": found["groups"],
                    "offload": found["offload"],
                    "recompute": work["recompute"],
                    "batch_tokens": work["batch_tokens"],
                    "problem": found["problem"],
                    "over_memory": found["over_memory"],
                    "bytes": found["bytes"],
                    "peak_bytes": found["peak_bytes"]["planned"],
                    "least_bytes": max(found["peak_bytes"]["smallest_groups"].values()),
                }
                rows.append(json.dumps(record))
                peaks = ", ".join(
                    f"{stage} {peak / 1e9:.1f}" for stage, peak in record["peak_bytes"].items()
                )
                print(name, "on", device, {k: v for k, v in record.items() if k in SHOWN}, peaks)
    RESULTS.write_text("\n".join([*rows_of_others(names), *rows]) + "\n")


if __name__ == "__main__":
    main()
