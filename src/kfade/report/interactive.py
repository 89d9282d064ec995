"""Charts for the page: plain dictionaries that plotly.js draws.

The page's script sets the colours of text and grid: it knows whether the page is light or dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from kfade.report.charts import Axis, Chart, Place, Series

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "triangle-down", "star")
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
GLYPHS = "●■◆▲✚✖▼★"  # the same symbols as characters, for the legend
MODES = {"line": "lines", "marks": "markers", "line and marks": "lines+markers"}


def plotly_chart(chart: Chart) -> dict[str, Any]:
    """``{"data", "layout"}`` of a chart that :func:`~kfade.report.charts.drawable` gave."""
    x = [x for series in chart.series for x in series.x]
    y = [y for series in chart.series for y in (*series.y, *series.low, *series.high)]
    categories = any(isinstance(value, str) for value in x)
    return {
        "data": [trace for series in chart.series for trace in _traces(chart, series)],
        "layout": {
            "xaxis": _axis(chart.x, x) | ({"type": "category"} if categories else {}),
            "yaxis": _axis(chart.y, y),
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
    """Title and scale, a logarithmic one with ticks of our own."""
    plain = {"title": {"text": escape(axis.title), "standoff": 6}}
    if not axis.log:
        return plain
    ticks = log_ticks([value for value in values if not isinstance(value, str)])
    return {**plain, "type": "log", "tickvals": ticks, "ticktext": [*map(power, ticks)]}


def log_ticks(values: Sequence[float]) -> list[float]:
    """1, 2, 5 times powers of ten around the values; over many decades, some powers of ten only."""
    positive = [value for value in values if value > 0] or [1.0]
    first = math.floor(math.log10(min(positive)))
    last = math.ceil(math.log10(max(positive)))
    if last - first <= 2:
        return [float(f"{m}e{e}") for e in range(first, last + 1) for m in (1, 2, 5)]
    stride = math.ceil((last - first) / 6)
    return [float(f"1e{e}") for e in range(last, first - 1, -stride)][::-1]


def power(value: float) -> str:
    """0.001 to 10 000 plainly, others as in 10⁻⁶ or 2·10⁻⁶."""
    if 1e-3 <= value <= 1e4:
        return f"{value:g}"
    mantissa, _, exponent = f"{value:e}".partition("e")
    raised = str(int(exponent)).translate(SUPERSCRIPTS)
    front = f"{float(mantissa):g}·" if float(mantissa) != 1 else ""
    return f"{front}10{raised}"


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
