"""``kfade attack``: fine-tune an unlearned model and measure how much of the forgotten returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kfade.cli import options as o
from kfade.cli.session import session, show
from kfade.runs.attacking import ATTACK, AttackRequest, values_line
from kfade.runs.attacking import attack as run_attack


def attack(
    request: AttackRequest = AttackRequest(),
    *,
    out: o.Out,
    resume: o.Resume = False,
    json: o.Json = False,
) -> None:
    """Fine-tune MODEL with an update, measure how much it relearns, and add the update again.

    Without --update MODEL itself is fine-tuned, as a control. All weights are trained; the files of
    MODEL are not changed. Writes `attack.jsonl`, `metrics.json` and `manifest.json` into OUT;
    --resume continues after the kinds of data that are finished.

    Example: `kfade attack MODEL --update out/run --forget forget.jsonl --data wikitext.jsonl
    --kind benign --data few.jsonl --kind forget --out out/attack`
    """
    with session():
        result = run_attack(request, out, resume=resume)
    show(result, json, _lines(result))


def _lines(result: Mapping[str, Any]) -> list[str]:
    lines = [f"before unlearning: {values_line(result['base'])}"]
    for kind, states in result["last"].items():
        lines += [f"{kind}, {state}: {values_line(values)}" for state, values in states.items()]
    return [*lines, f"every measurement in {result['out']}/{ATTACK}"]
