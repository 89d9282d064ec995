"""``kfade report``: one page of what happened, from the folders of runs and evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from kfade.cli import options as o
from kfade.cli.session import show
from kfade.report.data import read_results
from kfade.report.figures import all_charts
from kfade.report.page import build_page
from kfade.report.static import write_figures
from kfade.runs.options import MODEL
from kfade.runtime.files import write_text, writing

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
    results = read_results(folders)
    charts, missing = all_charts(results)
    page = build_page(results, charts, missing, title=title)
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, page, errors="replace")
    drawn = write_figures(charts, figures) if figures else []
    result = {
        "out": str(out),
        "bytes": out.stat().st_size,
        "subjects": [subject.name for subject in results.subjects],
        "figures": [chart.key for chart in charts],
        "files": [str(path) for path in drawn],
        "missing": missing,
        "notes": list(results.notes),
    }
    lines = [*results.notes]
    if drawn:
        lines.append(f"{len(drawn)} files of figures written to {figures}")
    lines.append(f"{len(charts)} figures, {len(results.subjects)} models: open {out}")
    show(result, json, lines)
