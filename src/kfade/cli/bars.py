"""Progress for whoever watches: bars on a terminal, a line now and then anywhere else."""

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

PATIENCE = 10.0  # seconds that a task runs before a line tells of it
EVERY = 30.0  # seconds between two lines
TICK = 5.0  # seconds between two looks at what there is to tell


class Bars:
    """Rich progress bars; a finished task's bar goes away, its stage stays in the log."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<24}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[word]}"),
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
        """A bar appears; it swings to and fro where nobody knows how much there is to do."""
        return self._progress.add_task(name, total=total, word="" if total is None else "left")

    def advance(self, task: int, amount: float) -> None:
        """It grows."""
        self._progress.advance(TaskID(task), amount)

    def received(self, task: int, done: int, total: int) -> None:
        """Bytes stand where the time that is left would."""
        self._progress.update(TaskID(task), word=_received(done, total))

    def stop(self, task: int) -> None:
        """It goes away."""
        self._progress.remove_task(TaskID(task))

    def say(self, line: str) -> None:
        """A line above the bars."""
        self._progress.console.print(line)


@dataclass
class _Task:
    name: str
    total: float | None
    begun: float
    done: float = 0.0
    received: str = ""

    @property
    def share(self) -> float:
        """How much of it is done, 0 to 1."""
        return min(self.done / self.total, 1.0) if self.total else 0.0

    def after(self, seconds: float) -> str:
        """How far it is."""
        time = _duration(seconds)
        if self.total is None:
            return f"{self.name}: " + (f"{self.received} after " if self.received else "") + time
        left = f", about {_duration(seconds / self.share - seconds)} left" if self.share else ""
        return f"{self.name}: {100 * self.share:.0f} % after {time}{left}"

    def end(self, seconds: float) -> str:
        """That it is over."""
        if self.total is None:
            return f"{self.name}: ended after {_duration(seconds)}"
        whole = self.done >= self.total * (1 - 1e-9)  # sums of shares are rounded
        end = "done in" if whole else f"ended at {100 * self.share:.0f} % after"
        return f"{self.name}: {end} {_duration(seconds)}"


class Lines:
    """A line for a task that takes long, and one when it is over; tasks within it say nothing.

    A thread looks at the clock, so that a task is told of whose items take minutes each.

    Args:
        say: prints a line.
        clock: seconds.
    """

    def __init__(
        self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._say, self._clock = say, clock
        self._tasks: dict[int, _Task] = {}
        self._started = 0
        self._last = -EVERY
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
        """A task begins."""
        with self._lock:
            self._started += 1
            self._tasks[self._started] = _Task(name, total, self._clock())
            return self._started

    def advance(self, task: int, amount: float) -> None:
        """That much more of it is done."""
        with self._lock:
            self._tasks[task].done += amount

    def received(self, task: int, done: int, total: int) -> None:
        """So many bytes of a download have come."""
        with self._lock:
            self._tasks[task].received = _received(done, total)

    def stop(self, task: int) -> None:
        """It is over, or was cut short; said if it took long and is no part of another."""
        with self._lock:
            own = self._tasks.pop(task)
            seconds = self._clock() - own.begun
            if seconds >= PATIENCE and not self._tasks:
                self._say(own.end(seconds))

    def say(self, line: str) -> None:
        """A line at once."""
        self._say(line)

    def tick(self) -> None:
        """Tell of the outermost task, if it is time to."""
        with self._lock:
            outermost = next(iter(self._tasks.values()), None)
            now = self._clock()
            if (
                outermost is None
                or now - max(outermost.begun + PATIENCE - EVERY, self._last) < EVERY
            ):
                return
            self._last = now
            self._say(outermost.after(now - outermost.begun))

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
