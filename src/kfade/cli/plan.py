"""``kfade plan``: predict the memory and time of a fit and a step from a model's configuration."""

from __future__ import annotations

from kfade.cli import options as o
from kfade.cli.plan_page import page
from kfade.cli.session import console, session, show
from kfade.runs.planning import PlanRequest
from kfade.runs.planning import plan as run_plan


def plan(request: PlanRequest = PlanRequest(), *, json: o.Json = False) -> None:
    """Predict bytes, groups of layers, flops and seconds of unlearning with MODEL.

    Only MODEL's configuration is read. With `--memory` it prints in how many groups the layers are
    fitted and whether each stage fits; with `--speed` or `--measure`, how long each stage takes.
    """
    with session():
        result = run_plan(request)
    show(result, json, [])
    if not json:
        for part in page(result):
            console.print(part)
