"""``kfade eval memorisation``: memorisation of texts, and membership inference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kfade.cli import options as o
from kfade.cli.eval import interval
from kfade.cli.session import session, show
from kfade.evaluate.memorisation import SCORES
from kfade.runs.eval_memorisation import MemorisationRequest, evaluate_memorisation
from kfade.runtime.counts import counted


def memorisation(
    request: MemorisationRequest, *, out: o.Out, resume: o.Resume = False, json: o.Json = False
) -> None:
    """Exact memorisation, extraction strength, perplexity; membership inference by four scores.

    Each line of the files is one text, scored as `kfade unlearn` scores it. Without non-members
    there is no membership inference.

    Example: `kfade eval memorisation MODEL --update out/run --members forget.jsonl
    --non-members other.jsonl --out out/memorisation`
    """
    with session():
        result = evaluate_memorisation(request, out, resume=resume)
    show(result, json, _lines(result))


def _lines(result: Mapping[str, Any]) -> list[str]:
    lines = []
    for key, title in (("members", "members"), ("non_members", "non-members")):
        if key in result:
            own = result[key]
            lines.append(
                f"{title} ({counted(own['texts'], 'text')}, {counted(own['tokens'], 'token')}): "
                "exact memorisation "
                f"{interval(own['exact_memorisation'])}, extraction strength "
                f"{interval(own['extraction_strength'])}, perplexity {own['perplexity']:.4g}"
            )
    beside = result.get("retain", {}).get("auc", {})
    for score in SCORES if "auc" in result else ():
        line = f"membership by {score}: AUC {interval(result['auc'][score])}"
        if score in beside:
            line += f" (retain model {interval(beside[score])})"
        lines.append(line)
    return [*lines, f"every text in {result['out']}/items.jsonl"]
