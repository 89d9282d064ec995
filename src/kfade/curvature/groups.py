"""Layers in groups that fit a memory budget: each group is fitted from its passes to its end.

``bytes_of`` is an estimator's ``peak_bytes``: what fitting some layers together takes. Layers that
share a factor A are never separated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from kfade.errors import InputError
from kfade.models.targets import Target
from kfade.runtime.distributed import assign_by_cost

BytesOf = Callable[[Sequence[Target]], int]
"""Layers -> bytes of curvature that fitting them together holds at its peak."""


def group_by_input(targets: Sequence[Target]) -> list[list[Target]]:
    """Targets by their input factor: the smallest groups."""
    units: dict[str, list[Target]] = {}
    for target in targets:
        units.setdefault(target.input_of, []).append(target)
    return list(units.values())


def assign_to_processes(
    targets: Sequence[Target], bytes_of: BytesOf, processes: int
) -> list[list[Target]]:
    """Targets by the process that keeps their curvature, about as many bytes in each."""
    units = group_by_input(targets)
    owners = assign_by_cost([bytes_of(unit) for unit in units], processes)
    shares: list[list[Target]] = [[] for _ in range(processes)]
    for owner, unit in zip(owners, units, strict=True):
        shares[owner].extend(unit)
    return shares


def largest_share(group: Sequence[Target], bytes_of: BytesOf, processes: int) -> list[Target]:
    """The share of :func:`assign_to_processes` that needs most bytes."""
    if processes == 1:
        return list(group)
    return max(assign_to_processes(group, bytes_of, processes), key=bytes_of)


def group_targets(
    targets: Sequence[Target], bytes_of: BytesOf, budget: int | None, processes: int = 1
) -> list[list[Target]]:
    """Consecutive targets in as few groups as ``budget`` bytes of curvature allow; None: one.

    Args:
        processes: over which the layers of each group are divided; the budget is that of one.

    Raises:
        InputError: the layers of one input alone are over the budget, or nothing is left of it.
    """
    if budget is None:
        return [list(targets)]
    units = group_by_input(targets)
    for unit in units:
        if budget < 0:
            raise InputError(
                f"--memory: the model and a pass alone are over it by {-budget / 1e9:.2f} GB, "
                "without any curvature: raise it, lower --batch-tokens, or give --recompute"
            )
        if bytes_of(unit) > budget:
            raise InputError(
                f"--memory leaves {budget / 1e9:.2f} GB for the curvature, and {unit[0].name} with "
                f"what shares its input needs {bytes_of(unit) / 1e9:.2f} GB: raise "
                "it, lower --batch-tokens, give --recompute, or use --estimator diagonal"
            )

    def fits(start: int, stop: int) -> bool:
        group = [target for unit in units[start:stop] for target in unit]
        return bytes_of(largest_share(group, bytes_of, processes)) <= budget

    groups: list[list[Target]] = []
    start = 0
    while start < len(units):
        stop = _last(partial(fits, start), start + 1, len(units))
        groups.append([target for unit in units[start:stop] for target in unit])
        start = stop
    return groups


def _last(fits: Callable[[int], bool], known: int, end: int) -> int:
    """The largest number up to ``end`` that fits, if all up to it do; ``known`` fits.

    Steps double, then halve, so that few numbers are tried.
    """
    step = 1
    while known + step <= end and fits(known + step):
        known, step = known + step, 2 * step
    while step > 1:
        step //= 2
        if known + step <= end and fits(known + step):
            known += step
    return known
