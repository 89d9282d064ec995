"""Report: one HTML page from the folders of runs and evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kfade.report.data import read_results
from kfade.report.figures import all_charts
from kfade.report.page import build_page
from kfade.report.static import write_figures
from kfade.runtime.files import write_text, writing


def report(
    folders: Sequence[Path], out: Path, *, figures: Path | None = None, title: str | None = None
) -> dict[str, Any]:
    """Write one HTML page that compares runs and their evaluations; returns a summary of the page.

    Args:
        folders: folders of results; subfolders are searched too.
        figures: folder for each figure as SVG and PNG. None: figures are in the page only.
        title: heading of the page. None: the run's name.

    Raises:
        InputError: no results in the folders, or a package is missing.
    """
    results = read_results(folders)
    charts, missing = all_charts(results)
    page = build_page(results, charts, missing, title=title)
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, page, errors="replace")
    drawn = write_figures(charts, figures) if figures else []
    return {
        "out": str(out),
        "bytes": out.stat().st_size,
        "subjects": [subject.name for subject in results.subjects],
        "figures": [chart.key for chart in charts],
        "files": [str(path) for path in drawn],
        "missing": missing,
        "notes": list(results.notes),
    }
