"""``kfade eval choice``: accuracy on multiple-choice questions, or on tasks of lm-eval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kfade.cli import options as o
from kfade.cli.eval import interval
from kfade.cli.session import session, show
from kfade.evaluate.choice import SCORINGS
from kfade.runs.eval_choice import ChoiceRequest, evaluate_choice

NAME_WIDTH = 24  # of the first column of the printed table
COLUMNS = ("letters", "text", "/token", "/character")  # titles of SCORINGS in that table


def choice(
    request: ChoiceRequest = ChoiceRequest(),
    *,
    out: o.Out,
    resume: o.Resume = False,
    json: o.Json = False,
) -> None:
    """Accuracy on multiple-choice questions, or on tasks of lm-eval, with standard errors.

    Example: `kfade eval choice MODEL --update out/run --questions mmlu/test --out out/mmlu`
    """
    with session():
        result = evaluate_choice(request, out, resume=resume)
    show(result, json, _lines(result))


def _lines(result: Mapping[str, Any]) -> list[str]:
    if "tasks" in result:
        return [
            f"{task}: " + ", ".join(f"{name} {interval(value)}" for name, value in figures.items())
            for task, figures in result["tasks"].items()
        ]
    lines = [_row("accuracy in %, by", "n", "chance", COLUMNS)]
    for name, own in result.get("sets", {"all questions": result}).items():
        chance = f"{100 * own['chance']:.1f}"
        lines.append(_row(name, own["questions"], chance, _percents(own["accuracy"])))
        for subject, figures in own.get("subjects", {}).items():
            lines.append(_row(f"  {subject or '-'}", figures["questions"], "", _percents(figures)))
    return [*lines, f"every question in {result['out']}/items.jsonl"]


def _row(name: str, count: object, chance: str, cells: Sequence[str]) -> str:
    """One line of a table 80 characters wide."""
    short = name if len(name) < NAME_WIDTH else f"{name[: NAME_WIDTH - 2]}…"
    return f"{short:<{NAME_WIDTH}}{count:>5}{chance:>7}" + "".join(f"{c:>11}" for c in cells)


def _percents(accuracies: Mapping[str, Any]) -> list[str]:
    """Accuracy ± standard error by each scoring."""
    figures = [accuracies[scoring] for scoring in SCORINGS]
    return [f"{100 * f['value']:.1f} ±{100 * f['standard_error']:.1f}" for f in figures]
