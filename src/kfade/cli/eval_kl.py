"""``kfade eval kl``: the KL between base and edited model on benign completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kfade.cli import options as o
from kfade.cli.eval import interval
from kfade.cli.session import session, show
from kfade.evaluate.log import read_log
from kfade.runs.eval_kl import KlRequest, evaluate_kl
from kfade.runs.evaluation import ITEMS
from kfade.runtime.counts import counted


def kl(request: KlRequest, *, out: o.Out, resume: o.Resume = False, json: o.Json = False) -> None:
    """Mean KL(MODEL ‖ edited) per token on MODEL's own completions of benign instructions.

    The edited model is MODEL with `--update`, or another model, `--edited`. In the second case the
    two are in memory one after the other. `--quantise` rounds the edited model.

    Example: `kfade eval kl MODEL --update out/run --prompts alpaca.jsonl --out out/kl`
    """
    with session():
        result = evaluate_kl(request, out, resume=resume)
    show(result, json, [] if json else _lines(result, read_log(out / ITEMS).items))


def _lines(result: Mapping[str, Any], items: Mapping[str, Mapping[str, Any]]) -> list[str]:
    quantiles = ", ".join(f"{p} %: {q['value']:.2g}" for p, q in result["quantiles"].items())
    lines = [
        f"KL {interval(result['kl_per_token'])} nats per token on "
        f"{counted(result['tokens'], 'token')} of "
        f"{counted(result['completions'], 'completion')} (95 % interval)",
        f"quantiles over completions: {quantiles}",
        "highest:",
    ]
    for entry in result["worst"][:5]:
        item = items[str(entry["item"])]
        words = " ".join(repr(item["strings"][t["position"]]) for t in entry["tokens"])
        lines.append(f"  {entry['kl']:.2g}  {item['prompt'][:60]!r}: {words}")
    return [*lines, f"every completion in {result['out']}/items.jsonl"]
