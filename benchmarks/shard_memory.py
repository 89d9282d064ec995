"""How much host memory does each of several processes take to load a model with --shard?

    python benchmarks/shard_memory.py [--processes 4] [--blocks 16] [--width 512]

A Llama whose random weights are stored in float32 is loaded in float32 and in bfloat16, whole and
in parts, by processes that start at the same time (gloo, Linux). Reported for each process: the
megabytes that loading has added in pages of files, which the processes of one machine share, and in
memory of its own; and the peak of both until after a forward pass. The allocator is told to return
large pieces to the system (MALLOC_MMAP_THRESHOLD_): glibc otherwise keeps the weights of gathered
blocks. Writes ``benchmarks/results/shard_memory.jsonl`` and prints it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from itertools import product
from pathlib import Path

import torch
from experiments.lab.records import RESULTS, write

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from processes import run_together
from transformers import LlamaConfig, LlamaForCausalLM

from kfade.models.head import body_of, hidden_states, trial_tokens
from kfade.models.layers import decoder_blocks
from kfade.models.load import load_model
from kfade.runtime import distributed

FILE = RESULTS / "shard_memory.jsonl"


def memory() -> dict[str, float]:
    """Megabytes of this process in memory: pages of files, its own, and the peak of both."""
    names = {"RssFile": "files", "RssAnon": "own", "VmHWM": "peak"}
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    return {names[n[:-1]]: int(kb[0]) / 1024 for n, *kb in lines if n[:-1] in names}


def measure(folder: Path, dtype: str, shard: bool) -> None:
    """Load in one of the processes and write what it took."""

    def divide(model: torch.nn.Module) -> None:
        distributed.shard(body_of(model), decoder_blocks(model)[1])

    with distributed.processes():
        before = memory()
        options = {"needs_tokenizer": False, "divide": divide if shard else None, "dtype": dtype}
        model, _ = load_model(str(folder / "model"), device="cpu", **options)
        loaded = memory()
        with torch.no_grad():
            hidden_states(model, trial_tokens(model, 8))
        found = {name: round(loaded[name] - before[name]) for name in ("files", "own")}
        found["peak"] = round(memory()["peak"] - before["files"] - before["own"])
        (folder / f"{dtype}-{shard}-{distributed.rank()}.json").write_text(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("--processes", 4), ("--blocks", 16), ("--width", 512)):
        parser.add_argument(name, type=int, default=value)
    given = parser.parse_args()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**20)
    shape = {"hidden_size": given.width, "intermediate_size": 3 * given.width, "vocab_size": 4096}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=given.blocks, **shape, **heads))
        model.save_pretrained(folder / "model")
        total = sum(p.numel() for p in model.parameters()) * 4 / 2**20
        block = sum(p.numel() for p in model.model.layers[0].parameters()) * 4 / 2**20
        sizes = {"model_mb": round(total), "block_mb": round(block)}
        records = {}
        for dtype, shard in product(("float32", "bfloat16"), (False, True)):
            said = folder / f"said-{dtype}-{shard}"
            run_together(given.processes, measure, folder, dtype, shard, said=said)
            for rank in range(given.processes):
                found = json.loads((folder / f"{dtype}-{shard}-{rank}.json").read_text())
                records[f"{dtype}, {'in parts' if shard else 'whole'}, process {rank}"] = {
                    **sizes,
                    **found,
                }
    write(FILE, records)
    for name, record in records.items():
        print(name, record)


if __name__ == "__main__":
    main()
