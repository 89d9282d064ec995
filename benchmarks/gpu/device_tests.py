"""The tests of numerics on the device: each test file in a process of its own.

``KFADE_TEST_DEVICE`` makes the device the default of everything that a test makes
(``tests/on_device.py``). Tests of the CPU's own memory are left out. A record counts outcomes and
names the tests that failed; what pytest printed is in ``DIR/tests/``.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.experiments.lab.pieces import Piece
from benchmarks.experiments.lab.records import BENCHMARKS, Record, number, table
from benchmarks.gpu.measure import folder_of, measure

TESTS = BENCHMARKS.parent / "tests"
ROOMS = ("curvature", "method", "models", "baselines", "evaluate", "export")
TINY = ("curvature/test_eigh.py", "curvature/test_bf16_fit.py")
LIMIT = 240  # seconds for one file
OUTCOME = re.compile(r"(\d+) (passed|failed|errors?|skipped|deselected)")


def main(given: argparse.Namespace) -> str:
    return shown(measure(pieces(given), given))


def pieces(given: argparse.Namespace) -> Iterator[Piece]:
    logs = folder_of(given, "tests")
    for path in files(tiny=given.tiny):
        name = str(path.relative_to(TESTS))
        yield name, partial(tested, path, given.device, logs / f"{path.stem}.txt")


def files(*, tiny: bool) -> list[Path]:
    """The test files, room by room."""
    if tiny:
        return [TESTS / name for name in TINY]
    return [path for room in ROOMS for path in sorted((TESTS / room).glob("test_*.py"))]


def tested(path: Path, device: str, log: Path) -> Record:
    """Counts of outcomes, and the tests that failed."""
    options = ["-m", "not slow and not cpu_only", "-p", "no:cacheprovider", "--color=no", "-rfE"]
    # The versions of a GPU machine may warn where those of the constraints do not.
    command = [sys.executable, "-m", "pytest", *options, "-W", "default", "--tb=short", str(path)]
    paths = [str(BENCHMARKS.parent / "src"), str(TESTS), os.environ.get("PYTHONPATH")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "KFADE_TEST_DEVICE": device,
        "HF_HUB_OFFLINE": "1",
    }
    with log.open("w") as output:
        done = subprocess.run(
            command,
            cwd=BENCHMARKS.parent,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=LIMIT,
            check=False,
        )
    return {"exit_code": done.returncode, **outcomes(log.read_text())}


def outcomes(text: str) -> Record:
    """What pytest's last lines say."""
    lines = text.splitlines()
    counts = {name: int(count) for count, name in OUTCOME.findall(lines[-1] if lines else "")}
    failed = [line.split(" ")[1] for line in lines if line.startswith(("FAILED ", "ERROR "))]
    return {"counts": counts, "failed": failed}


def shown(results: dict[str, Record]) -> str:
    """One row for each file."""
    kinds = ("passed", "failed", "skipped")
    rows = []
    for name, told in results.items():
        if "counts" in told:
            counts = [str(told["counts"].get(kind, 0)) for kind in kinds]
            rows.append([name, *counts, number(told["piece_seconds"])])
        elif "failure" in told:
            rows.append([name, told["failure"], "", "", number(told["piece_seconds"])])
    return table(f"file | {' | '.join(kinds)} | seconds", rows)
