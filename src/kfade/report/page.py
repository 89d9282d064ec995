"""One self-contained HTML page of everything that was found."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from importlib.metadata import version
from importlib.resources import files
from itertools import groupby
from typing import Any

from jinja2 import Environment, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from kfade.errors import InputError
from kfade.report.before import ROLES, headline_columns
from kfade.report.charts import Chart, drawable
from kfade.report.data import Results
from kfade.report.interactive import legend, plotly_chart
from kfade.report.names import method_of
from kfade.report.origins import compare_results
from kfade.report.tables import (
    cards,
    chart_rows,
    details,
    facts,
    run_tables,
    settings,
    written,
)
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
        InputError: plotly is missing.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise InputError("kfade report needs plotly: pip install 'kfade[report]'") from None
    shown = [(chart, lost) for chart, lost in map(drawable, charts) if chart.series]
    rows = headline(results)
    answers, answers_left = generations(results)
    texts, texts_left = completions(results)
    tables = run_tables(results)
    drawn = [{"key": chart.key, **plotly_chart(chart)} for chart, _ in shown]
    data = script_json({"charts": drawn, "generations": answers, "completions": texts})
    sections = (
        ("summary", "Summary", True),
        ("runs", "Runs", tables),
        ("figures", "Figures", shown),
        ("generations", "Before and after", answers),
        ("completions", "Completions", texts),
        ("provenance", "Provenance", True),
    )
    page, style, script = (
        (files("kfade.report") / "assets" / name).read_text(encoding="utf-8")
        for name in ("page.html.j2", "page.css", "page.js")
    )
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    for function in (written, details, legend, chart_rows, facts, settings):
        environment.globals[function.__name__] = function
    return environment.from_string(page).render(
        title=title or default_title(results),
        lead=lead(results),
        sections=[(anchor, name) for anchor, name, there in sections if there],
        subjects=results.subjects,
        columns=headline_columns(results),
        note=compare_results(results.runs).note,
        roles=ROLES,
        headline=[(group, [*own]) for group, own in groupby(rows, lambda row: row.metric.group)],
        cards=cards(rows, results),
        tables=tables,
        charts=shown,
        generations=bool(answers),
        generations_left=answers_left,
        completions=bool(texts),
        completions_left=texts_left,
        missing=missing,
        notes=results.notes,
        version=version("kfade"),
        style=Markup(style),
        script=Markup(script),
        plotly=Markup(get_plotlyjs()),
        data=data,
        # Only scripts that carry it run. It cannot be guessed by whoever wrote a text in a log.
        nonce=hashlib.sha256(data.encode("utf-8", "replace")).hexdigest()[:32],
    )


def script_json(content: Any) -> Markup:
    """JSON that can stand within a ``<script>``: no ``<``, ``>``, ``&`` or ``'`` in it as such.

    Numbers that are not finite, which JSON does not have, become null.
    """
    compact = (",", ":")
    return htmlsafe_json_dumps(
        _finite(content), ensure_ascii=False, separators=compact, allow_nan=False
    )


def _finite(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return content


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
    """One line below the title: how the runs were made, from which models, and what is beside."""
    methods = dict.fromkeys(method_of(run) for run in results.runs)
    models = dict.fromkeys(run.model for run in results.runs)
    counts = {
        "sweep": len(results.sweeps),
        "attack": len(results.attacks),
        "evaluation": sum(len(subject.measured) for subject in results.subjects),
    }
    beside = ", ".join(f"{n} {what}{'s' * (n > 1)}" for what, n in counts.items() if n)
    if not results.runs:
        return f"{beside}." if beside else ""
    made = f"{'; '.join(methods)}, on {', '.join(models)}."
    return f"{made} With {beside}." if beside else made
