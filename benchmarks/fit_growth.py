"""How the cost of an EK-FAC fit grows with tokens, layers and width, and where its time goes.

    python benchmarks/fit_growth.py

Llamas of random weights in the shape of SmolLM2-135M (width 576, 1536 in the feed-forward blocks,
a vocabulary of 49,152), 8 blocks of it, sequences of 512 random tokens one at a time, float32. One
of the three is varied at a time, with all feed-forward weights as targets. The profile is of one
sequence. Writes ``benchmarks/results/fit_growth.json`` and ``docs/images/fit_growth.svg``, and
prints both as tables.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

import kfade
from kfade.data.batches import make_batches
from kfade.data.sequences import TokenSequence
from kfade.runtime.stages import Clock, timing

HERE = Path(__file__).parent
RESULT, PLOT = HERE / "results" / "fit_growth.json", HERE.parent / "docs/images/fit_growth.svg"
LENGTH, VOCABULARY = 512, 49_152
STAGES = ("covariance", "eigh", "lambda")
BASE = {"sequences": 2, "blocks": 8, "width": 576}
CURVES = {"sequences": (1, 2, 4, 8), "blocks": (4, 8, 16, 30), "width": (288, 576, 1152)}
LISTED = 12  # operations in the profile


def main() -> None:
    torch.set_num_threads(2)
    curves: dict[str, list[dict[str, Any]]] = {}
    for varied, values in CURVES.items():
        for value in values:
            point = {**BASE, varied: value}
            row = {varied: value, **measured(**point)}
            curves.setdefault(varied, []).append(row)
            print(row, flush=True)
    result = {"base": BASE, "curves": curves, "profile": operations()}
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(curves)
    print("| operation | share of the time | calls |\n| --- | --- | --- |")
    for row in result["profile"]:
        print(f"| {row['name']} | {row['share']:.1%} | {row['calls']} |")


def llama(blocks: int, width: int) -> LlamaForCausalLM:
    """Random weights; the shape of SmolLM2-135M at width 576."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=blocks,
        num_attention_heads=width // 64 if width % 192 == 0 else width // 32,
        num_key_value_heads=3,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def batches(sequences: int) -> list[kfade.data.batches.Batch]:
    """Sequences of random tokens, one a batch."""
    generator = torch.Generator().manual_seed(0)
    tokens_ST = torch.randint(0, VOCABULARY, (sequences, LENGTH), generator=generator)
    scored = (False,) + (True,) * (LENGTH - 1)
    return make_batches(
        [TokenSequence(tuple(row), scored) for row in tokens_ST.tolist()], budget=LENGTH
    )


def measured(sequences: int, blocks: int, width: int) -> dict[str, Any]:
    """Seconds by stage, after a fit that is not counted."""
    model = llama(blocks, width)
    targets = kfade.find_targets(model)
    kfade.EKFAC().fit(model, batches(1), targets[:3])
    clock = Clock()
    with timing(clock):
        kfade.EKFAC().fit(model, batches(sequences), targets)
    return {stage: clock.seconds[stage] for stage in STAGES}


def operations() -> list[dict[str, Any]]:
    """The operations that take most of a fit's own time, outside of decompositions."""
    model = llama(BASE["blocks"], BASE["width"])
    targets = kfade.find_targets(model)
    kfade.EKFAC().fit(model, batches(1), targets[:3])
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        kfade.EKFAC().fit(model, batches(BASE["sequences"]), targets)
    rows = sorted(seen.key_averages(), key=lambda row: -row.self_cpu_time_total)
    total = sum(row.self_cpu_time_total for row in rows)
    return [
        {"name": row.key, "share": row.self_cpu_time_total / total, "calls": row.count}
        for row in rows[:LISTED]
    ]


def draw(curves: dict[str, list[dict[str, Any]]]) -> None:
    """One panel a quantity, seconds of each stage, both axes logarithmic."""
    figure, axes = plt.subplots(1, len(curves), figsize=(10, 3.2), sharey=True)
    for axis, (varied, rows) in zip(axes, curves.items(), strict=True):
        values = [row[varied] * (LENGTH if varied == "sequences" else 1) for row in rows]
        for stage in STAGES:
            axis.plot(values, [row[stage] for row in rows], marker="o", label=stage)
        axis.set(xlabel="tokens" if varied == "sequences" else varied, xscale="log", yscale="log")
        axis.set_xticks(values, [str(value) for value in values])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("seconds")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(PLOT)
    plt.close(figure)


if __name__ == "__main__":
    main()
