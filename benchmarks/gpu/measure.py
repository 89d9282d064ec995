"""One line of JSON for each finished measurement, with the machine and the commit."""

from __future__ import annotations

import argparse
import platform
import subprocess
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.experiments.lab.pieces import Piece, run
from benchmarks.experiments.lab.records import Record, read, write
from kfade.errors import InputError
from kfade.runtime.provenance import git_sha, versions
from kfade.runtime.stages import Clock

FAILURES = (RuntimeError, MemoryError, InputError, SystemExit, subprocess.TimeoutExpired)


def measure(pieces: Iterable[Piece], given: argparse.Namespace) -> dict[str, Record]:
    """Run the pieces that are not in ``given.out`` yet, until ``given.minutes`` are over.

    A measurement that fails (mostly for memory) is a record with a ``failure``.

    Returns:
        All records so far, by name.

    Raises:
        SystemExit: the file has records of another machine, or of other sizes.
    """
    path = given.out / f"{given.piece}.jsonl"
    facts = machine(given)
    results = read(path) or {"machine": facts}
    if results["machine"] != facts:
        raise SystemExit(f"{path} is of {results['machine']}, this is {facts}: give --out DIR")
    commit = given.commit or git_sha()
    attempts = ((name, partial(attempt, compute, commit)) for name, compute in pieces)
    every = {"only": ["*"], "skip": [], "list": False, "pace": 1.0}
    given.out.mkdir(parents=True, exist_ok=True)
    write(path, results)
    run(attempts, results, argparse.Namespace(**every, results=path, minutes=given.minutes))
    return results


def machine(given: argparse.Namespace) -> Record:
    """The card, its driver, and the versions that the numbers depend on."""
    device = torch.device(given.device)
    is_cuda = device.type == "cuda"
    card = torch.cuda.get_device_name(device) if is_cuda else platform.processor() or "CPU"
    return {"card": card, "driver": driver() if is_cuda else None, "tiny": given.tiny, **versions()}


def driver() -> str | None:
    """The version of the NVIDIA driver."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip().partition("\n")[0] or None


def attempt(compute: Callable[[], Record], commit: str | None) -> Record:
    """What was measured, or why it failed."""
    try:
        record = compute()
    except FAILURES as error:
        record = {"failure": str(error)[-2000:]}
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {**record, "commit": commit}


def synchronise(device: str) -> None:
    """Wait until the device has done its work."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def clocked(clock: Clock) -> dict[str, Any]:
    """Seconds and peak bytes by stage."""
    return {"seconds": clock.seconds, "peak_bytes": clock.peak_bytes}


def folder_of(given: argparse.Namespace, name: str) -> Path:
    """A folder in ``given.out`` for files that are kept between calls."""
    path: Path = given.out / name
    path.mkdir(parents=True, exist_ok=True)
    return path
