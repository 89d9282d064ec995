"""Processes that record the collectives they issue, for test_collectives.py."""

from __future__ import annotations

import inspect
import json
import os
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as functional

from kfade.cli import main
from kfade.runtime import distributed
from kfade.runtime.run_dir import RunDir

COLLECTIVES = (
    *("all_reduce", "reduce", "broadcast", "barrier", "send", "recv", "isend", "irecv", "scatter"),
    *("all_gather", "all_gather_into_tensor", "gather", "reduce_scatter_tensor"),
    *("all_gather_single", "reduce_scatter_single"),  # their names from PyTorch 2.13 on
    *("all_to_all", "all_to_all_single", "batch_isend_irecv"),
    *("all_gather_object", "gather_object", "scatter_object_list", "broadcast_object_list"),
)


def record(file: Path) -> None:
    """From now on write a line for each collective: (name, shapes, dtypes, group, rank named)."""
    log = file.open("w", buffering=1)

    def recorded(name, call):
        signature = inspect.signature(call)

        def wrapped(*args, **kwargs):
            given = signature.bind(*args, **kwargs).arguments
            tensors = [x for x in given.values() if isinstance(x, torch.Tensor)]
            # Rows of all-to-all differ in number from process to process; other shapes do not.
            shapes = [list(x.shape)[name == "all_to_all_single" :] for x in tensors]
            group = given.get("group")
            called = getattr(group, "group_name", None if group is None else str(group))
            to = given.get("dst", given.get("src"))
            log.write(
                json.dumps([name, shapes, [str(x.dtype) for x in tensors], called, to]) + "\n"
            )
            return call(*args, **kwargs)

        return wrapped

    for name in filter(partial(hasattr, dist), COLLECTIVES):
        setattr(dist, name, recorded(name, getattr(dist, name)))
    gather = recorded("functional all_gather", functional.all_gather_tensor)
    functional.all_gather_tensor = gather


def command(folder: Path, words: list[str]) -> int:
    """One command, as ``kfade`` runs it."""

    record(folder / os.environ["RANK"])
    return main(words)


def settled(folder: Path) -> None:
    """A number of a run's choice, then that of the resumed run, on other numbers."""
    record(folder / os.environ["RANK"])
    with distributed.processes():
        for resume, own in ((False, 10 + distributed.rank()), (True, 20)):
            run = RunDir(folder / "out", {}, resume=resume)
            number = run.settle("memory", partial(distributed.maximum, own))
            assert number == 9 + distributed.count()
            run.keep("piece", lambda path: path.write_text("a piece"))
            distributed.barrier()


def in_other_order(folder: Path) -> None:
    """Two groups, used in another order by the first process: no hang, since neither waits."""
    with distributed.processes():
        other = dist.new_group()
        record(folder / str(distributed.rank()))
        groups = [None, other] if distributed.rank() == 0 else [other, None]
        work = [dist.all_reduce(torch.ones(2), group=group, async_op=True) for group in groups]
        for one in work:
            one.wait()


def with_objects(folder: Path) -> None:
    """One collective on objects."""
    with distributed.processes():
        record(folder / str(distributed.rank()))
        dist.all_gather_object([None] * distributed.count(), "anything")
