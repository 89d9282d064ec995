"""Charts as SVG and PNG files, for papers: the same as on the page, drawn by matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

from kfade.errors import InputError
from kfade.report.charts import Chart, Series, drawable
from kfade.report.ticks import log_limits, log_ticks, power
from kfade.runtime.files import writing

SYMBOLS = ("o", "s", "D", "^", "P", "X", "v", "*")
SIZE = (5.2, 3.6)  # inches: a column and a half of a two-column paper
DPI = 200
NOTE_WIDTH = 90  # characters of a line of the note above a chart


def write_figures(charts: Sequence[Chart], folder: Path) -> list[Path]:
    """Write ``KEY.svg`` and ``KEY.png`` of each chart into ``folder``; returns the files.

    Raises:
        InputError: matplotlib is missing, or the folder cannot be written.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("--figures needs matplotlib: pip install 'kfade[report]'") from None
    written = []
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # Text stays text in the SVG, and its ids do not differ from one writing to the next.
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": "kfade", "font.size": 9}):
            for chart in charts:
                figure = Figure(figsize=SIZE, layout="constrained")
                draw(figure.subplots(), chart)
                for path in (folder / f"{chart.key}.svg", folder / f"{chart.key}.png"):
                    undated = {"Date": None} if path.suffix == ".svg" else None
                    figure.savefig(path, dpi=DPI, metadata=undated)
                    written.append(path)
    return written


def draw(axes: Any, chart: Chart) -> None:
    """Draw a chart on matplotlib's axes."""
    chart, _ = drawable(chart)
    axes.set(xlabel=_plain(chart.x.title), ylabel=_plain(chart.y.title))
    axes.set(xscale="log" if chart.x.log else "linear", yscale="log" if chart.y.log else "linear")
    bars = [series for series in chart.series if series.form == "bars"]
    for series in chart.series:
        if series.form == "bars":
            _bars(axes, series, bars)
        else:
            _points(axes, series)
    if chart.x.log:
        axes.set_xlim(log_limits(chart.x_values))
        _tick(axes.xaxis, log_ticks(chart.x_values))
    if chart.y.log:
        axes.set_ylim(log_limits(chart.y_values))
        _tick(axes.yaxis, log_ticks(chart.y_values))
    axes.grid(True, alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    if chart.note:
        lines = [part for line in chart.note for part in wrap(line, NOTE_WIDTH)]
        axes.set_title(_plain("\n".join(lines)), loc="left", fontsize=7)
    if len(chart.series) > 1:
        axes.legend(frameon=False, fontsize=7.5)


def _tick(axis: Any, ticks: Sequence[float]) -> None:
    """Put ticks on a logarithmic axis, which keeps its limits."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: power(value)))
    axis.set_minor_locator(NullLocator())


def _plain(text: str) -> str:
    """Text in which matplotlib finds no formula."""
    return text.replace("$", r"\$")


def _points(axes: Any, series: Series) -> None:
    line = "" if series.form == "marks" else "--" if series.dashed else "-"
    marker = "" if series.form == "line" else SYMBOLS[series.symbol % len(SYMBOLS)]
    style = {"color": series.hue, "linestyle": line, "marker": marker, "markersize": 5}
    axes.plot(series.x, series.y, label=_plain(series.name), linewidth=1.5, **style)
    if series.low and series.form == "line":
        band = {"color": series.hue, "alpha": 0.18, "linewidth": 0}
        axes.fill_between(series.x, series.low, series.high, **band)
    elif series.low:
        down = [y - low for y, low in zip(series.y, series.low, strict=True)]
        up = [high - y for y, high in zip(series.y, series.high, strict=True)]
        axes.errorbar(series.x, series.y, (down, up), fmt="none", ecolor=series.hue, capsize=2)


def _bars(axes: Any, series: Series, all_bars: Sequence[Series]) -> None:
    """Bars beside those of the other series, over the stages' names."""
    names = list(dict.fromkeys(str(x) for bars in all_bars for x in bars.x))
    width = 0.8 / len(all_bars)
    shift = (all_bars.index(series) - (len(all_bars) - 1) / 2) * width
    places = [names.index(str(x)) + shift for x in series.x]
    axes.bar(places, series.y, width, color=series.hue, label=_plain(series.name))
    axes.set_xticks(range(len(names)), names)
