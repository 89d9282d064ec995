"""Bootstrap intervals and standard errors: how a figure varies with the choice of items."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 1000
LEVEL = 0.95


def bootstrap(
    statistic: Callable[[NDArray[np.int64]], ArrayLike],
    count: int,
    *,
    seed: int,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> list[dict[str, float]]:
    """Figures over ``count`` items with percentile bootstrap intervals.

    Args:
        statistic: returns the figures [k] of the items with the given numbers, which may repeat.

    Returns:
        ``{"value", "low", "high"}`` of each figure: ``low`` and ``high`` are the (1 ∓ level)/2
        quantiles over resamples of ``count`` items with replacement.
    """
    values = np.asarray(statistic(np.arange(count)), dtype=np.float64)
    draws = np.random.default_rng(seed)
    drawn = np.stack(
        [np.asarray(statistic(draws.integers(0, count, count))) for _ in range(resamples)]
    )
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return [
        {"value": float(v), "low": float(a), "high": float(b)}
        for v, a, b in zip(values, low, high, strict=True)
    ]


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean, s/√n, s the sample's standard deviation; None for one value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
