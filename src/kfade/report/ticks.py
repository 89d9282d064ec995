"""Limits and ticks of logarithmic axes, the same on the page and in files."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kfade.report.charts import Place

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
FEWEST, MOST = 3, 9  # ticks between the ends
DECADES = 6  # more of them have a tick at some powers of ten only
MARGIN = 0.06  # beside the outermost points, as a part of the axis


def log_limits(values: Sequence[Place]) -> tuple[float, float]:
    """Ends of the axis: the positive values and a margin; a decade on both sides of one value."""
    low, high = _ends(values)
    margin = (high / low) ** MARGIN
    return low / margin, high * margin


def log_ticks(values: Sequence[Place]) -> list[float]:
    """Ticks around the positive values, at least three of them within :func:`log_limits`.

    1, 2 and 5 times powers of ten; powers of ten alone over more than about three decades;
    multiples of one step where the values are too close for that.
    """
    low, high = _ends(values)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    parts = [float(f"{m}e{e}") for e in range(first, last + 1) for m in (1, 2, 5)]
    shown = sum(low <= tick <= high for tick in parts)
    if shown < FEWEST:
        return _multiples(low, high)
    if shown <= MOST:
        return parts
    stride = math.ceil((last - first) / DECADES)
    return [float(f"1e{e}") for e in range(last, first - 1, -stride)][::-1]


def _ends(values: Sequence[Place]) -> tuple[float, float]:
    positive = [value for value in values if not isinstance(value, str) and value > 0] or [1.0]
    low, high = min(positive), max(positive)
    return (low, high) if low < high else (low / 10, high * 10)


def _multiples(low: float, high: float) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, from below the values to above them."""
    least = (high - low) / FEWEST
    power_of_ten = math.floor(math.log10(least))
    step = max(s for m in (1, 2, 5) if (s := float(f"{m}e{power_of_ten}")) <= least)
    numbers = range(math.floor(low / step), math.ceil(high / step) + 1)
    return [float(f"{number * step:.12g}") for number in numbers if number > 0]


def power(value: float) -> str:
    """0.001 to 10 000 plainly, others as in 10⁻⁶ or 2·10⁻⁶."""
    if 1e-3 <= value <= 1e4:
        return f"{value:.12g}"
    mantissa, _, exponent = f"{value:.11e}".partition("e")
    raised = str(int(exponent)).translate(SUPERSCRIPTS)
    front = f"{float(mantissa):.12g}·" if float(mantissa) != 1 else ""
    return f"{front}10{raised}"
