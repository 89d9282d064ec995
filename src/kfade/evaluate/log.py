"""The log format of every evaluation: JSON lines, which can be resumed and which the report reads.

    {"format": "kfade-eval-1", "benchmark": "kl", ...}      what was measured, on what, how
    {"item": "0", ...}                                       one line an item, in the order measured
    {"aggregate": {...}}                                     last, when all items are there

An interrupted evaluation leaves a log without an aggregate. Opened again with the same header, it
is continued after the items that it has (``item_log``). An incomplete last line is dropped.

This file needs no torch, nor does the report.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, TypeVar

from kfade.data.rows import read_utf8
from kfade.errors import InputError

FORMAT = "kfade-eval-1"
T = TypeVar("T")


@dataclass(frozen=True)
class Evaluation:
    """What a log holds."""

    header: dict[str, Any]
    """``benchmark`` and all settings that decide the numbers."""
    items: dict[str, dict[str, Any]]
    """Values by item id, in the order measured."""
    aggregate: dict[str, Any] | None
    """None: the evaluation was interrupted."""


def read_log(path: Path, *, partial: bool = False) -> Evaluation:
    """Read what :class:`~kfade.evaluate.item_log.ItemLog` wrote; an unfinished log only if
    ``partial``.

    Raises:
        InputError: no such file, not text, not a log of this format, or unfinished.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such evaluation log; give what a kfade eval wrote")
    lines = read_utf8(path).split("\n")
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            row = json.loads(line)
            assert isinstance(row, dict)
        except (json.JSONDecodeError, AssertionError):
            if number == len(lines) and rows:
                break  # cut off in writing: the file does not end in a newline
            raise InputError(f"{path}, line {number}: not a line of an evaluation log") from None
        rows.append(row)
    if not rows or rows[0].get("format") != FORMAT:
        raise InputError(f"{path}: not an evaluation log of this version of kfade")
    items = {
        str(r["item"]): {k: v for k, v in r.items() if k != "item"} for r in rows if "item" in r
    }
    aggregate = rows[-1].get("aggregate")
    if aggregate is None and not partial:
        raise InputError(f"{path}: this evaluation was interrupted; repeat it with --resume")
    return Evaluation(rows[0], items, aggregate)


def blocks(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """``items`` in consecutive blocks of at most ``size``."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def digest(rows: Sequence[Any]) -> str:
    """SHA-256 over plain values or dataclasses: identifies the data of an evaluation."""
    return hashlib.sha256(json.dumps(list(rows), default=astuple).encode()).hexdigest()
