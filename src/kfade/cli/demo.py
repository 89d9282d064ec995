"""``kfade demo``: make SmolLM2-135M-Instruct forget the capitals of the world."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.table import Table

from kfade.cli import options as o
from kfade.cli.session import console, session, show
from kfade.cli.unlearn import summary
from kfade.demo.run import PROMPTS, table_rows
from kfade.runs.demonstrating import demo as run_demo

OtherModel = Annotated[
    str | None, Parameter(help="Hub id, folder or GGUF file. Unset: SmolLM2-135M-Instruct.")
]


def demo(*, out: o.Out = Path("out/demo"), model: OtherModel = None, json: o.Json = False) -> None:
    """Make SmolLM2-135M-Instruct forget the capitals of the world, and show what changed.

    The forget set is statements about 74 countries; the questions use other words. Accuracy on
    related geography and on general knowledge should not change. It takes five to eight minutes on
    two cores.
    """
    with session():
        result = run_demo(out, model)
    before, after = result["before"], result["after"]
    if not json:
        answers = Table("prompt", "before", "after", title="Greedy continuations")
        for prompt, old, new in zip(PROMPTS, before["answers"], after["answers"], strict=True):
            answers.add_row(prompt, old, new)
        accuracy = Table(
            title="Accuracy with four choices, %, by likelihood per token and in total"
        )
        for column in (
            "questions (not used in fitting)",
            "per token, before",
            "per token, after",
            "total, before",
            "total, after",
        ):
            accuracy.add_column(column)
        for row in table_rows(before, after):
            accuracy.add_row(*row)
        console.print(answers)
        console.print(accuracy)
    budget = f"budget of retain KL: {result['kl_budget']} nats/token"
    show(result, json, [*summary(result), budget])
