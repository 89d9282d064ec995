"""TOFU at its full size and Topic-small with real weights, over three seeds.

Each run is a script of ``benchmarks/experiments`` in a process of its own, which keeps every result
in a file of its own. The first TOFU run tunes; those of other seeds take its settings.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.experiments.lab.records import BENCHMARKS, write
from benchmarks.experiments.topic_data import SUBJECTS
from benchmarks.gpu.measure import machine

EXPERIMENTS = BENCHMARKS / "experiments"
SEEDS = (0, 1, 2)
SPLITS = ("forget10", "forget05")
BATCH_TOKENS = 16384  # positions in one forward pass: 20 GB of activations of SmolLM2-135M
TINY_TOFU = (
    *("--authors", "12", "--questions", "8", "--utility", "6", "--train-batch", "8"),
    *("--rate", "5e-3", "--epochs", "12", "--steps", "6", "--every", "2", "--batch", "4"),
)
TINY_TOPIC = (
    *("--skip", "*band*"),  # the tiny model has fewer blocks
    *("--tune-questions", "6", "--questions", "24", "--passages", "8", "--held-out", "4"),
    *("--tokens", "16", "--completions", "4", "--steps", "4", "--lost", "0.3"),
)
Run = tuple[str, list[str]]
"""(name of its file, command)."""


def main(given: argparse.Namespace) -> str:
    if given.data is None or given.model is None:
        raise SystemExit(f"{given.piece} needs --data DIR and --model FILE")
    given.out.mkdir(parents=True, exist_ok=True)
    facts = {**machine(given), "batch_tokens": BATCH_TOKENS, "commit": given.commit}
    write(given.out / f"{given.piece}.jsonl", {"machine": facts})
    end = time.perf_counter() + 60 * given.minutes
    runs = tofu_runs(given) if given.piece == "tofu" else topic_runs(given)
    for name, command in runs:
        left = (end - time.perf_counter()) / 60
        if left < 0:
            break
        print(f"{name}: {left:.1f} minutes left", flush=True)
        run(["--results", str(given.out / f"{name}.jsonl"), "--minutes", f"{left}"], command)
        if time.perf_counter() < end:
            free(cache_of(given))
    page = [sys.executable, str(EXPERIMENTS / "seeds_page.py"), str(given.out)]
    return subprocess.run(
        page, env=environment(), capture_output=True, text=True, check=True
    ).stdout


def run(options: list[str], command: list[str]) -> None:
    """Run a script; what it prints is shown.

    Raises:
        SystemExit: it failed.
    """
    done = subprocess.run([sys.executable, *command, *options], env=environment(), check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}")


def free(cache: Path) -> None:
    """Remove the fits and updates of a finished run, about 13 GB; all its results are kept."""
    for pattern in ("**/fit-*", "**/updates"):
        for folder in list(cache.glob(pattern)):
            shutil.rmtree(folder)


def environment() -> dict[str, str]:
    """Of the scripts: kfade's source, and the size of a pass."""
    paths = [str(BENCHMARKS.parent / "src"), os.environ.get("PYTHONPATH")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "KFADE_BATCH_TOKENS": str(BATCH_TOKENS),
        "HF_HUB_OFFLINE": "1",
    }


def tofu_runs(given: argparse.Namespace) -> Iterator[Run]:
    """The first seed of each split, then the others with its settings."""
    splits = ("forget01",) if given.tiny else SPLITS
    for seed in SEEDS[:2] if given.tiny else SEEDS:
        for split in splits:
            options = ["--split", split, *(TINY_TOFU if given.tiny else ())]
            if seed != SEEDS[0]:
                options += ["--tuned", str(given.out / f"tofu_{split}_seed{SEEDS[0]}.jsonl")]
            yield f"tofu_{split}_seed{seed}", script("tofu_whole.py", given, seed, options)


def topic_runs(given: argparse.Namespace) -> Iterator[Run]:
    for seed in SEEDS[:2] if given.tiny else SEEDS:
        for subject in SUBJECTS[:1] if given.tiny else SUBJECTS:
            options = ["--subject", subject, *(TINY_TOPIC if given.tiny else ())]
            yield f"topic_{subject}_seed{seed}", script("topic_small.py", given, seed, options)


def script(name: str, given: argparse.Namespace, seed: int, options: list[str]) -> list[str]:
    """The command of a run without its results and minutes."""
    places = {"data": given.data, "model": given.model, "cache": cache_of(given)}
    words = [word for key, value in places.items() for word in (f"--{key}", str(value))]
    words += ["--device", given.device, "--seed", str(seed)]
    return [str(EXPERIMENTS / name), *words, *options]


def cache_of(given: argparse.Namespace) -> Path:
    """Models and fits, which are kept on the machine only."""
    return Path(given.out) / "cache"
