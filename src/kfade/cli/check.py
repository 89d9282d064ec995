"""``kfade check``: test the assumptions of the method on a given model, before a long run."""

from __future__ import annotations

from kfade.cli import options as o
from kfade.cli.session import session, show
from kfade.runs.checking import CheckRequest
from kfade.runs.checking import check as run_check


def check(request: CheckRequest = CheckRequest(), *, json: o.Json = False) -> None:
    """Check on a few short texts, in about a minute, that kfade supports MODEL.

    It checks that the targets are found; that padding and batch size change neither gradients nor
    generated texts; that the length of a sequence does not change the numbers of others; and how
    the predicted, the exact-quadratic and the measured KL of a small step compare. The exit code is
    1 if a check fails.
    """
    with session():
        result = run_check(request)
    marks = {True: "ok    ", False: "FAILED"}
    show(
        result, json, [f"{marks[f['passed']]} {f['name']}: {f['text']}" for f in result["findings"]]
    )
    if not result["passed"]:
        raise SystemExit(1)
