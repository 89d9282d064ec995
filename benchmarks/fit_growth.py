"""How the cost of an EK-FAC fit grows with tokens, layers and width, and where its time goes.

    python benchmarks/fit_growth.py

Llamas of random weights in the shape of SmolLM2-135M (width 576, 1536 in the feed-forward blocks,
a vocabulary of 49,152), 8 blocks of it, sequences of 512 random tokens one at a time, float32. One
of the three is varied at a time, with all feed-forward weights as targets. The profile is of one
sequence. Writes ``benchmarks/results/fit_growth.jsonl`` and ``docs/images/fit_growth.svg``, and
prints the profile. ``--draw`` draws the figure from the results and measures nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from experiments.lab.figures import draw_growth
from experiments.lab.records import DOCS, RESULTS, Record, read, table, write
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

import kfade
from kfade.data.batches import make_batches
from kfade.data.sequences import TokenSequence
from kfade.runtime.stages import Clock, timing

FILE, IMAGE = RESULTS / "fit_growth.jsonl", DOCS / "images" / "fit_growth.svg"
LENGTH, VOCABULARY = 512, 49_152
STAGES = ("covariance", "eigh", "lambda")
BASE = {"sequences": 2, "blocks": 8, "width": 576}
CURVES = {"sequences": (1, 2, 4, 8), "blocks": (4, 8, 16, 30), "width": (288, 576, 1152)}
LISTED = 12  # operations in the profile


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--draw", action="store_true", help="draw the figure from the results")
    if not options.parse_args().draw:
        write(FILE, measure())
    draw(FILE, IMAGE)
    rows = [
        [row["name"], f"{row['share']:.1%}", str(row["calls"])]
        for row in read(FILE)["profile"]["rows"]
    ]
    print(table("operation | share of the time | calls", rows))


def measure() -> dict[str, Record]:
    """The base point, the rows of each curve, and the profile."""
    torch.set_num_threads(2)
    results: dict[str, Record] = {"base": BASE}
    for varied, values in CURVES.items():
        rows = []
        for value in values:
            rows.append({varied: value, **measured(**{**BASE, varied: value})})
            print(rows[-1], flush=True)
        results[varied] = {"rows": rows}
    return {**results, "profile": {"rows": operations()}}


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


def draw(results: Path, image: Path) -> None:
    """The figure from a file of results."""
    found = read(results)
    draw_growth({varied: found[varied]["rows"] for varied in CURVES}, STAGES, LENGTH, image)


if __name__ == "__main__":
    main()
