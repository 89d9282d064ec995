"""``kfade plan``: what a fit and a step need in memory and time, from the configuration alone."""

from __future__ import annotations

from kfade.cli import options as o
from kfade.cli.plan_page import page
from kfade.cli.session import console, session, show
from kfade.runs.planning import PlanRequest
from kfade.runs.planning import plan as run_plan


def plan(request: PlanRequest = PlanRequest(), *, json: o.Json = False) -> None:
    """Say what unlearning with MODEL will need: bytes, groups of layers, flops, seconds.

    Only MODEL's configuration is read. With `--memory`, says in how many groups the layers are
    fitted and whether each stage fits; with `--speed` or `--measure`, how long each takes.
    """
    with session():
        result = run_plan(request)
    show(result, json, [])
    if not json:
        for part in page(result):
            console.print(part)
