"""Verbatim-small's table and claims on the results' page."""

from __future__ import annotations

from typing import Any

from lab.pieces import Results
from lab.records import number, table
from lab.rows import request_seconds
from tofu_rows import rows_of
from tofu_seeds import KL_HEADS, kl_cells, kl_claims
from verbatim_small import BOOKS, HIDDEN, SHOWN


def slots(results: Results) -> dict[str, Any]:
    """What the template says of Verbatim-small, by the names of its slots."""
    return {
        "verbatim_books": len(BOOKS),
        "verbatim_shown": SHOWN,
        "verbatim_hidden": HIDDEN,
        "verbatim_methods": methods_table(results),
        "verbatim_claims": table("claim | measured | holds?", kl_claims({0: results})),
    }


def methods_table(results: Results) -> str:
    """All rows that were measured passage by passage."""
    rows = rows_of(results)
    lines = []
    for row in rows:
        if kls := kl_cells(results, rows, row):
            seconds = number(request_seconds(row.told), ".0f")
            only = f"`'report {row.name}' 'by question {row.name}'`"
            lines.append([row.title, row.setting, *kls, seconds, only])
    return table(f"method | setting | {KL_HEADS} | seconds | `--only`", lines)
