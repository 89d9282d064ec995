"""Formats figures for the commands of ``kfade eval``."""

from __future__ import annotations

from collections.abc import Mapping


def interval(figure: Mapping[str, float], digits: int = 3) -> str:
    """A figure as ``value [low, high]`` or ``value ± standard error``."""
    value = f"{figure['value']:.{digits}g}"
    if "low" in figure:
        return f"{value} [{figure['low']:.{digits}g}, {figure['high']:.{digits}g}]"
    return f"{value} ± {figure['standard_error']:.2g}" if "standard_error" in figure else value
