"""kfade's EK-FAC fit beside other libraries', on the same random weights, tokens and card.

The model is that of ``llama_fit``. Each measurement is a process of its own
(``benchmarks/peers/worker.py``): covariances, eigendecompositions and Λ of one block, then of four.
curvlinops works in float32 only, so kfade and kronfluence are measured in float32 too.
``--python`` is an interpreter that has the peers; by default it is this one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from benchmarks.experiments.lab.pieces import Piece
from benchmarks.experiments.lab.records import BENCHMARKS, Record, number, table, timed
from benchmarks.gpu.llama_fit import SMALL, Sizes, zipf_rows
from benchmarks.gpu.measure import folder_of, measure

RUNS = (
    # (peer, dtype, blocks, sequences, sequences in a batch)
    ("kfade", "bfloat16", "3", 64, 8),
    ("kronfluence", "bfloat16", "3", 64, 1),
    ("kronfluence", "bfloat16", "3", 64, 8),
    ("kfade", "float32", "3", 16, 2),
    ("kronfluence", "float32", "3", 16, 1),
    ("curvlinops", "float32", "3", 16, 1),
    ("kfade", "bfloat16", "3-6", 128, 8),
    ("kronfluence", "bfloat16", "3-6", 128, 8),
)
STAGES = ("covariance", "eigh", "lambda", "total")


def main(given: argparse.Namespace) -> str:
    return shown(measure(pieces(given), given))


def pieces(given: argparse.Namespace) -> Iterator[Piece]:
    sizes = SMALL if given.tiny else Sizes()
    folder = folder_of(given, "peers-tiny" if given.tiny else "peers")
    write_inputs(sizes, folder)
    for peer, dtype, layers, sequences, batch in RUNS:
        count, name = min(sequences, sizes.sequences), f"{peer}, {dtype}, blocks {layers}"
        options = {"peer": peer, "dtype": dtype, "layers": layers, "sequences": count}
        options |= {"batch": batch, "length": sizes.length, "device": given.device}
        yield f"{name}, {batch} a batch", partial(fitted, given, folder, options)


def write_inputs(sizes: Sizes, folder: Path) -> None:
    """The model's configuration, whose weights are drawn by each process, and the tokens."""
    LlamaConfig(**sizes.config, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    rows = zipf_rows(sizes.sequences, sizes.length, sizes.config["vocab_size"])
    tokens = folder.parent / f"{folder.name}-tokens.safetensors"
    save_file({"tokens": torch.tensor(rows)}, tokens)


def fitted(given: argparse.Namespace, folder: Path, options: dict[str, Any]) -> Record:
    """What the process of one library printed."""
    tokens = folder.parent / f"{folder.name}-tokens.safetensors"
    words = ["--job", "ekfac", "--model", str(folder), "--tokens", str(tokens)]
    words += [word for key, value in options.items() for word in (f"--{key}", str(value))]
    worker = str(BENCHMARKS / "peers" / "worker.py")
    _, printed = timed([given.python or sys.executable, worker, *words])
    found: Record = json.loads(printed.splitlines()[-1])
    return found


def shown(results: dict[str, Record]) -> str:
    """One row for each measurement."""
    rows = []
    for name, told in results.items():
        if "seconds" in told:
            seconds = [number(told["seconds"][stage]) for stage in STAGES]
            peak = number(told["peak_bytes"]["total"] / 1e9)
            rows.append([name, *seconds, number(1e6 * told["seconds"]["total"] / told["tokens"])])
            rows[-1].append(peak)
        elif "cannot" in told or "failure" in told:
            reason = told.get("cannot") or told["failure"].strip().splitlines()[-1]
            rows.append([name, reason, "", "", "", "", ""])
    heads = "library | covariances, s | eigh, s | Λ, s | total, s | total, µs/token | peak, GB"
    return table(heads, rows)
