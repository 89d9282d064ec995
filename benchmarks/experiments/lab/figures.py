"""The figures of the experiments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .rows import ESTIMATORS

MARKERS = "osD^v<>PX*hp"
COLOURS = {"identity": "#888888", "diagonal": "#d08a1d", "kfac": "#2a7f9e", "ekfac": "#b0305c"}


def draw_utility(
    figures: Mapping[str, Mapping[str, tuple[float | None, float]]],
    retrained: float | None,
    path: Path,
) -> None:
    """Forget quality against utility, a point for each length of a method's update.

    Args:
        retrained: the utility of the retrained model.
    """
    figure, axes = _axes()
    for index, (method, rows) in enumerate(figures.items()):
        points = [(utility, quality) for quality, utility in rows.values() if quality is not None]
        if points:
            utilities, qualities = zip(*points, strict=True)
            axes.plot(utilities, qualities, MARKERS[index % len(MARKERS)], ms=6, label=method)
    if retrained is not None:
        axes.axvline(retrained, color="#bbbbbb", lw=1)
        axes.plot([retrained], [1.0], "k*", ms=10, label="retrained")
        axes.axhline(0.05, color="#bbbbbb", lw=1, ls=":")
        axes.set_yscale("log")
    axes.set(xlabel="model utility", ylabel="forget quality (p-value)")
    _save(figure, axes, path)


def draw_estimators(points: Mapping[str, Sequence[tuple[float, float, float]]], path: Path) -> None:
    """Forget quality and utility against the KL on retained questions, a line for each estimator.

    Args:
        points: (KL, forget quality, utility) at each length, by estimator.
    """
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for index, what in enumerate(("forget quality (p-value)", "model utility"), start=1):
        axes = panels[index - 1]
        for fit, own in points.items():
            if own:
                x, y = [point[0] for point in own], [point[index] for point in own]
                axes.plot(x, y, "-o", color=COLOURS[fit], ms=4, label=ESTIMATORS[fit])
        axes.set(xscale="log", xlabel="KL on retained questions, nats/token", ylabel=what)
    panels[0].set_yscale("log")
    panels[0].legend(frameon=False, fontsize=8)
    _write(figure, path)


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


def draw_attacks(
    attacks: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]], path: Path
) -> None:
    """Forget probability over the steps of each kind of attack, a panel for each, at the attacker's
    best rate; hollow where the update was added again."""
    figure, panels = plt.subplots(
        1, len(attacks), figsize=(8, 3.6), sharey=True, squeeze=False, layout="constrained"
    )
    methods = list(dict.fromkeys(method for rows in attacks.values() for method in rows))
    shown: dict[str, Any] = {}
    for axes, (kind, rows) in zip(panels[0], attacks.items(), strict=True):
        for method, found in rows.items():
            index = methods.index(method)
            style = {"color": f"C{index}", "marker": MARKERS[index], "ms": 5, "lw": 1}
            for state in ("attacked", "reapplied"):
                own = [one for one in found if one["state"] == state]
                points = [(one["step"], one["forget_probability"]) for one in own]
                if points:
                    again = {"mfc": "none", "ls": ":"} if state == "reapplied" else {}
                    (line,) = axes.plot(*zip(*points, strict=True), **style, **again)
                    shown.setdefault(method, line)
        axes.set(title=f"attack: {kind}", xlabel="steps", ylim=(0, 1))
    panels[0][0].set_ylabel("probability of forgotten answers")
    figure.suptitle("at the attacker's best rate; hollow: re-applied", fontsize=8)
    figure.legend(
        shown.values(), shown, frameon=False, fontsize=7, loc="outside lower center", ncols=2
    )
    _write(figure, path)


def draw_specificity(kls: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """KL on benign completions of each method, with its interval."""
    figure, axes = plt.subplots(figsize=(8, 0.6 + 0.3 * len(kls)), layout="constrained")
    for place, (method, kl) in enumerate(reversed(kls.items())):
        ends = [[kl["value"] - kl["low"]], [kl["high"] - kl["value"]]]
        colour = "C0" if method.startswith("K-FADE") else "C3"
        axes.errorbar(kl["value"], place, xerr=ends, fmt="o", ms=5, color=colour, capsize=3)
    axes.set(
        xscale="log",
        xlabel="KL from the base model, nats/token",
        yticks=range(len(kls)),
        yticklabels=reversed(kls),
    )
    _write(figure, path)


def draw_prediction(results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Predicted against measured KL, and forget loss at equal KL."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for setting, style in {"shipped": "-", "memorised": "--"}.items():
        for fit in ("kfac", "ekfac"):
            if f"{setting} {fit}" in results:
                rows, colour = results[f"{setting} {fit}"]["rows"], COLOURS[fit]
                x, measured, exact = (
                    [row[key] for row in rows]
                    for key in ("predicted", "measured_held_out", "exact_held_out")
                )
                label = f"{ESTIMATORS[fit]}, {setting}"
                left.loglog(x, measured, style, color=colour, marker="o", ms=4, label=label)
                left.loglog(x, exact, ":", color=colour, lw=1)
    limits = (1e-6, 1e-1)
    left.loglog(limits, limits, color="#bbbbbb", lw=1, label="measured = predicted")
    left.set(
        xlabel="predicted KL, nats/token",
        ylabel="measured KL, held out, nats/token",
        title="Prediction (dotted: exact quadratic form)",
    )
    for fit, colour in COLOURS.items():
        if f"equal KL {fit}" in results:
            rows = results[f"equal KL {fit}"]["rows"]
            x, y = ([row[key] for row in rows] for key in ("kl", "forget_loss"))
            right.semilogx(x, y, "-o", color=colour, ms=4, label=ESTIMATORS[fit])
    right.set(
        xlabel="measured KL on held-out retain text, nats/token",
        ylabel="forget loss, nats/token",
        title="Forgetting at equal KL",
    )
    right.set_xticks([0.003, 0.01, 0.03], ["0.003", "0.01", "0.03"])
    right.minorticks_off()
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=8)
    _write(figure, path)


def draw_growth(
    curves: Mapping[str, Sequence[Mapping[str, float]]],
    stages: Sequence[str],
    length: int,
    path: Path,
) -> None:
    """Seconds of each stage of a fit against each quantity, both axes logarithmic.

    Args:
        length: tokens of a sequence.
    """
    figure, axes = plt.subplots(1, len(curves), figsize=(10, 3.2), sharey=True)
    for axis, (varied, rows) in zip(axes, curves.items(), strict=True):
        values = [row[varied] * (length if varied == "sequences" else 1) for row in rows]
        for stage in stages:
            axis.plot(values, [row[stage] for row in rows], marker="o", label=stage)
        axis.set(xlabel="tokens" if varied == "sequences" else varied, xscale="log", yscale="log")
        axis.set_xticks(values, [str(value) for value in values])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("seconds")
    axes[0].legend()
    figure.tight_layout()
    _write(figure, path, boxed=True)


def _axes() -> tuple[Any, Any]:
    figure, axes = plt.subplots(figsize=(8, 4.6), layout="constrained")
    axes.set_prop_cycle(color=plt.get_cmap("tab20").colors)
    return figure, axes


def _save(figure: Any, axes: Any, path: Path) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _write(figure, path)


def _write(figure: Any, path: Path, *, boxed: bool = False) -> None:
    """Save the figure, the same bytes each time; axes without their top and right unless boxed."""
    if not boxed:
        for axes in figure.axes:
            axes.spines[["top", "right"]].set_visible(False)
    plt.rcParams["svg.hashsalt"] = "kfade"
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
