"""Progress of long loops: silent in a library call, a bar with an estimate on the command line."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from tqdm.std import tqdm

T = TypeVar("T")


class Reporter(Protocol):
    """Whatever shows progress: told when a task starts, how far it is, and when it ends."""

    def start(self, name: str, total: float | None) -> int:
        """A task of that much work begins, None: nobody knows how much; returns its number."""
        ...

    def advance(self, task: int, amount: float) -> None:
        """That much of it is done."""
        ...

    def received(self, task: int, done: int, total: int) -> None:
        """So many bytes of a download that is part of it have come."""
        ...

    def stop(self, task: int) -> None:
        """It is over, or was cut short."""
        ...

    def say(self, line: str) -> None:
        """Something that whoever watches wants to know."""
        ...


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
    """Tell whoever watches; nobody does in a library call."""
    reporter = _reporter.get()
    if reporter is not None:
        reporter.say(line)


@contextlib.contextmanager
def counted(name: str, total: float) -> Iterator[Callable[[float], None]]:
    """A task of that much work; what is yielded is called with each part that is done."""
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
    """Iterate over ``items``; ``size`` is an item's share of the work, so that estimates hold."""
    with counted(name, sum(size(item) for item in items)) as advance:
        for item in items:
            yield item
            advance(size(item))


@contextlib.contextmanager
def waiting(name: str) -> Iterator[type[tqdm]]:
    """A task of unknown length; yields the class of bars for downloads that are part of it.

    The hub's functions take it as ``tqdm_class``. Its bars draw nothing and tell of their bytes.
    """
    reporter = _reporter.get()
    if reporter is None:
        yield _Download
        return
    task, received = reporter.start(name, None), reporter.received

    class Told(_Download):
        def tell(self, done: int, total: int) -> None:
            received(task, done, total)

    try:
        yield Told
    finally:
        reporter.stop(task)


class _Download(tqdm):
    """A bar that is not drawn."""

    def __init__(self, *args: Any, **options: Any) -> None:
        # Others count files, or what came over the network of files that are partly there.
        self._counts = options.get("unit") == "B" and "total" in options.get("bar_format", "total")
        super().__init__(*args, **{**options, "disable": True})

    def update(self, n: float | None = 1) -> None:
        """That many bytes more."""
        self.n += n or 0
        if self._counts:
            self.tell(int(self.n), int(self.total or 0))

    def tell(self, done: int, total: int) -> None:
        """Nobody listens."""


@contextlib.contextmanager
def no_bars() -> Iterator[None]:
    """Within the ``with`` no library draws a bar of its own with tqdm."""
    own = tqdm.__init__

    def hidden(bar: tqdm, *args: Any, **options: Any) -> None:
        own(bar, *args, **{**options, "disable": True})

    tqdm.__init__ = hidden
    try:
        yield
    finally:
        tqdm.__init__ = own
