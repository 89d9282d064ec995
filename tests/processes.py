"""Processes that start at once: forked from one that has imported PyTorch, transformers and kfade,
and has computed nothing."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Mapping
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["pytest", "kfade.cli", "torch.distributed.fsdp", "transformers.models.llama.modeling_llama"]
)


def start(
    work: Callable[..., Any],
    *arguments: Any,
    said: Path,
    environment: Mapping[str, str] | None = None,
) -> BaseProcess:
    """``work(*arguments)`` in a process of its own, which ends with the code that it returns.

    Args:
        work: a function of a module.
        said: a folder; what the process prints goes to its files ``stdout`` and ``stderr``.
        environment: variables beside this process's own.
    """
    said.mkdir(parents=True, exist_ok=True)
    process = CONTEXT.Process(
        target=_run, args=(work, arguments, said, {**os.environ, **(environment or {})})
    )
    process.start()
    return process


def _run(work: Callable[..., Any], arguments: Any, said: Path, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    for number, name in ((1, "stdout"), (2, "stderr")):
        with open(said / name, "w") as file:
            os.dup2(file.fileno(), number)
    sys.exit(work(*arguments))


def run_together(
    count: int, work: Callable[..., Any], *arguments: Any, said: Path, timeout: float = 600
) -> None:
    """``work(*arguments)`` in ``count`` processes with the environment that ``torchrun`` gives.

    Args:
        said: a folder; what process i prints goes to the folder i of it.
        timeout: the longest, in seconds, until one more of them ends.
    """
    # As torchrun does, its parent holds the store by which they meet: no port is picked twice.
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    common = {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    started = [
        start(
            work,
            *arguments,
            said=said / str(rank),
            environment={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(count)
    ]
    running = {process.sentinel: rank for rank, process in enumerate(started)}
    try:
        while running:
            ended = wait(running, timeout)
            assert ended, f"not done after {timeout} seconds"
            for rank in [running.pop(sentinel) for sentinel in ended]:
                started[rank].join()
                assert started[rank].exitcode == 0, (said / f"{rank}/stderr").read_text()[-4000:]
    finally:
        for process in started:  # which may wait for one that failed
            process.kill()
            process.join()


def killed_after_step(step: int, words: list[str]) -> int:
    """``kfade`` with these words; the process that keeps an update is killed once it has kept that
    of ``step``."""
    from kfade.cli import main
    from kfade.runtime.run_dir import RunDir

    keep = RunDir.keep

    def keep_and_die(self: RunDir, name: str, *arguments: Any) -> None:
        keep(self, name, *arguments)
        if name.startswith(f"update-{step:03}") and (self.state / name).exists():
            os.kill(os.getpid(), signal.SIGKILL)

    RunDir.keep = keep_and_die  # type: ignore[method-assign]
    return main(words)
