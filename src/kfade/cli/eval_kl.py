"""``kfade eval kl``: how far an edited model is from the base model on benign completions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from kfade.cli import options as o
from kfade.cli.eval import interval
from kfade.cli.session import session, show
from kfade.evaluate.log import read_log
from kfade.runs.eval_kl import MAX_NEW_TOKENS, KlRequest, evaluate_kl
from kfade.runs.evaluation import ITEMS

Prompts = Annotated[
    str,
    typer.Option(
        "--prompts",
        help="Instructions: JSONL of {instruction, input}, {prompt}, {question} or {messages}, or "
        "hf:NAME[:CONFIG][:SPLIT].",
        rich_help_panel=o.DATA,
    ),
]
Edited = Annotated[
    str | None,
    typer.Option("--edited", help="Judge this model against MODEL.", rich_help_panel=o.JUDGED),
]
Completions = Annotated[
    Path | None,
    typer.Option(
        "--completions",
        help="Folder that keeps MODEL's completions for further runs; made if missing. [OUT]",
        show_default=False,
        rich_help_panel=o.DATA,
    ),
]
MaxNewTokens = Annotated[
    int, typer.Option(min=1, help="Longest completion.", rich_help_panel=o.DATA)
]


def kl(
    model: o.Model,
    prompts: Prompts,
    out: o.Out,
    update: o.UpdateDir = None,
    edited: Edited = None,
    quantise: o.Quantise = None,
    completions: Completions = None,
    max_new_tokens: MaxNewTokens = MAX_NEW_TOKENS,
    template: o.Template = None,
    template_file: o.TemplateFile = None,
    template_args: o.TemplateArgs = None,
    template_date: o.TemplateDate = None,
    limit: o.Limit = None,
    batch_tokens: o.Positions = 4096,
    dtype: o.Dtype = None,
    device: o.Device = None,
    trust_remote_code: o.TrustRemoteCode = None,
    revision: o.Revision = None,
    tokenizer: o.Tokenizer = None,
    seed: o.ResamplingSeed = 0,
    resume: o.Resume = False,
    json: o.Json = False,
) -> None:
    """Mean KL(MODEL ‖ edited) per token on what MODEL itself says to benign instructions.

    The edited model is MODEL with `--update`, or another one, `--edited`; then the two are in
    memory one after the other. `--quantise` rounds the edited one.

    Example: `kfade eval kl MODEL --update out/run --prompts alpaca.jsonl --out out/kl`
    """
    request = o.request_of(KlRequest, locals())
    with session():
        result = evaluate_kl(request, out, resume=resume)
    show(result, json, [] if json else _lines(result, read_log(out / ITEMS).items))


def _lines(result: Mapping[str, Any], items: Mapping[str, Mapping[str, Any]]) -> list[str]:
    quantiles = ", ".join(f"{p} %: {q['value']:.2g}" for p, q in result["quantiles"].items())
    lines = [
        f"KL {interval(result['kl_per_token'])} nats per token on {result['tokens']} tokens of "
        f"{result['completions']} completions (95 % interval)",
        f"quantiles over completions: {quantiles}",
        "highest:",
    ]
    for entry in result["worst"][:5]:
        item = items[str(entry["item"])]
        words = " ".join(repr(item["strings"][t["position"]]) for t in entry["tokens"])
        lines.append(f"  {entry['kl']:.2g}  {item['prompt'][:60]!r}: {words}")
    return [*lines, f"every completion in {result['out']}/items.jsonl"]
