"""``kfade eval memorisation``: what a model still reproduces, and what gives a text away."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor

from kfade.cli import options as o
from kfade.cli.eval import (
    digest_model,
    evaluation,
    interval,
    settings_of,
)
from kfade.cli.session import show
from kfade.data.examples import Example, load_examples
from kfade.data.sequences import TokenSequence, digest_sequences, encode
from kfade.errors import InputError
from kfade.evaluate.log import ItemLog, read_log
from kfade.evaluate.memorisation import (
    MIN_K,
    SCORES,
    summarise_memorisation,
    text_statistics,
    token_statistics,
)
from kfade.evaluate.tokens import token_values
from kfade.models.load import model_window
from kfade.runs.template import rendering_of
from kfade.runs.words import chat_of
from kfade.runtime.stages import stage

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
    settings = settings_of(locals())
    how: dict[str, Any] = {
        "template": rendering_of(settings, out, resume=resume, update=update, word=template),
        "chat": chat_of(template or "auto"),
    }
    sources = {"member": members} | ({"non-member": non_members} if non_members else {})
    examples = {name: load_examples(source)[:limit] for name, source in sources.items()}
    retain = _read_retain(retain_log)
    with evaluation("memorisation", out, resume, settings) as run:
        subject = run.load(
            model, update=update, quantise=quantise, dtype=dtype, device=device,
            trust_remote_code=trust_remote_code, revision=revision, tokenizer=tokenizer,
        )  # fmt: skip
        names, sequences = _tokens(examples, subject, how, bool(truncate))
        data = digest_sequences(sequences)
        if retain is not None and retain[0] != data:
            raise InputError(
                f"--retain-log {retain_log}: of other texts or of another tokenizer; evaluate the "
                "retain model with the same --members and --non-members"
            )
        with subject.edited() as edited:
            digests = {"weights_sha256": digest_model(edited), "data_sha256": data}
            with run.items(**digests) as log:
                with stage("texts"):
                    _measure(log, edited, subject.tokenizer, names, sequences, min_k, batch_tokens)
                aggregate = _aggregate(log, names)
                if retain is not None:
                    aggregate["retain"] = retain[1]
                run.finish(log, aggregate, **digests)
    show(run.result, json, _lines(run.result))


def _read_retain(path: Path | None) -> tuple[str, dict[str, Any]] | None:
    """(digest of its data, its figures) of a retain model's log."""
    if path is None:
        return None
    log = read_log(path / "items.jsonl" if path.is_dir() else path)
    if log.header.get("benchmark") != "memorisation":
        raise InputError(f"--retain-log {path}: not a log of kfade eval memorisation")
    assert log.aggregate is not None
    return log.header["data_sha256"], log.aggregate


def _tokens(
    examples: Mapping[str, list[Example]], subject: Any, how: Mapping[str, Any], truncate: bool
) -> tuple[list[str], list[TokenSequence]]:
    """Item names and token sequences, one a text.

    A ``{"text"}`` gets no EOS: it may be a passage, and an end that no model could foresee would
    put its extraction strength at 0.
    """
    names: list[str] = []
    sequences: list[TokenSequence] = []
    for name, own in examples.items():
        sequences += encode(
            [replace(example, closes=example.text is None and example.closes) for example in own],
            subject.tokenizer,
            window=model_window(subject.model),
            **how,
            pack=False,
            truncate=truncate,
        )
        names += [f"{name} {i}" for i in range(len(own))]
    return names, sequences


def _measure(
    log: ItemLog,
    model: Any,
    tokenizer: Any,
    names: list[str],
    sequences: list[TokenSequence],
    min_k: float,
    batch_tokens: int,
) -> None:
    missing = [i for i, name in enumerate(names) if name not in log.items]

    def note(place: int, values: Tensor) -> None:
        sequence = sequences[missing[place]]
        scored = [t for t, s in zip(sequence.tokens, sequence.scored, strict=True) if s]
        text = tokenizer.decode(scored, skip_special_tokens=True)
        log.add(names[missing[place]], **text_statistics(values, text, min_k), text=text[:200])

    token_values(
        model,
        [sequences[i] for i in missing],
        token_statistics,
        note,
        name="texts",
        batch_tokens=batch_tokens,
    )


def _aggregate(log: ItemLog, names: list[str]) -> dict[str, Any]:
    items = [(name, log.items[name]) for name in names]
    return summarise_memorisation(
        [item for name, item in items if name.startswith("member")],
        [item for name, item in items if name.startswith("non-member")],
    )


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
