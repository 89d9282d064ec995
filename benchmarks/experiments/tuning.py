"""Which settings are tried, and which of them is chosen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pieces import Results

from kfade import Direction, cross_entropy

VARIANTS: dict[str, dict[str, Any]] = {  # what may better K-FADE's step; all by one fit
    "steps 3": {"steps": 3},
    "steps 3 then ce": {"steps": 3, "direction": Direction(later_objective=cross_entropy)},
    "refine 1": {"direction": Direction(refine=1)},
    "refine 3": {"direction": Direction(refine=3)},
    "steps 3 refine 1": {"steps": 3, "direction": Direction(refine=1)},
}


def chosen(results: Results, row: str) -> float | None:
    """The damping or the rate that was best on the tuning authors, of those tried."""
    prefix = f"tune {row} "
    tried = {name: told for name, told in results.items() if name.startswith(prefix)}
    return lowest((float(name.removeprefix(prefix)), told) for name, told in tried.items())


def rates(results: Results, name: str, rate: float, most: int) -> Iterator[float]:
    """Halves of the first rate as long as the held-out KL at the target falls; where the first does
    not reach the target at all, doubles of it until one does."""
    up, least = False, math.inf
    for index in range(most):
        yield rate
        told = results.get(f"tune {name} {rate:g}")
        if told is None:
            return
        late = "failure" in told and bool(told["curve"])  # without a curve it was too fast
        kl = told.get("kl", math.inf)
        if index == 0:
            up = late
        elif late != up or (not up and kl > least):
            return
        least = min(least, kl)
        rate *= 2 if up else 0.5


def lowest(rows: Iterable[tuple[Any, Mapping[str, Any]]]) -> Any | None:
    """Of (setting, row) pairs the setting of the lowest held-out KL at the target.

    Where none has got there: the one that came nearest. None of no rows.
    """

    def order(row: Mapping[str, Any]) -> tuple[bool, float]:
        if "failure" in row:
            return True, min((point["forget_probability"] for point in row["curve"]), default=1.0)
        return False, row["kl"]

    return min(rows, key=lambda pair: order(pair[1]), default=(None, {}))[0]
