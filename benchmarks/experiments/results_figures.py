"""The figures of the results' page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from kfade.evaluate.tofu_logs import TofuLog, aggregate

MARKERS = "osD^v<>PX*hp"


def draw_utility(
    figures: Mapping[str, Mapping[str, tuple[float | None, float]]],
    retrained: TofuLog | None,
    path: Path,
) -> None:
    """Forget quality against utility, a point for each row of a method."""
    figure, axes = _axes()
    for index, (method, rows) in enumerate(figures.items()):
        points = [(utility, quality) for quality, utility in rows.values() if quality is not None]
        if points:
            utilities, qualities = zip(*points, strict=True)
            axes.plot(utilities, qualities, MARKERS[index % len(MARKERS)], ms=6, label=method)
    if retrained is not None:
        utility = aggregate(retrained)["model_utility"]
        axes.axvline(utility, color="#bbbbbb", lw=1)
        axes.plot([utility], [1.0], "k*", ms=10, label="retrained")
        axes.axhline(0.05, color="#bbbbbb", lw=1, ls=":")
        axes.set_yscale("log")
    axes.set(xlabel="model utility", ylabel="forget quality (p-value)")
    _save(figure, axes, path)


def draw_kl(
    curves: Mapping[str, Sequence[Mapping[str, float]]],
    retrained: Mapping[str, Any] | None,
    path: Path,
) -> None:
    """KL on held-out retain questions against forget probability, along each method's way."""
    figure, axes = _axes()
    for index, (method, curve) in enumerate(curves.items()):
        points = sorted((p["forget_probability"], p["kl"]) for p in curve if p["kl"] > 0)
        if points:
            marker = MARKERS[index % len(MARKERS)]
            axes.plot(*zip(*points, strict=True), marker=marker, ms=4, lw=1, label=method)
            axes.set_yscale("log")
    if retrained is not None:
        axes.axvline(retrained["forget_probability"], color="#bbbbbb", lw=1)
        at = ([retrained["forget_probability"]], [retrained["kl"]])
        axes.plot(*at, "k*", ms=10, label="retrained")
    axes.set(
        xlabel="mean probability of the forgotten answers",
        ylabel="KL from the full model, held out, nats/token",
    )
    _save(figure, axes, path)


def _axes() -> tuple[Any, Any]:
    plt.rcParams["svg.hashsalt"] = "kfade"
    figure, axes = plt.subplots(figsize=(8, 4.6), layout="constrained")
    axes.set_prop_cycle(color=plt.get_cmap("tab20").colors)
    return figure, axes


def _save(figure: Any, axes: Any, path: Path) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
