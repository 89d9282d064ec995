"""``kfade report``: one page of what happened, from the folders of runs and evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from kfade.cli import options as o
from kfade.cli.session import show
from kfade.runs.options import MODEL
from kfade.runs.reporting import report as run_report

Folders = Annotated[
    list[Path],
    Parameter(
        name="FOLDERS",
        group=MODEL,
        help="Folders of runs, evaluations, sweeps and attacks; subfolders are searched too.",
    ),
]
Page = Annotated[Path, Parameter(help="The HTML file to write.")]
Figures = Annotated[
    Path | None, Parameter(help="Also write each figure into this folder, as SVG and PNG.")
]
Title = Annotated[str | None, Parameter(help="The page's heading. Unset: the run's name.")]


def report(
    folders: Folders,
    /,
    *,
    out: Page = Path("report.html"),
    figures: Figures = None,
    title: Title = None,
    json: o.Json = False,
) -> None:
    """Write one HTML page of runs and their evaluations, side by side; it needs no network.

    Give the folders of kfade unlearn and baseline, of kfade eval on the base model and on the
    edited ones, of kfade sweep and kfade attack. What is missing is left out; the page says so.

    Example: `kfade report out/run out/base-eval --out report.html`
    """
    result = run_report(folders, out, figures=figures, title=title)
    lines = [*result["notes"]]
    if result["files"]:
        lines.append(f"{len(result['files'])} files of figures written to {figures}")
    lines.append(f"{len(result['figures'])} figures, {len(result['subjects'])} models: open {out}")
    show(result, json, lines)
