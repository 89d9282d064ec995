"""Columns of the headline table: the models, and the values that runs recorded of their bases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kfade.report.data import Results
from kfade.report.origins import compare_results

BEFORE = "\0"  # starts the key of a column of its own; no folder and no model has such a name
ROLES = {"base": "base, before unlearning", "run": "", "model": "as it came"}


@dataclass(frozen=True)
class HeadlineColumn:
    """A column: its head, and the small print below it."""

    name: str
    role: str


def before_columns(results: Results) -> Mapping[str, str]:
    """By run, the key of the column with the values of its unedited model.

    It is the base's column if the base was measured and its runs share the data. Otherwise each
    group of runs of one model and data has a column of its own, if a run recorded the forget loss
    before. A run without either is left out.
    """
    groups = compare_results(results.runs).groups
    bases = {run.name: base for run in results.runs if (base := results.base_of(run))}
    columns = {}
    for run in results.runs:
        base = bases.get(run.name)
        own_groups = {groups[name] for name, other in bases.items() if other is base}
        if base and len(own_groups) == 1:
            columns[run.name] = base.name
        elif run.metrics.get("forget_loss"):
            columns[run.name] = BEFORE + groups[run.name]
    return columns


def headline_columns(results: Results) -> dict[str, HeadlineColumn]:
    """By key: the models in their order, values before ahead of the first of their runs."""
    before = before_columns(results)
    columns: dict[str, HeadlineColumn] = {}
    for subject in results.subjects:
        key = before.get(subject.name, "")
        if key.startswith(BEFORE):
            columns.setdefault(key, HeadlineColumn("before", key.removeprefix(BEFORE)))
        columns[subject.name] = HeadlineColumn(subject.name, ROLES[subject.kind])
    return columns
