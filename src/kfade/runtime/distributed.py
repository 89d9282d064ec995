"""Several processes that share work and sum what they find.

This is the only file that imports torch.distributed. Every process holds the model (or, after
:func:`shard`, a part of its weights) and the whole list of work. It does its share, and results are
summed over processes. In a single process there is nothing to sum: tensors stay as they are.

All processes call the same functions in the same order. Tensors on GPUs go through NCCL, and those
on CPUs through gloo: numbers that steer the work never wait for a GPU.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kfade.errors import InputError
from kfade.runtime.sides import check_entries, side_to_divide

T = TypeVar("T")
PATIENCE = timedelta(hours=24)
"""How long a process waits for the others. While one decomposes a wide factor or writes a file, the
others wait in a collective, and PyTorch's limits (10 minutes with NCCL, 30 with gloo) would end
them. If a process fails, ``torchrun`` ends all of them at once."""


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Within the ``with`` the processes that ``torchrun`` started, if any, form a group.

    On a machine with GPUs each process has one of its own.

    Raises:
        InputError: the machine has GPUs, but fewer than processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    gpus = torch.cuda.device_count()
    if 0 < gpus < here:
        raise InputError(
            f"{here} processes on a machine with {gpus} GPU{'s' if gpus > 1 else ''}: start with "
            f"torchrun --nproc-per-node {gpus}, or set CUDA_VISIBLE_DEVICES= to compute on CPUs"
        )
    with _stdout_is_stderr():  # gloo of PyTorch 2.8 prints to stdout, where results belong
        if gpus:
            torch.cuda.set_device(local)
            device = torch.device("cuda", local)
            dist.init_process_group("cpu:gloo,cuda:nccl", timeout=PATIENCE, device_id=device)
        else:
            dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        _own_group.cache_clear()
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


def shares(items: Sequence[T], cost: Callable[[T], float]) -> list[list[T]]:
    """The part of ``items`` of each process, in their order."""
    parts: list[list[T]] = [[] for _ in range(count())]
    for item, owner in zip(items, assign_by_cost([cost(item) for item in items]), strict=True):
        parts[owner].append(item)
    return parts


def share(items: Sequence[T], cost: Callable[[T], float]) -> list[T]:
    """This process's part of ``items``, in their order."""
    return shares(items, cost)[rank()]


def reduce_to(owner: int, tensor: Tensor) -> None:
    """Sum over processes, in place, in process ``owner``; the values of the others are lost."""
    if _grouped():
        dist.reduce(tensor, dst=owner)


def all_reduce(tensor: Tensor) -> Tensor:
    """Sum over processes, in place, in all of them."""
    if _grouped():
        dist.all_reduce(tensor)
    return tensor


def all_reduce_numbers(numbers: Sequence[float]) -> list[float]:
    """Sums over processes of a few numbers, in float64."""
    if not _grouped():
        return list(numbers)
    return all_reduce(torch.tensor(numbers, dtype=torch.float64)).tolist()


def gather_numbers(numbers: Sequence[float]) -> list[list[float]]:
    """The numbers of each process, equally many in each, in all of them; in float64."""
    before, after = ([0.0] * len(numbers) * n for n in (rank(), count() - rank() - 1))
    table = torch.tensor([*before, *numbers, *after], dtype=torch.float64)
    return all_reduce(table).view(count(), len(numbers)).tolist()


def sum_gradients(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
    """Sum ``.grad`` of each tensor over processes, in place; one that no process has stays None.

    A process without work has no gradients. Those of a sharded model are sums already.

    Args:
        like: by the same names, tensors that are divided over the processes as these are.
    """
    whole = [tensor for name, tensor in tensors.items() if not _is_shard(like[name])]
    found = all_reduce_numbers([tensor.grad is not None for tensor in whole])
    for tensor, processes in zip(whole, found, strict=True):
        if processes:
            if tensor.grad is None:
                tensor.grad = torch.zeros_like(tensor)
            all_reduce(tensor.grad)


def gradient_norm(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> Tensor:
    """Norm of all gradients as one vector, of all processes' parts; ``like``: see
    :func:`sum_gradients`."""
    found = {name: tensor.grad for name, tensor in tensors.items() if tensor.grad is not None}
    parts = [gradient for name, gradient in found.items() if _is_shard(like[name])]
    norm = nn.utils.get_total_norm([g for name, g in found.items() if not _is_shard(like[name])])
    if not parts:
        return norm
    return (norm.square() + all_reduce(nn.utils.get_total_norm(parts).square())).sqrt()


def maximum(number: float) -> float:
    """The largest of the processes' numbers, in all of them."""
    if not _grouped():
        return number
    most = torch.tensor(number, dtype=torch.float64)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return most.item()


def any_of(condition: bool) -> bool:
    """Whether ``condition`` holds in any process."""
    return bool(maximum(condition))


def gather_objects(value: T) -> list[T]:
    """``value`` of each process, in the order of the processes, in all of them.

    It is pickled: a small Python object, with tensors on the CPU.
    """
    if not _grouped():
        return [value]
    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value)
    return values


def gather_rows(owner: int, rows_RD: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """The rows of each process, in process ``owner``; none in the others.

    One collective, all-to-all, which unlike gather takes parts of different lengths: nothing is
    padded. It has a group, so with NCCL a communicator, of its own: it does not queue behind the
    weights that FSDP gathers ahead.

    Args:
        counts: how many rows each process has; the same in all of them.
    """
    own = rank()
    sent, received = [0] * count(), [0] * count()
    if own == owner:
        received = [0 if process == own else many for process, many in enumerate(counts)]
    else:
        sent[owner] = counts[own]
    all_RD = rows_RD.new_empty(sum(received), rows_RD.shape[1])
    given_RD = rows_RD[:0] if own == owner else rows_RD
    dist.all_to_all_single(all_RD, given_RD.contiguous(), received, sent, group=_own_group())
    if own != owner:
        return []
    parts = list(all_RD.split(received))
    parts[own] = rows_RD
    return parts


def own_slice(flat: Tensor) -> Tensor:
    """This process's part of a tensor with one dimension: about as many numbers in each."""
    each = -(-len(flat) // count())
    return flat[rank() * each : (rank() + 1) * each]


def gather_slices(own: Tensor, length: int) -> Tensor:
    """The tensor of ``length`` numbers whose :func:`own_slice` is ``own``; every process must call
    it. See :func:`gather_rows` for its group."""
    if not _grouped():
        return own
    each = -(-length // count())
    padded = nn.functional.pad(own, (0, each - len(own)))
    whole = own.new_empty(each * count())
    dist.all_gather_into_tensor(whole, padded, group=_own_group())
    return whole[:length]


@cache
def _own_group() -> dist.ProcessGroup:
    """A group beside that of FSDP; all processes make it at once."""
    return dist.new_group(timeout=PATIENCE)


def broadcast(owner: int, tensor: Tensor) -> Tensor:
    """``tensor`` of process ``owner`` in all of them, in place."""
    if _grouped():
        dist.broadcast(tensor, src=owner)
    return tensor


def barrier() -> None:
    """Wait for all processes."""
    if _grouped():
        dist.barrier()


def shard(body: nn.Module, blocks: Iterable[nn.Module], device: torch.device | str = "cpu") -> None:
    """Spread the weights of a model's ``blocks`` over the processes, in place (FSDP2).

    A block's weights are gathered when it runs, forward and backward, and dropped after it.
    ``body``, the module around the blocks, is the root of all: only under a common root does FSDP
    gather the next block's weights while one computes.

    Weights outside the blocks (embeddings, last norm, head) stay whole in every process. The head
    is applied in chunks outside of any forward pass, where nothing would gather its weights, and
    the embeddings may be tied to it.

    Of experts, whose matrices are one parameter of three dimensions, every matrix is divided
    (``sides``), so that each process has a part of every :func:`entry`.

    A backward pass gives each process the gradient of its part, summed over the processes in
    float32 or better.

    Args:
        device: where the model will run. FSDP moves the parts of the blocks there.
    """
    if not _grouped():
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import Shard

    of_experts = set()
    for module in body.modules():
        own = list(module.parameters(recurse=False))
        if any(parameter.ndim == 3 for parameter in own):
            of_experts.update(own)

    def placement(parameter: nn.Parameter) -> Shard | None:
        even = parameter in of_experts
        return Shard(side_to_divide(parameter.shape, count())) if even else None

    mesh = init_device_mesh(torch.device(device).type, (count(),))
    for block in blocks:
        dtype = torch.promote_types(next(block.parameters()).dtype, torch.float32)
        policy = MixedPrecisionPolicy(reduce_dtype=dtype)
        divided = fully_shard(
            block,
            mesh=mesh,
            reshard_after_forward=True,
            shard_placement_fn=placement,
            mp_policy=policy,
        )
        divided.set_gradient_divide_factor(1.0)  # a sum; FSDP's own default is the mean
        divided.set_force_sum_reduction_for_comms(True)  # gloo knows nothing else
    fully_shard(body, mesh=mesh, ignored_params={p for p in body.parameters() if not _is_shard(p)})


def is_sharded(model: nn.Module) -> bool:
    """Whether :func:`shard` has spread weights of ``model``."""
    return any(_is_shard(parameter) for parameter in model.parameters())


def extra_passes(model: nn.Module, passes: int) -> int:
    """How many passes through ``model`` this process has to add to reach the largest number.

    Processes gather the weights of a sharded model together, so all need the same number of passes.
    An added pass repeats any batch, and its results are dropped. Every process must call this
    before its first pass. 0 where the model is not sharded.
    """
    return int(maximum(passes)) - passes if is_sharded(model) else 0


def gather_full(tensor: Tensor) -> Tensor:
    """The whole of a tensor of which this process may hold a part; every process must call it."""
    return tensor.full_tensor() if _is_shard(tensor) else tensor  # type: ignore[attr-defined]


def entry(tensor: Tensor, index: int) -> Tensor:
    """``tensor[index]``, a view; divided over the processes where ``tensor`` is.

    Raises:
        InputError: see :func:`~kfade.runtime.sides.check_entries`.
    """
    if _is_shard(tensor):
        check_entries(tensor.shape, count())
    return tensor[index]


def own_part(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds: all of it, if it is not sharded."""
    return tensor.to_local() if _is_shard(tensor) else tensor  # type: ignore[attr-defined]


def scatter_into(tensor: Tensor, values: Tensor) -> None:
    """Write whole ``values`` into ``tensor``, of which this process may hold a part."""
    if _is_shard(tensor):
        values = _divided(values.to(tensor.dtype), tensor)
    tensor.copy_(values)


def gather_like(like: Tensor, part: Tensor) -> Tensor:
    """The whole of a tensor that is divided as ``like`` is, from each process's part of it.

    Every process must call it. ``part`` itself, if ``like`` is not sharded.
    """
    if not _is_shard(like):
        return part
    from torch.distributed.tensor import DTensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    tensor = DTensor.from_local(
        part.to(like.device), mesh, placements, shape=like.shape, stride=like.stride()
    )
    return tensor.full_tensor()


def part_like(like: Tensor, whole: Tensor) -> Tensor:
    """This process's part of ``whole``, divided as ``like`` is; the inverse of
    :func:`gather_like`."""
    return own_part(_divided(whole, like)) if _is_shard(like) else whole


def _divided(whole: Tensor, like: Tensor) -> Tensor:
    """``whole``, which every process has, divided over them as ``like`` is."""
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(whole, mesh, placements, src_data_rank=None)


def _is_shard(tensor: Tensor) -> bool:
    if not _grouped():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()
