"""Seconds and peak bytes of the named stages of a run."""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import os
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

_CGROUP = Path("/sys/fs/cgroup")


@dataclass
class Clock:
    """Seconds and peak bytes by stage: of repeated stages the sum and the maximum."""

    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    @property
    def total(self) -> float:
        """Seconds since the clock was made."""
        return time.perf_counter() - self.started


_clock: contextvars.ContextVar[Clock | None] = contextvars.ContextVar("kfade_clock", default=None)


@contextlib.contextmanager
def timing(clock: Clock) -> Iterator[None]:
    """Record the stages within the ``with`` in ``clock``."""
    token = _clock.set(clock)
    try:
        yield
    finally:
        _clock.reset(token)


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """Record what is within the ``with`` as a stage; the peak of a stage covers those in it."""
    clock = _clock.get()
    if clock is None:
        yield
        return
    outer_peaks, clock.peak_bytes = clock.peak_bytes, {}
    _reset_peak()
    start = time.perf_counter()
    try:
        yield
    finally:
        _synchronise()
        seconds = time.perf_counter() - start
        clock.peak_bytes[name] = max([_peak(), *clock.peak_bytes.values()])
        for key, value in clock.peak_bytes.items():
            outer_peaks[key] = max(value, outer_peaks.get(key, 0))
        clock.peak_bytes = outer_peaks
        clock.seconds[name] = clock.seconds.get(name, 0.0) + seconds
        _reset_peak()


def free_bytes(device: torch.device) -> int:
    """Bytes of ``device`` that this process may use: what is free, and what it uses already.

    Processes of one machine share a CPU's memory; a limit of the container counts.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    free: int = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(stat["inactive_file"]) + int(stat["active_file"]))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    own: int = psutil.Process().memory_info().rss
    return free // processes + own


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    # glibc keeps freed memory, which would count as used by the next stage.
    with contextlib.suppress(OSError, AttributeError):  # not every system has or allows it
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    """Peak bytes since the last reset: on the GPU if there is one, else of the process."""
    if torch.cuda.is_available():
        return sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
