"""Charts for the page: plain dictionaries that plotly.js draws.

The page's script sets the colours of text and grid: it knows whether the page is light or dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from kfade.report.charts import Axis, Chart, Place, Series
from kfade.report.ticks import log_limits, log_ticks, power

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "triangle-down", "star")
GLYPHS = "●■◆▲✚✖▼★"  # the same symbols as characters, for the legend
MODES = {"line": "lines", "marks": "markers", "line and marks": "lines+markers"}


def plotly_chart(chart: Chart) -> dict[str, Any]:
    """``{"data", "layout"}`` of a chart that :func:`~kfade.report.charts.drawable` gave."""
    categories = any(isinstance(value, str) for value in chart.x_values)
    return {
        "data": [trace for series in chart.series for trace in _traces(chart, series)],
        "layout": {
            "xaxis": _axis(chart.x, chart.x_values) | ({"type": "category"} if categories else {}),
            "yaxis": _axis(chart.y, chart.y_values),
            "hovermode": "closest",
            "barmode": "group",
        },
    }


def legend(chart: Chart) -> list[dict[str, Any]]:
    """What the page's own legend shows of each series, and the numbers of its traces."""
    entries, first = [], 0
    for series in chart.series:
        count = len(_traces(chart, series))
        glyph = {"bars": "■", "line": ""}.get(series.form, GLYPHS[series.symbol % len(GLYPHS)])
        entries.append(
            {
                "name": series.name,
                "hue": series.hue,
                "line": "line" in series.form,
                "dashed": series.dashed,
                "glyph": glyph,
                "traces": str(list(range(first, first + count))),
            }
        )
        first += count
    return entries


def _axis(axis: Axis, values: Sequence[Place]) -> dict[str, Any]:
    """Title and scale, a logarithmic one with limits and ticks of our own."""
    plain = {"title": {"text": escape(axis.title), "standoff": 6}}
    if not axis.log:
        return plain
    ticks = log_ticks(values)
    limits = [math.log10(end) for end in log_limits(values)]
    labels = [power(tick) for tick in ticks]
    return {**plain, "type": "log", "range": limits, "tickvals": ticks, "ticktext": labels}


def _traces(chart: Chart, series: Series) -> list[dict[str, Any]]:
    """One series; plotly reads a little HTML in names and labels, so they are escaped."""
    name = escape(series.name)
    categories = any(isinstance(x, str) for x in series.x)
    hover = [f"<b>{name}</b>", *(["%{customdata}"] if series.labels else [])]
    hover += [f"{escape(chart.x.title)}: {'%{x}' if categories else '%{x:.3~g}'}"]
    hover += [f"{escape(chart.y.title)}: %{{y:.3~g}}<extra></extra>"]
    trace: dict[str, Any] = {
        "name": name,
        "x": list(series.x),
        "y": list(series.y),
        "customdata": [*map(escape, series.labels)] or [""] * len(series.x),
        "hovertemplate": "<br>".join(hover),
    }
    if series.form == "bars":
        return [{**trace, "type": "bar", "marker": {"color": series.hue}}]
    trace |= {
        "type": "scatter",
        "mode": MODES[series.form],
        "line": {"color": series.hue, "width": 2, "dash": "dash" if series.dashed else "solid"},
        "marker": {
            "color": series.hue,
            "size": 9 if series.form == "marks" else 7,
            "symbol": SYMBOLS[series.symbol % len(SYMBOLS)],
        },
    }
    if not series.low:
        return [trace]
    if series.form == "line":
        return [*_band(series), trace]
    up = [high - y for high, y in zip(series.high, series.y, strict=True)]
    down = [y - low for low, y in zip(series.low, series.y, strict=True)]
    trace["error_y"] = {"type": "data", "array": up, "arrayminus": down, "thickness": 1}
    return [trace]


def _band(series: Series) -> list[dict[str, Any]]:
    """An area between two invisible lines."""
    red, green, blue = (int(series.hue[i : i + 2], 16) for i in (1, 3, 5))
    edge = {
        "type": "scatter",
        "mode": "lines",
        "x": list(series.x),
        "line": {"width": 0},
        "hoverinfo": "skip",
    }
    fill = {"fill": "tonexty", "fillcolor": f"rgba({red},{green},{blue},0.18)"}
    return [{**edge, "y": list(series.low)}, {**edge, "y": list(series.high), **fill}]
