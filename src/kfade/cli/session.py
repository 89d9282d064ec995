"""What every command does around its work: progress on stderr, printing."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console

from kfade.cli.bars import Bars, Lines
from kfade.runtime import distributed, progress

console = Console(stderr=True, highlight=False, markup=False)  # texts of data hold brackets


@contextlib.contextmanager
def session() -> Iterator[None]:
    """Progress on stderr, and nothing but results on stdout."""
    shown = Bars(console) if console.is_terminal else Lines(console.print)
    with shown, progress.reporting(shown), contextlib.redirect_stdout(sys.stderr):
        yield


def show(result: dict[str, Any], as_json: bool, lines: Sequence[str]) -> None:
    """The result, outside the session: one JSON object on stdout, or lines for a person."""
    if as_json and distributed.rank() == 0:
        print(json.dumps(result), flush=True)
    elif not as_json:
        for line in lines:
            console.print(line)
