"""``kfade eval memorisation``: what a model still reproduces, and what gives a text away."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from kfade.cli import options as o
from kfade.cli.eval import interval
from kfade.cli.session import session, show
from kfade.evaluate.memorisation import MIN_K, SCORES
from kfade.runs.eval_memorisation import MemorisationRequest, evaluate_memorisation

Members = Annotated[
    str,
    typer.Option(
        "--members",
        help="Texts that were trained on (or forgotten): JSONL or hf:NAME[:CONFIG][:SPLIT].",
        rich_help_panel=o.DATA,
    ),
]
NonMembers = Annotated[
    str | None,
    typer.Option(
        "--non-members", help="Texts of the same kind that were not.", rich_help_panel=o.DATA
    ),
]
RetainLog = Annotated[
    Path | None,
    typer.Option(
        "--retain-log",
        help="items.jsonl of the same evaluation of a model that never saw the members.",
        rich_help_panel=o.DATA,
    ),
]
MinK = Annotated[
    float,
    typer.Option(
        "--min-k", min=0, max=1, help="Share of tokens that Min-K % looks at.",
        rich_help_panel=o.DATA,
    ),
]  # fmt: skip


def memorisation(
    model: o.Model,
    members: Members,
    out: o.Out,
    non_members: NonMembers = None,
    retain_log: RetainLog = None,
    update: o.UpdateDir = None,
    quantise: o.Quantise = None,
    min_k: MinK = MIN_K,
    template: o.Template = None,
    template_file: o.TemplateFile = None,
    template_args: o.TemplateArgs = None,
    template_date: o.TemplateDate = None,
    truncate: o.Truncate = None,
    limit: o.Limit = None,
    batch_tokens: o.Positions = 4096,
    dtype: o.Dtype = None,
    device: o.Device = None,
    trust_remote_code: o.TrustRemoteCode = None,
    revision: o.Revision = None,
    tokenizer: o.Tokenizer = None,
    resume: o.Resume = False,
    json: o.Json = False,
) -> None:
    """Exact memorisation, extraction strength, perplexity; membership inference by four scores.

    Each line of the files is one text, scored as `kfade unlearn` scores it. Without non-members
    there is no membership inference.

    Example: `kfade eval memorisation MODEL --update out/run --members forget.jsonl
    --non-members other.jsonl --out out/memorisation`
    """
    request = o.request_of(MemorisationRequest, locals())
    with session():
        result = evaluate_memorisation(request, out, resume=resume)
    show(result, json, _lines(result))


def _lines(result: Mapping[str, Any]) -> list[str]:
    lines = []
    for key, title in (("members", "members"), ("non_members", "non-members")):
        if key in result:
            own = result[key]
            lines.append(
                f"{title} ({own['texts']} texts, {own['tokens']} tokens): exact memorisation "
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
