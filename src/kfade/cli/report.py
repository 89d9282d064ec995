"""``kfade report``: one HTML page from the folders of runs and evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from kfade.cli import options as o
from kfade.cli.session import show
from kfade.runs.options import MODEL
from kfade.runs.reporting import report as run_report
from kfade.runtime.counts import counted

Folders = Annotated[
    list[Path],
    Parameter(
        name="FOLDERS",
        group=MODEL,
        help="Folders of runs, evaluations, sweeps and attacks; subfolders are searched too.",
    ),
]
Page = Annotated[Path, Parameter(help="HTML file to write.")]
Figures = Annotated[
    Path | None,
    Parameter(help="Also write each figure into this folder, as SVG and PNG. Unset: no files."),
]
Title = Annotated[str | None, Parameter(help="Heading of the page. Unset: the name of the run.")]


def report(
    folders: Folders,
    /,
    *,
    out: Page = Path("report.html"),
    figures: Figures = None,
    title: Title = None,
    json: o.Json = False,
) -> None:
    """Write one HTML page that compares runs and their evaluations. It needs no network.

    FOLDERS are those of kfade unlearn and baseline, of kfade eval on the base model and on edited
    ones, of kfade sweep and of kfade attack. The page names the results that are missing.

    Example: `kfade report out/run out/base-eval --out report.html`
    """
    result = run_report(folders, out, figures=figures, title=title)
    lines = [*result["notes"]]
    if result["files"]:
        lines.append(f"{counted(len(result['files']), 'file')} of figures written to {figures}")
    lines.append(
        f"{counted(len(result['figures']), 'figure')}, "
        f"{counted(len(result['subjects']), 'model')}: open {out}"
    )
    show(result, json, lines)
