"""What a chart shows, apart from how it is drawn: the page and the papers' files draw the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

T = TypeVar("T")
Form = Literal["line", "marks", "line and marks", "bars"]
Place = float | str

# Seen apart on white and on near-black, also by most colour-blind eyes; grey is for references.
PALETTE = (
    "#3f78d8", "#d9652b", "#279a6c", "#b04fb5", "#a8820c", "#d24a5e", "#2f95ad", "#7d6bd6",
)  # fmt: skip
GREY = "#858b95"


@dataclass(frozen=True)
class Axis:
    """One axis: its title with the unit, and its scale."""

    title: str
    log: bool = False


@dataclass(frozen=True)
class Series:
    """One set of points, a line through them, or bars."""

    name: str
    x: tuple[Place, ...]
    y: tuple[float, ...]
    form: Form = "line and marks"
    colour: int | None = 0
    """Index into the palette, turning over at its end; None is the grey of references."""
    symbol: int = 0
    dashed: bool = False
    labels: tuple[str, ...] = ()
    """What a point says when pointed at, besides its numbers."""
    low: tuple[float, ...] = ()
    """Lower ends of the intervals: a band along a line, else a bar at each mark."""
    high: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for values in (self.y, self.labels or self.x, self.low or self.x, self.high or self.x):
            assert len(values) == len(self.x), self.name

    @property
    def hue(self) -> str:
        """Its colour, as #rrggbb."""
        return GREY if self.colour is None else PALETTE[self.colour % len(PALETTE)]


@dataclass(frozen=True)
class Chart:
    """One figure."""

    key: str
    """Name of its files and anchor."""
    title: str
    caption: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]


def drawable(chart: Chart) -> tuple[Chart, int]:
    """The chart without points that its axes cannot show, and how many those were.

    A point is left out where a value is not finite, or not positive on a logarithmic axis.
    """
    kept, lost = [], 0
    for series in chart.series:
        at = [
            i
            for i in range(len(series.x))
            if _shows(chart.x, series.x[i]) and _shows(chart.y, series.y[i])
        ]
        lost += len(series.x) - len(at)
        if not at:
            continue
        low, high = _inside(chart.y, series)
        kept.append(
            replace(
                series,
                x=pick(series.x, at),
                y=pick(series.y, at),
                labels=pick(series.labels, at),
                low=pick(low, at),
                high=pick(high, at),
            )
        )
    return replace(chart, series=tuple(kept)), lost


def pick(values: Sequence[T], at: Sequence[int]) -> tuple[T, ...]:
    """The values at those places; none of none."""
    return tuple(values[i] for i in at) if values else ()


def _shows(axis: Axis, value: Place) -> bool:
    if isinstance(value, str):
        return True
    return math.isfinite(value) and (value > 0 or not axis.log)


def _inside(axis: Axis, series: Series) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The intervals with lower ends that a logarithmic axis can show: a tenth of the value."""
    if not axis.log or not series.low:
        return series.low, series.high
    low = tuple(
        end if end > 0 else value / 10 for end, value in zip(series.low, series.y, strict=True)
    )
    return low, series.high
