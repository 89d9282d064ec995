"""How much host memory do several processes take to load and change a model with --shard?

    python benchmarks/shard_memory.py [--processes 4] [--blocks 16] [--width 512]

A Llama whose random weights are stored in float32 is loaded in float32 and in bfloat16, whole and
in parts, by processes that start at the same time (gloo, Linux). Reported for each process: the
megabytes that loading has added in pages of files, which the processes of one machine share, and in
memory of its own; and the peak of both until after a forward pass. In float32 one step of
unlearning follows, all feed-forward weights, with the curvature on disk. Reported of it: the peak
of a process beyond the loaded model, and its part of one vector. The allocator is told to return
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
from typing import Any

import torch
from experiments.lab.records import RESULTS, write

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from processes import run_together
from transformers import LlamaConfig, LlamaForCausalLM

import kfade
from kfade.curvature.estimators import KFAC
from kfade.curvature.store import Store
from kfade.data.sequences import TokenSequence
from kfade.method.settings import Correction, Run
from kfade.method.size import StepSize
from kfade.models.head import body_of, hidden_states, trial_tokens
from kfade.models.layers import decoder_blocks, find_targets
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
        if dtype == "float32":
            found |= unlearnt(model, folder / f"curvature-{shard}", shard)
        (folder / f"{dtype}-{shard}-{distributed.rank()}.json").write_text(json.dumps(found))


def unlearnt(model: Any, folder: Path, shard: bool) -> dict[str, int]:
    """Megabytes of one step: the most beyond the loaded model, and this process's part of one
    vector."""
    if distributed.rank() == 0:
        folder.mkdir()
    distributed.barrier()
    targets = find_targets(model)
    memory_of_fit = max(KFAC().peak_bytes([target]) for target in targets)
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(0, 4096, (32,), generator=generator).tolist() for _ in range(24)]
    sequences = [TokenSequence(tuple(ids), (False,) + (True,) * 31) for ids in texts]
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory()
    kfade.unlearn(
        model,
        forget=sequences[:8],
        retain=sequences[8:16],
        held_out=sequences[16:],
        fit=KFAC(),
        size=StepSize(alpha=0.01),
        run=Run(
            steps=1,
            correction=Correction(count=0),
            batch_tokens=64,
            memory=2 * memory_of_fit,
            store=lambda model, targets: Store(folder),
        ),
    )
    vector = sum(target.shape[0] * target.shape[1] * 4 for target in targets) / 2**20
    step = memory()["peak"] - before["files"] - before["own"]
    return {"unlearn": round(step), "vector": round(vector / (distributed.count() if shard else 1))}


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
