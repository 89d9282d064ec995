"""Charts for the page: plain dictionaries that plotly.js draws.

Colours of text and grid are left to the page's script, which knows whether it is light or dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from kfade.report.charts import Axis, Chart, Place, Series
from kfade.report.escape import escape

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "triangle-down", "star")
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
GLYPHS = "●■◆▲✚✖▼★"
MODES = {"line": "lines", "marks": "markers", "line and marks": "lines+markers"}


def plotly_chart(chart: Chart) -> dict[str, Any]:
    """``{"data", "layout"}`` of a chart that :func:`~kfade.report.charts.drawable` gave."""
    data: list[dict[str, Any]] = []
    for series in chart.series:
        if series.form == "line" and series.low:
            data += _band(series)
        data.append(_trace(chart, series))
    words = any(isinstance(x, str) for s in chart.series for x in s.x)
    return {
        "data": data,
        "layout": {
            "xaxis": {
                **_axis(chart.x, [x for s in chart.series for x in s.x]),
                **({"type": "category"} if words else {}),
            },
            "yaxis": _axis(chart.y, [y for s in chart.series for y in (*s.y, *s.low, *s.high)]),
            "hovermode": "closest",
            "barmode": "group",
        },
    }


def legend(chart: Chart) -> list[dict[str, Any]]:
    """What the page's own legend shows of each series, and the numbers of its traces."""
    entries, at = [], 0
    for series in chart.series:
        count = 3 if series.form == "line" and series.low else 1
        entries.append(
            {
                "name": series.name,
                "hue": series.hue,
                "line": "line" in series.form,
                "dashed": series.dashed,
                "glyph": "■" if series.form == "bars" else _glyph(series),
                "traces": str(list(range(at, at + count))),
            }
        )
        at += count
    return entries


def _glyph(series: Series) -> str:
    return "" if series.form == "line" else GLYPHS[series.symbol % len(GLYPHS)]


def _axis(axis: Axis, values: Sequence[Place]) -> dict[str, Any]:
    """Title and scale, a logarithmic one with ticks of our own."""
    plain = {"title": {"text": escape(axis.title), "standoff": 6}}
    if not axis.log:
        return plain
    ticks = log_ticks([value for value in values if not isinstance(value, str)])
    return {**plain, "type": "log", "tickvals": ticks, "ticktext": [*map(power, ticks)]}


def log_ticks(values: Sequence[float]) -> list[float]:
    """1, 2, 5 times powers of ten around the values; over many decades, some whole ones."""
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
    raised = str(int(exponent)).translate(RAISED)
    front = f"{float(mantissa):g}·" if float(mantissa) != 1 else ""
    return f"{front}10{raised}"


def _trace(chart: Chart, series: Series) -> dict[str, Any]:
    """One series; plotly reads a little HTML in names and labels, so they are escaped."""
    names = [*map(escape, series.labels)] if series.labels else [""] * len(series.x)
    trace: dict[str, Any] = {
        "name": escape(series.name),
        "x": list(series.x),
        "y": list(series.y),
        "customdata": names,
        "hovertemplate": f"<b>{escape(series.name)}</b><br>%{{customdata}}<br>"
        f"{escape(chart.x.title)}: %{{x:.3~g}}<br>{escape(chart.y.title)}: %{{y:.3~g}}"
        "<extra></extra>",
    }
    if not series.labels:
        trace["hovertemplate"] = trace["hovertemplate"].replace("%{customdata}<br>", "")
    if any(isinstance(x, str) for x in series.x):
        trace["hovertemplate"] = trace["hovertemplate"].replace("%{x:.3~g}", "%{x}")
    if series.form == "bars":
        return {**trace, "type": "bar", "marker": {"color": series.hue}}
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
    if series.low and series.form != "line":
        up = [high - y for high, y in zip(series.high, series.y, strict=True)]
        down = [y - low for low, y in zip(series.low, series.y, strict=True)]
        trace["error_y"] = {"type": "data", "array": up, "arrayminus": down, "thickness": 1}
    return trace


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
