"""A large random model through ``fit``, ``unlearn`` and ``apply`` within a memory.

    python benchmarks/large_model.py --cache DIR [--layers 32] [--tiny]

The model is a Llama with random weights in bfloat16, 0.95 billion of them with 32 layers. All its
feed-forward weights are changed. Each command gets --memory of twice the model's bytes plus 2 GB.
The result is the resident peak of each process and of each of its stages, beside that limit. A
random model knows nothing, so its losses mean nothing; bytes and seconds are those of any weights.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

RESULTS = Path(__file__).parent / "results" / "large_model.jsonl"
WORDS = 512


def build(folder: Path, layers: int, tiny: bool) -> int:
    """Write the model and a tokenizer of whole words; returns the model's bytes."""
    width, inner, vocabulary = (64, 128, 1024) if tiny else (1536, 3072, 128_000)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=width // 64 if not tiny else 4,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
        max_position_embeddings=512,
        dtype="bfloat16",
    )
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    words = {f"w{number}": number for number in range(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="w1", pad_token="w1"
    ).save_pretrained(folder)
    return sum(p.numel() * p.element_size() for p in model.parameters())


def texts(path: Path, count: int, length: int, seed: int) -> str:
    """Write ``count`` random texts of ``length`` words each."""
    draw = random.Random(seed)
    rows = (
        {"text": " ".join(f"w{draw.randrange(WORDS)}" for _ in range(length))} for _ in range(count)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(arguments: list[str]) -> dict[str, Any]:
    """A command's result, its seconds, and the resident peak of its process."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "kfade", *arguments, "--json"], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    process.stdout.close()
    if status:
        raise SystemExit(f"kfade {arguments[0]} failed")
    unit = 1 if sys.platform == "darwin" else 1024
    found = {"seconds": time.perf_counter() - start, "resident_peak": used.ru_maxrss * unit}
    return {**found, "result": json.loads(printed)}


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--cache", type=Path, required=True, help="folder for the model and runs")
    options.add_argument("--layers", type=int, default=32)
    options.add_argument("--sequences", type=int, default=8, help="of 256 tokens, to fit on")
    options.add_argument("--tiny", action="store_true", help="a tiny model, to try the script")
    given = options.parse_args()
    root: Path = given.cache
    root.mkdir(parents=True, exist_ok=True)
    size = build(root / "model", given.layers, given.tiny)
    limit = 2 * size + 2 * 10**9
    retain = texts(root / "retain.jsonl", given.sequences + 2, 255, seed=0)
    forget = texts(root / "forget.jsonl", 4, 255, seed=1)
    shared = ["--memory", f"{limit}", "--no-pack", "--batch-tokens", "512", "--holdout", "2"]
    model = str(root / "model")
    commands = {
        "unlearn": [
            "unlearn",
            model,
            "--forget",
            forget,
            "--retain",
            retain,
            *shared,
            "--kl",
            "0.01",
            "--quality",
            "fast",
        ],
        "apply": ["apply", model, str(root / "unlearn")],
    }
    record = {"name": "large model", "layers": given.layers, "model_bytes": size, "limit": limit}
    for name, arguments in commands.items():
        out = root / name
        shutil.rmtree(out, ignore_errors=True)
        found = run([*arguments, "--out", str(out)])
        result = found.pop("result")
        # Stages reset the process's own peak when they begin, so each has one of its own.
        peak = max([found["resident_peak"], *result.get("peak_bytes_by_stage", {}).values()])
        found["resident_peak"], over = peak, peak / limit
        stages = {k: result[k] for k in ("peak_bytes_by_stage", "seconds") if k in result}
        record[name] = {**found, **{f"{k}_of_stages": v for k, v in stages.items()}}
        print(
            f"{name}: {found['seconds']:.0f} s, peak {peak / 1e9:.2f} GB, {over:.2f} of the limit"
        )
    if not given.tiny:
        with RESULTS.open("a") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
