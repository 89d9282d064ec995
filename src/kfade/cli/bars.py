"""Displays of progress: bars on a terminal, and regular lines of text otherwise."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

FIRST_LINE = 10.0  # seconds after which a task gets its first line
INTERVAL = 30.0  # seconds between two lines
TICK = 5.0  # seconds between two checks of whether a line is due


class Bars:
    """Progress bars of the package rich. The bar of a finished task disappears."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<24}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
            transient=True,
        )

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def start(self, name: str, total: float | None) -> int:
        """Start a task with its bar, which is animated if the total is unknown."""
        return self._progress.add_task(name, total=total, text="" if total is None else "left")

    def advance(self, task: int, amount: float) -> None:
        """Advance the bar of a task."""
        self._progress.advance(TaskID(task), amount)

    def received(self, task: int, done: int, total: int) -> None:
        """Show the downloaded bytes of a task instead of its remaining time."""
        self._progress.update(TaskID(task), text=_received(done, total))

    def stop(self, task: int) -> None:
        """Remove the bar of a task."""
        self._progress.remove_task(TaskID(task))

    def say(self, line: str) -> None:
        """Print a line above the bars."""
        self._progress.console.print(line)


@dataclass
class _Task:
    """A task and how far it is."""

    name: str
    total: float | None
    begun: float
    done: float = 0.0
    received: str = ""

    @property
    def share(self) -> float:
        """Finished fraction, 0 to 1."""
        return min(self.done / self.total, 1.0) if self.total else 0.0

    def after(self, seconds: float) -> str:
        """The line about a running task."""
        time = _duration(seconds)
        if self.total is None:
            return f"{self.name}: " + (f"{self.received} after " if self.received else "") + time
        left = f", about {_duration(seconds / self.share - seconds)} left" if self.share else ""
        return f"{self.name}: {100 * self.share:.0f} % after {time}{left}"

    def end(self, seconds: float) -> str:
        """The line about a finished task."""
        if self.total is None:
            return f"{self.name}: ended after {_duration(seconds)}"
        complete = self.done >= self.total * (1 - 1e-9)  # sums of shares are rounded
        end = "done in" if complete else f"ended at {100 * self.share:.0f} % after"
        return f"{self.name}: {end} {_duration(seconds)}"


class Lines:
    """Prints lines about a long task, and one at its end. Tasks within a task get no lines, unless
    the outer one's work is not known and theirs is.

    A thread checks the clock, so that lines are regular even if one item takes minutes.

    Args:
        say: prints a line.
        clock: returns the time in seconds.
    """

    def __init__(
        self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._say, self._clock = say, clock
        self._tasks: dict[int, _Task] = {}
        self._started = 0
        self._last = -INTERVAL
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Lines:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def start(self, name: str, total: float | None) -> int:
        """Start a task."""
        with self._lock:
            self._started += 1
            self._tasks[self._started] = _Task(name, total, self._clock())
            return self._started

    def advance(self, task: int, amount: float) -> None:
        """Add ``amount`` to the finished part of a task."""
        with self._lock:
            self._tasks[task].done += amount

    def received(self, task: int, done: int, total: int) -> None:
        """Set the downloaded bytes of a task."""
        with self._lock:
            self._tasks[task].received = _received(done, total)

    def stop(self, task: int) -> None:
        """End a task, finished or not. Prints a line if it was long and the one that is told of."""
        with self._lock:
            told, own = self._told, self._tasks.pop(task)
            seconds = self._clock() - own.begun
            if seconds >= FIRST_LINE and own is told:
                self._say(own.end(seconds))

    def say(self, line: str) -> None:
        """Print a line at once."""
        self._say(line)

    def tick(self) -> None:
        """Print a line about the task that is told of, if one is due."""
        with self._lock:
            told, now = self._told, self._clock()
            if told is None or now - max(told.begun + FIRST_LINE - INTERVAL, self._last) < INTERVAL:
                return
            self._last = now
            self._say(told.after(now - told.begun))

    @property
    def _told(self) -> _Task | None:
        """The outermost task of known work that is long; the outermost of all if there is none."""
        running, now = list(self._tasks.values()), self._clock()
        long = [t for t in running if t.total is not None and now - t.begun >= FIRST_LINE]
        return next(iter([*long, *running]), None)

    def _watch(self) -> None:
        while not self._over.wait(TICK):
            self.tick()


def _received(done: int, total: int) -> str:
    known = f"{decimal(done)} of {decimal(total)}" if total else decimal(done)
    return f"{known} downloaded"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
