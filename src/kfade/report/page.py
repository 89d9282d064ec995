"""One self-contained HTML page of everything that was found."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from kfade.errors import InputError
from kfade.report.charts import Chart, drawable
from kfade.report.data import Results
from kfade.report.escape import script_json
from kfade.report.interactive import legend, plotly_chart
from kfade.report.names import method_of
from kfade.report.tables import ROLES, cards, chart_rows, headline_table, provenance, run_tables
from kfade.report.texts import completions, generations
from kfade.report.values import headline


def build_page(
    results: Results, charts: Sequence[Chart], missing: Sequence[str], *, title: str | None = None
) -> str:
    """The page, with plotly.js in it; it needs no network and no file beside it.

    Text of logs and manifests is escaped, and a content policy refuses any script but its own.

    Args:
        missing: a line for each figure that the data do not allow.

    Raises:
        InputError: the packages of the extra ``report`` are missing.
    """
    try:
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise InputError(f"kfade report needs {error.name}: pip install 'kfade[report]'") from None
    shown = [(chart, lost) for chart, lost in map(drawable, charts) if chart.series]
    rows = headline(results)
    answers, answers_left = generations(results)
    texts, texts_left = completions(results)
    data = script_json(
        {
            "charts": [{"key": chart.key, **plotly_chart(chart)} for chart, _ in shown],
            "generations": answers,
            "completions": texts,
        }
    )
    assets = files("kfade.report") / "assets"
    page, style, script = (
        (assets / name).read_text(encoding="utf-8")
        for name in ("page.html.j2", "page.css", "page.js")
    )
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    names = [subject.name for subject in results.subjects]
    content: dict[str, Any] = {
        "title": title or default_title(results),
        "lead": lead(results),
        "subjects": [{"name": s.name, "role": ROLES[s.kind]} for s in results.subjects],
        "headline": headline_table(rows, names) if rows else [],
        "cards": cards(rows, results),
        "tables": run_tables(results),
        "charts": [_chart_entry(chart, lost) for chart, lost in shown],
        "generations": bool(answers),
        "generations_left": answers_left,
        "completions": bool(texts),
        "completions_left": texts_left,
        "provenance": provenance(results),
        "missing": missing,
        "notes": results.notes,
        "version": version("kfade"),
        "style": Markup(style),
        "script": Markup(script),
        "plotly": Markup(get_plotlyjs()),
        "data": Markup(data),
        # Scripts that carry it run; no text of a log can know it.
        "nonce": hashlib.sha256(data.encode("utf-8", "replace")).hexdigest()[:32],
    }
    sections = [("summary", "Summary", True), ("runs", "Runs", content["tables"])]
    sections += [("figures", "Figures", shown), ("generations", "Before and after", answers)]
    sections += [("completions", "Completions", texts), ("provenance", "Provenance", True)]
    content["sections"] = [(anchor, name) for anchor, name, there in sections if there]
    return environment.from_string(page).render(content)


def _chart_entry(chart: Chart, lost: int) -> dict[str, Any]:
    rows, every = chart_rows(chart)
    points = f"{lost} point{'s' * (lost != 1)}" if lost else ""
    return {
        "key": chart.key,
        "title": chart.title,
        "caption": chart.caption,
        "x": chart.x.title,
        "y": chart.y.title,
        "legend": legend(chart),
        "rows": rows,
        "every": every,
        "lost": points,
    }


def default_title(results: Results) -> str:
    """What the page is about, from the names of its parts."""
    runs = results.runs
    if len(runs) == 1:
        return runs[0].name
    if runs:
        return f"{len(runs)} runs side by side"
    parts = [*results.sweeps, *results.attacks]
    return ", ".join(part.name for part in parts) or results.subjects[0].name


def lead(results: Results) -> str:
    """One line below the title: how the runs were made, from which models."""
    methods = list(dict.fromkeys(method_of(run) for run in results.runs))
    models = list(dict.fromkeys(run.model for run in results.runs))
    made = f"{'; '.join(methods)}, on {', '.join(models)}." if methods else ""
    counts = {
        "sweep": len(results.sweeps),
        "attack": len(results.attacks),
        "evaluation": sum(len(subject.measured) for subject in results.subjects),
    }
    told = [f"{n} {what}{'s' * (n > 1)}" for what, n in counts.items() if n]
    return f"{made} {'With ' if made else ''}{', '.join(told)}{'.' if told else ''}".strip()
