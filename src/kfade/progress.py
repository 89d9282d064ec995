"""Progress of long loops: silent in a library call, a bar with an estimate on the command line."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

T = TypeVar("T")


class Reporter(Protocol):
    """Whatever shows progress: told when a task starts, how far it is, and when it ends."""

    def start(self, name: str, total: float) -> int:
        """A task of that much work begins; returns its number."""
        ...

    def advance(self, task: int, amount: float) -> None:
        """That much of it is done."""
        ...

    def stop(self, task: int) -> None:
        """It is over, or was cut short."""
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


def track(
    items: Sequence[T], name: str, size: Callable[[T], float] = lambda item: 1.0
) -> Iterable[T]:
    """Iterate over ``items``; ``size`` is an item's share of the work, so that estimates hold."""
    reporter = _reporter.get()
    if reporter is None:
        yield from items
        return
    task = reporter.start(name, sum(size(item) for item in items))
    try:
        for item in items:
            yield item
            reporter.advance(task, size(item))
    finally:
        reporter.stop(task)
