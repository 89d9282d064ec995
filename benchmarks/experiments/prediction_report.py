"""Draw ``prediction.json`` into the table and plot of ``docs/numerics.md``.

    python benchmarks/experiments/prediction_report.py

Replaces what stands between the marks ``<!-- prediction -->`` and ``<!-- /prediction -->`` and
writes ``docs/images/prediction.svg``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "prediction.json"
PAGE = ROOT / "docs" / "numerics.md"
IMAGE = ROOT / "docs" / "images" / "prediction.svg"
COLOURS = {"identity": "#888888", "diagonal": "#d08a1d", "kfac": "#2a7f9e", "ekfac": "#b0305c"}
NAMES = {"identity": "identity", "diagonal": "diagonal", "kfac": "K-FAC", "ekfac": "EK-FAC"}


def main() -> None:
    results = json.loads(RESULTS.read_text())
    text = "\n\n".join([*tables(results), "![predicted and measured KL](images/prediction.svg)"])
    page = re.sub(
        r"(?s)(<!-- prediction -->).*(<!-- /prediction -->)",
        lambda match: f"{match[1]}\n\n{text}\n\n{match[2]}",
        PAGE.read_text(),
    )
    PAGE.write_text(page)
    draw(results)


def tables(results: dict) -> list[str]:
    parts = []
    for setting in ("shipped", "memorised"):
        for estimator in ("kfac", "ekfac"):
            entry = results.get(f"{setting} {estimator}")
            if entry is None:
                continue
            lines = [
                f"**{NAMES[estimator]}, model {setting}**",
                "",
                "| predicted | exact, fit's own | exact, held out | measured, fit's own | "
                "measured, held out | measured / predicted | measured / exact, held out | "
                "forget loss |",
                "| --- | --- | --- | --- | --- | --- | --- | --- |",
            ]
            for row in entry["rows"]:
                own, held = row["measured_fit"], row["measured_held_out"]
                lines.append(
                    f"| {row['predicted']:.0e} | {row['exact_fit']:.1e} | "
                    f"{row['exact_held_out']:.1e} | {own:.1e} | {held:.1e} | "
                    f"{held / row['predicted']:.0f} | {held / row['exact_held_out']:.2f} | "
                    f"{row['forget_loss']:.2f} |"
                )
            ratios = [pair["fitted"] / pair["exact"] for pair in entry["random"]]
            shown = ", ".join(f"{ratio:.2f}" for ratio in ratios)
            lines += ["", f"Control, fitted / exact form along random directions: {shown}."]
            parts.append("\n".join(lines))
    equal = {e: results[f"equal KL {e}"] for e in NAMES if f"equal KL {e}" in results}
    if equal:
        before = next(iter(equal.values()))["forget_loss_before"]
        count = len(next(iter(equal.values()))["rows"])
        head = [f"{equal['ekfac']['rows'][i]['kl']:.3f}" for i in range(count)]
        lines = [
            "**Forget loss at equal measured KL** (demo's subject, model as shipped; "
            f"{before:.2f} before)",
            "",
            f"| estimator | KL ≈ {' | KL ≈ '.join(head)} |",
            f"| --- {'| --- ' * count}|",
        ]
        for estimator, entry in equal.items():
            cells = " | ".join(f"{row['forget_loss']:.2f}" for row in entry["rows"])
            lines.append(f"| {NAMES[estimator]} | {cells} |")
        parts.append("\n".join(lines))
    return parts


def draw(results: dict) -> None:
    plt.rcParams["svg.hashsalt"] = "kfade"
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    styles = {"shipped": "-", "memorised": "--"}
    for setting, style in styles.items():
        for estimator in ("kfac", "ekfac"):
            entry = results.get(f"{setting} {estimator}")
            if entry is None:
                continue
            x = [row["predicted"] for row in entry["rows"]]
            colour = COLOURS[estimator]
            label = f"{NAMES[estimator]}, {setting}"
            measured = [row["measured_held_out"] for row in entry["rows"]]
            exact = [row["exact_held_out"] for row in entry["rows"]]
            axes[0].loglog(x, measured, style, color=colour, marker="o", ms=4, label=label)
            axes[0].loglog(x, exact, ":", color=colour, lw=1)
    limits = (1e-6, 1e-1)
    axes[0].loglog(limits, limits, color="#bbbbbb", lw=1, label="measured = predicted")
    axes[0].set(
        xlabel="predicted KL, nats/token",
        ylabel="measured KL, held out, nats/token",
        title="Prediction (dotted: exact quadratic form)",
    )
    for estimator in NAMES:
        entry = results.get(f"equal KL {estimator}")
        if entry is not None:
            x = [row["kl"] for row in entry["rows"]]
            y = [row["forget_loss"] for row in entry["rows"]]
            colour = COLOURS[estimator]
            axes[1].semilogx(x, y, "-o", color=colour, ms=4, label=NAMES[estimator])
    axes[1].set(
        xlabel="measured KL on held-out retain text, nats/token",
        ylabel="forget loss, nats/token",
        title="Forgetting at equal KL",
    )
    axes[1].set_xticks([0.003, 0.01, 0.03], ["0.003", "0.01", "0.03"])
    axes[1].minorticks_off()
    for axis in axes:
        axis.legend(frameon=False, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    IMAGE.parent.mkdir(exist_ok=True)
    figure.savefig(IMAGE, metadata={"Date": None})


if __name__ == "__main__":
    main()
