"""Draw the picture of the README from the published table: KL at equal forgetting, by method.

    python benchmarks/overview_figure.py

reads the table "Question by question" of ``docs/results.md`` and writes
``docs/images/overview.svg``.
"""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).parents[1] / "docs"
PAGE, PLOT = DOCS / "results.md", DOCS / "images" / "overview.svg"
SHOWN = {  # rows of the table, by the beginning of their name
    "K-FADE as it is by default": "kfade",
    "K-FADE, EK-FAC, margin": "kfade, one step",
    "RMU": "RMU",
    "NPO": "NPO",
    "KL minimisation": "KL minimisation",
    "gradient ascent": "gradient ascent",
    "SimNPO": "SimNPO",
}
PANELS = {1: "authors of the retain set", 4: "authors that no method was shown"}  # by column
Interval = tuple[float, float, float]


def read_rows(page: str) -> dict[str, dict[int, Interval]]:
    """Mean, lower and upper end of each panel's KL, by the name shown."""
    _, _, section = page.partition("### Question by question")
    table, _, _ = section.partition("\n### ")
    found = {}
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        name = next((name for start, name in SHOWN.items() if cells[0].startswith(start)), None)
        if name is not None:
            found[name] = {column: interval(cells[column]) for column in PANELS}
    missing = set(SHOWN.values()) - set(found)
    if missing:
        raise ValueError(f"{PAGE.name} has no rows of {sorted(missing)}")
    return found


def interval(cell: str) -> Interval:
    """``0.027 (0.0103 to 0.0479)`` as three numbers."""
    mean, low, high = (float(number) for number in re.findall(r"[\d.e-]+\d", cell))
    return mean, low, high


def draw(rows: dict[str, dict[int, Interval]]) -> None:
    """One panel for each group of authors, one line for each method."""
    plt.rcParams.update({"svg.hashsalt": "kfade", "font.size": 11})
    figure, axes = plt.subplots(1, len(PANELS), figsize=(9, 3.2), sharey=True, sharex=True)
    for axis, (column, title) in zip(axes, PANELS.items(), strict=True):
        for place, name in enumerate(reversed(SHOWN.values())):
            mean, low, high = rows[name][column]
            colour = "tab:blue" if name.startswith("kfade") else "0.45"
            axis.plot([low, high], [place, place], color=colour, linewidth=2)
            axis.plot(mean, place, "o", color=colour)
        axis.set(title=title, xscale="log", xlabel="KL from the original model, nats per token")
        axis.set_yticks(range(len(SHOWN)), list(reversed(SHOWN.values())))
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(PLOT, metadata={"Date": None})


if __name__ == "__main__":
    draw(read_rows(PAGE.read_text(encoding="utf-8")))
