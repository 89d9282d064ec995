"""The log format of every evaluation: JSON lines, which can be resumed and which the report reads.

    {"format": "kfade-eval-1", "benchmark": "kl", ...}      what was measured, on what, how
    {"item": "0", ...}                                       one line an item, in the order measured
    {"aggregate": {...}}                                     last, when all items are there

An interrupted evaluation leaves a log without an aggregate. Opened again with the same header, it
is continued after the items that it has. An incomplete last line is dropped. So an evaluation is

    for name, item, value in log.measure(items, values):
        log.add(name, ...)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO, TypeVar

from kfade.data.rows import read_utf8
from kfade.errors import InputError
from kfade.runtime import distributed
from kfade.runtime.files import write_text, writing

FORMAT = "kfade-eval-1"
T = TypeVar("T")
V = TypeVar("V")


@dataclass(frozen=True)
class Evaluation:
    """What a log holds."""

    header: dict[str, Any]
    """``benchmark`` and all settings that decide the numbers."""
    items: dict[str, dict[str, Any]]
    """Values by item id, in the order measured."""
    aggregate: dict[str, Any] | None
    """None: the evaluation was interrupted."""


class ItemLog:
    """Writes a log item by item; use it in a ``with``.

    Of several processes all open it and add all items, and the first one writes.

    Args:
        path: the file. If it exists, its items are kept.
        header: ``benchmark`` and all settings that decide the numbers.

    Raises:
        InputError: the file holds an evaluation with another header.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self._path = path
        wanted = json.loads(json.dumps({"format": FORMAT, **header}))
        self.items: dict[str, dict[str, Any]] = {}
        """Values of the items measured so far."""
        if path.is_file() and path.stat().st_size:
            found = read_log(path, partial=True)
            if found.header != wanted:
                raise InputError(
                    f"{path}: holds an evaluation with other options; repeat them, or remove the "
                    "file"
                )
            self.items = found.items
        distributed.barrier()  # all have read what the first one changes now
        self._file: TextIO | None = None
        if distributed.rank() == 0:
            lines = [wanted, *({"item": item, **values} for item, values in self.items.items())]
            write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
            with writing(path):
                self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> ItemLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def measure(
        self, items: Mapping[str, T], values: Callable[[list[T]], Iterable[tuple[int, V]]]
    ) -> Iterator[tuple[str, T, V]]:
        """Yield (name, item, value) of each of the ``items`` that is not in the log yet.

        Args:
            items: what is measured, by the name that it has in the log.
            values: measures a list of items, and yields (number in the list, value) in any order.
        """
        missing = [name for name in items if name not in self.items]
        for number, value in values([items[name] for name in missing]):
            yield missing[number], items[missing[number]], value

    def add(self, item: str, **values: Any) -> None:
        """Write one item's values, on disk at once."""
        assert item not in self.items, f"item {item} was measured before"
        self.items[item] = json.loads(json.dumps(values))
        self._line({"item": item, **values})

    def finish(self, aggregate: Mapping[str, Any]) -> None:
        """Write the figures over all items as the last line, and close the file."""
        self._line({"aggregate": dict(aggregate)})
        self._close()

    def _line(self, content: Mapping[str, Any]) -> None:
        if self._file is not None:
            with writing(self._path):
                self._file.write(json.dumps(content) + "\n")
                self._file.flush()

    def _close(self) -> None:
        if self._file is not None:
            with writing(self._path):
                self._file.close()


def read_log(path: Path, *, partial: bool = False) -> Evaluation:
    """Read what :class:`ItemLog` wrote; an unfinished one only if ``partial``.

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
