"""Layers in groups that fit a memory budget: each group is fitted from its passes to its end.

Shapes: O outputs, I inputs of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence

from kfade.curvature.eigh import workspace_bytes
from kfade.curvature.factors import sum_dtype
from kfade.errors import InputError
from kfade.models.layers import Target
from kfade.runtime.distributed import assign_by_cost


def factor_bytes(group: Sequence[Target]) -> int:
    """Bytes of the factors A and S of ``group``, and of its bases: Σ over distinct inputs I² + Σ
    over layers O²."""
    return sum_dtype(group[0].weight.dtype).itemsize * sum(width**2 for width in widths(group))


def widths(group: Sequence[Target]) -> list[int]:
    """Widths of the factors of ``group``: I of each distinct input, O of each layer."""
    inputs = {target.input_of: target.shape[1] for target in group}
    return [*inputs.values(), *(target.shape[0] for target in group)]


def fit_bytes(group: Sequence[Target], estimator: str) -> dict[str, int]:
    """Bytes of curvature that fitting ``group`` holds at the peak of each of its stages.

    K-FAC: the factors, which the bases replace one by one, and the eigenvalues O·I. EK-FAC and
    diagonal: the grids O·I, and two more where a sequence's product is turned and squared; for
    EK-FAC beside the bases, and a copy of them in the model's dtype where that is another.
    """
    weight = group[0].weight
    size = sum_dtype(weight.dtype).itemsize
    grids = [size * target.shape[0] * target.shape[1] for target in group]
    if estimator == "identity":
        return {}
    if estimator == "diagonal":
        return {"lambda": sum(grids) + 2 * max(grids)}
    factors = factor_bytes(group)
    decomposing = factors + workspace_bytes(max(widths(group)), size, weight.device)
    stages = {"covariance": factors, "eigh": max(decomposing, factors + sum(grids))}
    if estimator == "ekfac":
        low = 0 if weight.dtype.itemsize == size else factors * weight.dtype.itemsize // size
        stages["lambda"] = factors + low + sum(grids) + 2 * max(grids)
    return stages


def group_bytes(group: Sequence[Target], estimator: str) -> int:
    """Bytes of curvature that fitting ``group`` holds at its peak."""
    return max(fit_bytes(group, estimator).values(), default=0)


def stored_bytes(group: Sequence[Target], estimator: str) -> int:
    """Bytes of the finished curvature of ``group``: bases, shared ones once, and eigenvalues."""
    size = sum_dtype(group[0].weight.dtype).itemsize
    if estimator == "identity":
        return size * len(group)
    grids = size * sum(target.shape[0] * target.shape[1] for target in group)
    return grids if estimator == "diagonal" else grids + factor_bytes(group)


def smallest_groups(targets: Sequence[Target]) -> list[list[Target]]:
    """Targets by the input that they read."""
    units: dict[str, list[Target]] = {}
    for target in targets:
        units.setdefault(target.input_of, []).append(target)
    return list(units.values())


def dealt(targets: Sequence[Target], estimator: str, processes: int) -> list[list[Target]]:
    """Targets by the process that keeps their curvature, where each layer's is kept by one.

    Layers that share their input stay together, since they share A; otherwise by bytes.
    """
    units = smallest_groups(targets)
    owners = assign_by_cost([group_bytes(unit, estimator) for unit in units], processes)
    found: list[list[Target]] = [[] for _ in range(processes)]
    for owner, unit in zip(owners, units, strict=True):
        found[owner].extend(unit)
    return found


def largest_share(group: Sequence[Target], estimator: str, processes: int) -> list[Target]:
    """Of :func:`dealt` the one that needs most."""
    return max(dealt(group, estimator, processes), key=lambda own: _bytes(own, estimator))


def _bytes(own: Sequence[Target], estimator: str) -> int:
    return group_bytes(own, estimator) if own else 0


def group_targets(
    targets: Sequence[Target], estimator: str, budget: int | None, processes: int = 1
) -> list[list[Target]]:
    """Consecutive targets in as few groups as ``budget`` bytes of curvature allow; None: one.

    Layers that share their input stay together, since they share A.

    Args:
        processes: over which each group is dealt out; the budget is that of one of them.

    Raises:
        InputError: the layers of one input alone are over the budget, or nothing is left of it.
    """
    if budget is None:
        return [list(targets)]
    groups: list[list[Target]] = []
    for unit in smallest_groups(targets):
        if budget < 0:
            raise InputError(
                f"--memory: the model and a pass alone are over it by {-budget / 1e9:.2f} GB, "
                "without any curvature: raise it, lower --batch-tokens, or give --recompute"
            )
        if group_bytes(unit, estimator) > budget:
            raise InputError(
                f"--memory leaves {budget / 1e9:.2f} GB for the curvature, and {unit[0].name} with "
                f"what shares its input needs {group_bytes(unit, estimator) / 1e9:.2f} GB: raise "
                "it, lower --batch-tokens, give --recompute, or use --estimator diagonal"
            )
        share = largest_share([*groups[-1], *unit], estimator, processes) if groups else []
        if groups and group_bytes(share, estimator) <= budget:
            groups[-1].extend(unit)
        else:
            groups.append(list(unit))
    return groups
