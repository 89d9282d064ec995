"""Layers in groups that fit a memory budget: each group is fitted from its passes to its end.

Shapes: O outputs, I inputs of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence

from kfade.curvature.factors import sum_dtype
from kfade.errors import InputError
from kfade.layers import Target

DECOMPOSITION = (
    6  # matrices [D, D] that one eigendecomposition holds: the mean, its copies, Q, work
)


def group_bytes(group: Sequence[Target], estimator: str) -> int:
    """Bytes of curvature that fitting ``group`` holds at its peak.

    K-FAC: Σ over distinct inputs I² + Σ over layers O², which the bases replace one by one, and
    the eigenvalues O·I. All estimators: the grids O·I, and one more where products are squared.
    """
    size = sum_dtype(group[0].weight.dtype).itemsize
    inputs = {target.input_of: target.shape[1] for target in group}
    grids = [target.shape[0] * target.shape[1] for target in group]
    if estimator == "identity":
        return 0
    if estimator == "diagonal":
        return size * (sum(grids) + max(grids))
    widths = [*inputs.values(), *(target.shape[0] for target in group)]
    factors = sum(width**2 for width in widths)
    decomposing = factors + DECOMPOSITION * max(widths) ** 2
    finished = factors + sum(grids) + (max(grids) if estimator == "ekfac" else 0)
    return size * max(decomposing, finished)


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
