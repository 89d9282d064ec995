"""Writes the log of an evaluation, see ``log``. An evaluation is

for name, item, value in log.measure(items, values):
    log.add(name, ...)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO, TypeVar

from kfade.errors import InputError
from kfade.evaluate.log import FORMAT, read_log
from kfade.runtime import distributed
from kfade.runtime.files import write_text, writing

T = TypeVar("T")
V = TypeVar("V")


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
