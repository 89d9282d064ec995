"""Several processes: who does what, and one sum at the end. The only file that knows
torch.distributed.

Every process holds the model and the same list of work, takes its own share of it, and sums. With
one process (no process group) each function is the identity.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Within the ``with``, the processes that ``torchrun`` started are one group, if it did.

    NCCL where there is a GPU for each process of the machine, gloo otherwise.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        torch.cuda.set_device(local)
        dist.init_process_group("nccl", device_id=torch.device("cuda", local))
    else:
        dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def count() -> int:
    """Number of processes."""
    return dist.get_world_size() if _grouped() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if _grouped() else 0


def deal(costs: Sequence[float], among: int | None = None) -> list[int]:
    """The process that does each piece of work: the dearest first, to whoever has least so far.

    Args:
        among: number of processes; None: those that there are.
    """
    load = [0.0] * (among or count())
    owner = [0] * len(costs)
    for piece in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owner[piece] = min(range(len(load)), key=load.__getitem__)
        load[owner[piece]] += costs[piece]
    return owner


def share(items: Sequence[T], cost: Callable[[T], float]) -> list[T]:
    """This process's part of ``items``, in their order."""
    owner = deal([cost(item) for item in items])
    return [item for item, who in zip(items, owner, strict=True) if who == rank()]


def sum_to(owner: int, tensor: Tensor) -> None:
    """Sum over processes, in place, in process ``owner``; the others' ``tensor`` is spent."""
    if _grouped():
        dist.reduce(tensor, dst=owner)


def sum_everywhere(tensor: Tensor) -> Tensor:
    """Sum over processes, in place, in all of them."""
    if _grouped():
        dist.all_reduce(tensor)
    return tensor


def sum_numbers(numbers: Sequence[float], device: torch.device | str = "cpu") -> list[float]:
    """Sums over processes of a few numbers, in float64."""
    if not _grouped():
        return list(numbers)
    return sum_everywhere(torch.tensor(numbers, dtype=torch.float64, device=device)).tolist()


def spread_from(owner: int, tensor: Tensor) -> Tensor:
    """``tensor`` of process ``owner`` in all of them, in place."""
    if _grouped():
        dist.broadcast(tensor, src=owner)
    return tensor


def wait() -> None:
    """Until all processes are here."""
    if _grouped():
        dist.barrier()


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()
