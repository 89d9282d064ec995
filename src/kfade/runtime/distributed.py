"""Several processes that share work and sum what they find.

This is the only file that imports torch.distributed. Every process holds the model (or, after
:func:`shard`, a part of its weights) and the whole list of work. It does its share, and results are
summed over processes. In a single process there is nothing to sum: tensors stay as they are.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Within the ``with`` the processes that ``torchrun`` started, if any, form a group.

    The backend is NCCL where there is a GPU for each process of the machine, else gloo.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    if torch.cuda.device_count() >= here:
        torch.cuda.set_device(local)
        dist.init_process_group("nccl", device_id=torch.device("cuda", local))
    else:
        with _stdout_is_stderr():  # gloo of PyTorch 2.8 prints to stdout, where results belong
            dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _stdout_is_stderr() -> Iterator[None]:
    """Within the ``with`` all output to stdout, that of C++ libraries too, goes to stderr."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def count() -> int:
    """Number of processes."""
    return dist.get_world_size() if _grouped() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if _grouped() else 0


def assign_by_cost(costs: Sequence[float], among: int | None = None) -> list[int]:
    """The process that does each piece of work.

    Greedy: in order of falling cost, each piece goes to the process with the least work so far.

    Args:
        among: number of processes; None: those of the group.
    """
    load = [0.0] * (among or count())
    owner = [0] * len(costs)
    for piece in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owner[piece] = min(range(len(load)), key=load.__getitem__)
        load[owner[piece]] += costs[piece]
    return owner


def share(items: Sequence[T], cost: Callable[[T], float]) -> list[T]:
    """This process's part of ``items``, in their order."""
    owner = assign_by_cost([cost(item) for item in items])
    return [item for item, who in zip(items, owner, strict=True) if who == rank()]


def reduce_to(owner: int, tensor: Tensor) -> None:
    """Sum over processes, in place, in process ``owner``; the values of the others are lost."""
    if _grouped():
        dist.reduce(tensor, dst=owner)


def all_reduce(tensor: Tensor) -> Tensor:
    """Sum over processes, in place, in all of them."""
    if _grouped():
        dist.all_reduce(tensor)
    return tensor


def all_reduce_numbers(numbers: Sequence[float], device: torch.device | str = "cpu") -> list[float]:
    """Sums over processes of a few numbers, in float64."""
    if not _grouped():
        return list(numbers)
    return all_reduce(torch.tensor(numbers, dtype=torch.float64, device=device)).tolist()


def all_gather_lists(numbers: Sequence[int]) -> list[list[int]]:
    """The lists of all processes, in all of them."""
    if not _grouped():
        return [list(numbers)]
    found: list[list[int]] = [[] for _ in range(count())]
    dist.all_gather_object(found, list(numbers))
    return found


def gather_rows(owner: int, rows_RD: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """The rows of each process, in process ``owner``; none in the others.

    Args:
        counts: how many rows each process has.
    """
    own = rank()
    if own != owner:
        if counts[own]:
            dist.send(rows_RD.contiguous(), dst=owner)
        return []
    parts = []
    for process, many in enumerate(counts):
        part = rows_RD if process == own else rows_RD.new_empty(many, rows_RD.shape[1])
        if process != own and many:
            dist.recv(part, src=process)
        parts.append(part)
    return parts


def broadcast(owner: int, tensor: Tensor) -> Tensor:
    """``tensor`` of process ``owner`` in all of them, in place."""
    if _grouped():
        dist.broadcast(tensor, src=owner)
    return tensor


def broadcast_optional(
    owner: int, tensor: Tensor | None, device: torch.device | str
) -> Tensor | None:
    """What process ``owner`` has, a tensor or None, in all processes."""
    if not _grouped():
        return tensor
    kind = [None if tensor is None else (tensor.shape, tensor.dtype)]
    dist.broadcast_object_list(kind, src=owner)
    if kind[0] is None:
        return None
    shape, dtype = kind[0]
    if rank() != owner:
        tensor = torch.empty(shape, dtype=dtype, device=device)
    assert tensor is not None
    return broadcast(owner, tensor)


def barrier() -> None:
    """Wait for all processes."""
    if _grouped():
        dist.barrier()


def shard(blocks: Iterable[nn.Module]) -> None:
    """Spread the weights of each of a model's ``blocks`` over the processes, in place (FSDP2).

    A block's weights are gathered when it runs, forward and backward, and dropped after it. Weights
    outside the blocks (embeddings, last norm, head) stay whole in every process.
    """
    if not _grouped():
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    kind = "cuda" if dist.get_backend() == "nccl" else "cpu"
    mesh = init_device_mesh(kind, (count(),))
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)


def is_sharded(model: nn.Module) -> bool:
    """Whether :func:`shard` has spread weights of ``model``."""
    return any(_is_shard(parameter) for parameter in model.parameters())


def extra_passes(model: nn.Module, passes: int) -> int:
    """How many passes through ``model`` this process has to add to reach the largest number.

    Processes gather the weights of a sharded model together, so all need the same number of passes.
    An added pass repeats any batch, and its results are dropped. Every process must call this
    before its first pass. 0 where the model is not sharded.
    """
    if not is_sharded(model):
        return 0
    device = next(model.parameters()).device
    most = torch.tensor(passes, device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most) - passes


def gather_full(tensor: Tensor) -> Tensor:
    """The whole of a tensor of which this process may hold a part; every process must call it."""
    return tensor.full_tensor() if _is_shard(tensor) else tensor  # type: ignore[attr-defined]


def own_part(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds: all of it, if it is not sharded."""
    return tensor.to_local() if _is_shard(tensor) else tensor  # type: ignore[attr-defined]


def scatter_into(tensor: Tensor, values: Tensor) -> None:
    """Write whole ``values`` into ``tensor``, of which this process may hold a part."""
    if _is_shard(tensor):
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
        values = distribute_tensor(values.to(tensor.dtype), mesh, placements, src_data_rank=None)
    tensor.copy_(values)


def _is_shard(tensor: Tensor) -> bool:
    if not _grouped():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()
