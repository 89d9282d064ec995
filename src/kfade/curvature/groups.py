"""Layers in groups that fit a memory budget: each group is fitted from its passes to its end.

Shapes: O outputs, I inputs of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence

from kfade.curvature.factors import sum_dtype
from kfade.errors import InputError
from kfade.layers import Target

DECOMPOSITION = 6  # matrices [D, D] of one eigendecomposition: the mean, its copies, Q, work


def group_bytes(group: Sequence[Target], estimator: str) -> int:
    """Bytes of curvature that fitting ``group`` holds at its peak.

    K-FAC: Σ over distinct inputs I² + Σ over layers O², which the bases replace one by one, and
    the eigenvalues O·I. EK-FAC: the bases once more in the model's dtype, where that is another.
    All estimators: the grids O·I, and two more where a sequence's product is turned and squared.
    """
    dtype = group[0].weight.dtype
    size = sum_dtype(dtype).itemsize
    inputs = {target.input_of: target.shape[1] for target in group}
    grids = [target.shape[0] * target.shape[1] for target in group]
    if estimator == "identity":
        return 0
    if estimator == "diagonal":
        return size * (sum(grids) + 2 * max(grids))
    widths = [*inputs.values(), *(target.shape[0] for target in group)]
    factors = sum(width**2 for width in widths)
    decomposing = factors + DECOMPOSITION * max(widths) ** 2
    finished = factors + sum(grids)
    if estimator == "kfac":
        return size * max(decomposing, finished)
    cast = factors * dtype.itemsize if dtype.itemsize < size else 0
    return max(size * decomposing, size * (finished + 2 * max(grids)) + cast)


def group_targets(
    targets: Sequence[Target], estimator: str, budget: int | None
) -> list[list[Target]]:
    """Consecutive targets in as few groups as ``budget`` bytes of curvature allow; None: one.

    Layers that share their input stay together, since they share A.

    Raises:
        InputError: the layers of one input alone are over the budget.
    """
    if budget is None:
        return [list(targets)]
    units: dict[str, list[Target]] = {}
    for target in targets:
        units.setdefault(target.input_of, []).append(target)
    groups: list[list[Target]] = []
    for unit in units.values():
        if group_bytes(unit, estimator) > budget:
            raise InputError(
                f"--memory leaves {budget / 1e9:.2f} GB for the curvature, and {unit[0].name} with "
                f"what shares its input needs {group_bytes(unit, estimator) / 1e9:.2f} GB: raise "
                "it, lower --batch-tokens, or use --estimator diagonal"
            )
        if groups and group_bytes([*groups[-1], *unit], estimator) <= budget:
            groups[-1].extend(unit)
        else:
            groups.append(list(unit))
    return groups
