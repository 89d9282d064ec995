"""What a chart shows, apart from how it is drawn.

``interactive.py`` draws charts on the page and ``static.py`` in files for papers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import compress
from typing import Literal

Form = Literal["line", "marks", "line and marks", "bars"]
Place = float | str

# Distinct on white and on near-black, also to most colour-blind readers; grey is for references.
PALETTE = (
    "#3f78d8", "#d9652b", "#279a6c", "#b04fb5", "#a8820c", "#d24a5e", "#2f95ad", "#7d6bd6",
)  # fmt: skip
GREY = "#858b95"


@dataclass(frozen=True)
class Axis:
    """One axis: its title with the unit, and its scale."""

    title: str
    log: bool = False

    def shows(self, value: Place) -> bool:
        """Whether the axis has a place for a value: the name of a category, or a number."""
        if isinstance(value, str):
            return True
        return math.isfinite(value) and (value > 0 or not self.log)


@dataclass(frozen=True)
class Series:
    """One set of points, a line through them, or bars."""

    name: str
    x: tuple[Place, ...]
    y: tuple[float, ...]
    form: Form = "line and marks"
    colour: int | None = 0
    """Index into the palette, which is repeated; None is the grey of references."""
    symbol: int = 0
    dashed: bool = False
    labels: tuple[str, ...] = ()
    """Of each point: what is shown beside its numbers when the mouse is over it."""
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
    note: tuple[str, ...] = ()
    """Lines above the chart: which of its points were made with the same model and data."""

    @property
    def x_values(self) -> list[Place]:
        """The places of all points along x."""
        return [x for series in self.series for x in series.x]

    @property
    def y_values(self) -> list[Place]:
        """The places of all points and ends of intervals along y."""
        return [y for series in self.series for y in (*series.y, *series.low, *series.high)]


def drawable(chart: Chart) -> tuple[Chart, int]:
    """The chart without points that its axes cannot show, and how many those were.

    A point is left out where a value is not finite, or not positive on a logarithmic axis. There
    the lower end of an interval becomes a tenth of the value if it is not positive.
    """
    kept, lost = [], 0
    for series in chart.series:
        places = zip(series.x, series.y, strict=True)
        shown = [chart.x.shows(x) and chart.y.shows(y) for x, y in places]
        lost += shown.count(False)
        if not any(shown):
            continue
        low = series.low
        if chart.y.log and low:
            low = tuple(a if a > 0 else y / 10 for a, y in zip(low, series.y, strict=True))
        kept.append(
            replace(
                series,
                x=tuple(compress(series.x, shown)),
                y=tuple(compress(series.y, shown)),
                labels=tuple(compress(series.labels, shown)),
                low=tuple(compress(low, shown)),
                high=tuple(compress(series.high, shown)),
            )
        )
    return replace(chart, series=tuple(kept)), lost
