"""``kfade check``: prove on the user's own model, before a long run, what the method rests on."""

from __future__ import annotations

from kfade.cli import options as o
from kfade.cli.session import session, show
from kfade.runs.checking import CheckRequest
from kfade.runs.checking import check as run_check


def check(request: CheckRequest = CheckRequest(), *, json: o.Json = False) -> None:
    """Check in about a minute that MODEL can be unlearned with, on a few short texts.

    That the targets are found; that padding and batch size do not change the gradients, nor what
    is generated; where the length of a sequence matters, that others' does not; how the predicted,
    the exact-quadratic and the measured KL of a small step relate. Exit code 1 if one of them
    fails.
    """
    with session():
        result = run_check(request)
    marks = {True: "ok    ", False: "FAILED"}
    show(
        result, json, [f"{marks[f['passed']]} {f['name']}: {f['text']}" for f in result["findings"]]
    )
    if not result["passed"]:
        raise SystemExit(1)
