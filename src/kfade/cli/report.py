"""``kfade report``: one page of what happened, from the folders of runs and evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kfade.cli import options as o
from kfade.cli.session import show
from kfade.report.data import read_results
from kfade.report.figures import all_charts
from kfade.report.page import build_page
from kfade.report.static import write_figures
from kfade.runtime.files import write_text, writing

Folders = Annotated[
    list[Path],
    typer.Argument(
        help="Folders of runs, evaluations, sweeps and attacks, searched to the bottom.",
        show_default=False,
    ),
]


def report(
    folders: Folders,
    out: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("report.html"),
    figures: Annotated[
        Path | None, typer.Option(help="Also write each figure there, as SVG and PNG.")
    ] = None,
    title: Annotated[str | None, typer.Option(help="The page's heading. [the run's name]")] = None,
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
