"""Progress of long loops: silent in a library call, a bar with an estimate on the command line."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from tqdm.std import tqdm

T = TypeVar("T")


class Reporter(Protocol):
    """What shows progress, as the command line does."""

    def start(self, name: str, total: float | None) -> int:
        """Begin a task of ``total`` work, None if it is unknown; returns the task's number."""

    def advance(self, task: int, amount: float) -> None:
        """Add work that was done."""

    def received(self, task: int, done: int, total: int) -> None:
        """Set the bytes so far, and in all, of a download that is part of a task."""

    def stop(self, task: int) -> None:
        """End a task that is finished or was interrupted."""

    def say(self, line: str) -> None:
        """Show a line of text."""


_reporter: contextvars.ContextVar[Reporter | None] = contextvars.ContextVar(
    "kfade_progress", default=None
)


@contextlib.contextmanager
def reporting(reporter: Reporter) -> Iterator[None]:
    """Send the progress of everything inside the ``with`` to ``reporter``."""
    token = _reporter.set(reporter)
    try:
        yield
    finally:
        _reporter.reset(token)


def say(line: str) -> None:
    """Show a line of text where progress is shown; nothing in a library call."""
    reporter = _reporter.get()
    if reporter is not None:
        reporter.say(line)


@contextlib.contextmanager
def counted(name: str, total: float) -> Iterator[Callable[[float], None]]:
    """A task of ``total`` work; yields a function to call with the amount of each finished part."""
    reporter = _reporter.get()
    if reporter is None:
        yield lambda amount: None
        return
    task = reporter.start(name, total)
    try:
        yield lambda amount: reporter.advance(task, amount)
    finally:
        reporter.stop(task)


def track(
    items: Sequence[T], name: str, size: Callable[[T], float] = lambda item: 1.0
) -> Iterable[T]:
    """Iterate over ``items`` as a task; ``size`` is the work of an item."""
    with counted(name, sum(size(item) for item in items)) as advance:
        for item in items:
            yield item
            advance(size(item))


@contextlib.contextmanager
def waiting(name: str) -> Iterator[type[tqdm]]:
    """A task of unknown length; yields the class of bars for downloads that are part of it.

    The hub's functions take it as ``tqdm_class``. Its bars are not drawn: they report their bytes.
    """
    reporter = _reporter.get()
    task = reporter.start(name, None) if reporter else 0

    class Download(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            # Other bars count files, or the bytes that came over the network.
            form = options.get("bar_format", "total")
            self._counts = options.get("unit") == "B" and "total" in form
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            if reporter and self._counts:
                reporter.received(task, int(self.n), int(self.total or 0))

    try:
        yield Download
    finally:
        if reporter:
            reporter.stop(task)


@contextlib.contextmanager
def no_bars() -> Iterator[None]:
    """Within the ``with`` no library draws bars with tqdm."""
    own = tqdm.__init__

    def hidden(bar: tqdm, *args: Any, **options: Any) -> None:
        own(bar, *args, **{**options, "disable": True})

    tqdm.__init__ = hidden
    try:
        yield
    finally:
        tqdm.__init__ = own
