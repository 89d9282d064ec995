"""Results as JSON lines, tables in Markdown, and commands timed in processes of their own."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parents[2]
RESULTS, DOCS = BENCHMARKS / "results", BENCHMARKS.parent / "docs"
NOT_RUN = "not run"
Record = dict[str, Any]


def read(path: Path) -> dict[str, Record]:
    """Records by name, in the order of the file; none if there is no file."""
    if not path.is_file():
        return {}
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {record.pop("name"): record for record in records}


def read_seeds(folder: Path, name: str) -> dict[int, dict[str, Record]]:
    """Records of each seed, from ``NAME_seedN.jsonl``."""
    found = folder.glob(f"{name}_seed*.jsonl")
    return {int(path.stem.removeprefix(f"{name}_seed")): read(path) for path in sorted(found)}


def write(path: Path, records: Mapping[str, Record]) -> None:
    """Write one line for each record. The file is whole at any time."""
    lines = (
        json.dumps({"name": name, **record}, separators=(",", ":")) + "\n"
        for name, record in records.items()
    )
    part = path.with_suffix(".part")
    part.write_text("".join(lines), encoding="utf-8")
    os.replace(part, path)


def table(heading: str, rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table. ``heading``: the names of the columns, separated by `` | ``."""
    columns = heading.split(" | ")
    lines = [columns, ["---"] * len(columns)]
    lines += list(rows) or [[NOT_RUN] + [""] * (len(columns) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float | None, spec: str = ".3g") -> str:
    """The formatted value, or *not run*."""
    return NOT_RUN if value is None else format(value, spec)


def median(values: Sequence[float], digits: int) -> str:
    """Median, and the range if there are several values."""
    shown = f"{statistics.median(values):.{digits}f}"
    if len(values) > 1:
        shown += f" ({min(values):.{digits}f}–{max(values):.{digits}f})"
    return shown


def timed(command: Sequence[str]) -> tuple[float, str]:
    """Run a command in a process of its own: its seconds and what it printed.

    Raises:
        SystemExit: the command failed; the message holds the end of its error output.
    """
    paths = [str(BENCHMARKS.parent / "src"), os.environ.get("PYTHONPATH")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment["HF_HUB_OFFLINE"] = "1"
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return time.perf_counter() - start, done.stdout
