"""Progress on stderr during a command, and printing of its result."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console

from kfade.cli.bars import Bars, Lines
from kfade.runtime import distributed, progress

console = Console(stderr=True, highlight=False, markup=False)  # texts of data contain brackets


@contextlib.contextmanager
def session() -> Iterator[None]:
    """Show progress on stderr, and send to stderr what libraries print on stdout."""
    shown = Bars(console) if console.is_terminal else Lines(console.print)
    with shown, progress.reporting(shown), contextlib.redirect_stdout(sys.stderr):
        yield


def show(result: dict[str, Any], as_json: bool, lines: Sequence[str]) -> None:
    """Print the result as one JSON object on stdout, or ``lines`` on stderr.

    Call it outside of :func:`session`.
    """
    if as_json and distributed.rank() == 0:
        print(json.dumps(result), flush=True)
    elif not as_json:
        for line in lines:
            console.print(line)
