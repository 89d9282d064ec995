"""Division of an evaluation's work over several processes.

All processes make the same list of work, with the same batches that one process makes. Each does a
part of it. The results are exchanged, so that every process has all of them, in order, and they are
the same bits that one process computes. Errors are exchanged too: all processes raise the first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import TypeVar

from torch import nn

from kfade.errors import InputError
from kfade.evaluate.log import blocks
from kfade.runtime import distributed
from kfade.runtime.progress import track

T = TypeVar("T")
R = TypeVar("R")

_alone: ContextVar[bool] = ContextVar("kfade_alone", default=False)


def map_shared(
    items: Sequence[T],
    function: Callable[[T], R],
    name: str,
    *,
    cost: Callable[[T], float],
    each: int = 1,
    model: nn.Module | None = None,
    one_pass: bool = False,
) -> Iterator[R]:
    """Yield ``function(item)`` of each item, in order, in all processes.

    Items are computed in rounds of consecutive ones. The items of a round are divided by cost, and
    their results are exchanged at its end. Within ``function`` nothing is divided again.

    Args:
        function: its results are on the CPU and can be pickled.
        name: what the progress is called.
        cost: the work of an item.
        each: items that a process computes in a round, on average. What is yielded after a round
            can be logged, and an interruption loses at most one round.
        model: the model that ``function`` runs. If its weights are sharded, processes run through
            it together.
        one_pass: whether ``function`` makes exactly one pass through the model. If the model is
            sharded, items are divided only then; otherwise every process computes all of them.

    Raises:
        InputError: as ``function``, after the results of all items before.
    """
    sharded = model is not None and distributed.is_sharded(model)
    if distributed.count() == 1 or _alone.get() or (sharded and not one_pass):
        for item in track(items, name, cost):
            yield function(item)
        return
    rounds = blocks(items, each * distributed.count())
    for some in track(rounds, name, lambda own: sum(cost(item) for item in own)):
        own = distributed.share(list(enumerate(some)), lambda numbered: cost(numbered[1]))
        # An added pass through a sharded model computes the first item once more.
        added = distributed.extra_passes(model, len(own)) if model is not None else 0
        with undivided():
            found = {i: attempt(function, item) for i, item in [*own, *[(0, some[0])] * added]}
        yield from in_order(found)


@contextlib.contextmanager
def undivided() -> Iterator[None]:
    """Within the ``with`` every process computes all items of :func:`map_shared`."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def attempt(function: Callable[[T], R], item: T) -> R | InputError:
    """``function(item)``, or the InputError that it raises, for :func:`in_order`."""
    try:
        return function(item)
    except InputError as error:
        return error


def in_order(found: Mapping[int, R | InputError]) -> Iterator[R]:
    """Yield the results of all processes in the order of their numbers.

    Args:
        found: this process's results by number. What several processes have is yielded once.

    Raises:
        InputError: the first error among them, after the results before it.
    """
    together: dict[int, R | InputError] = {}
    for part in distributed.gather_objects(dict(found)):
        together |= part
    for _, result in sorted(together.items(), key=lambda numbered: numbered[0]):
        if isinstance(result, InputError):
            raise result
        yield result
