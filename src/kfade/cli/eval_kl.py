"""``kfade eval kl``: how far an edited model is from the base model on benign completions."""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from kfade.cli import options as o
from kfade.cli.eval import (
    Evaluation,
    Judged,
    digest_model,
    evaluation,
    interval,
    load_judged,
    settings_of,
)
from kfade.cli.session import show
from kfade.data.batches import Batch, make_batches
from kfade.data.sequences import TokenSequence, digest_sequences
from kfade.errors import InputError
from kfade.evaluate.completions import (
    Prompt,
    complete,
    completed,
    encode_prompts,
    read_prompts,
)
from kfade.evaluate.divergence import (
    Outputs,
    divergences,
    grouped,
    outputs,
    rounded,
    summarise_divergence,
    token_strings,
)
from kfade.evaluate.log import ItemLog, digest, read_log
from kfade.models.lengths import length_class
from kfade.models.load import load_skeleton, load_tokenizer, model_window
from kfade.runs.template import rendering_of
from kfade.runs.words import chat_of
from kfade.runtime.files import writing
from kfade.runtime.stages import stage

COMPLETIONS = "completions.jsonl"
MAX_NEW_TOKENS = 256

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
    settings = settings_of(locals())
    if (update is None) == (edited is None) and not (quantise and edited is None):
        raise InputError("give --update or --edited (or --quantise alone): what MODEL became")
    how: dict[str, Any] = {
        "template": rendering_of(settings, out, resume=resume, update=update, word=template),
        "chat": chat_of(template or "auto"),
    }
    examples = read_prompts(prompts, limit)
    where: dict[str, Any] = {
        "dtype": dtype,
        "device": device,
        "trust_remote_code": trust_remote_code,
        "tokenizer": tokenizer,
    }
    with evaluation("kl", out, resume, settings) as run:
        rounding = None if edited else quantise
        base = run.load(model, update=update, quantise=rounding, revision=revision, **where)
        if edited:
            theirs = load_tokenizer(
                edited, trust_remote_code=bool(trust_remote_code), tokenizer=tokenizer
            )
            _check_vocabulary(edited, base.tokenizer.get_vocab(), theirs.get_vocab())
            skeleton = load_skeleton(edited, trust_remote_code=bool(trust_remote_code))
            _check_vocabulary(edited, _outputs_of(base.model), _outputs_of(skeleton))
        asked = encode_prompts(
            examples,
            base.tokenizer,
            window=model_window(base.model),
            max_new_tokens=max_new_tokens,
            **how,
        )
        digests = {"base_sha256": digest_model(base.model)}
        folder = completions or run.folder.state
        answers = _completions(
            base, asked, folder, digests["base_sha256"], max_new_tokens, batch_tokens
        )
        texts = [completed(p, a["tokens"]) for p, a in zip(asked, answers, strict=True)]
        groups = _groups(base, texts, batch_tokens)
        digests["completions_sha256"] = digest_sequences(texts)
        judged, words = base, base.tokenizer
        if not edited:
            reference = _in_memory(base, groups)
        else:
            key = f"{digest(list(digests.values()))[:16]}-{batch_tokens}"
            reference = _streamed(base, groups, run, key)
            del base, judged
            _free()
            judged = load_judged(edited, quantise=quantise, **where)
        with judged.edited() as changed:
            digests["edited_sha256"] = digest_model(changed)
        with run.items(**digests) as log:
            _measure(log, judged, groups, reference, asked, answers, words)
            if completions is None:
                run.folder.publish(COMPLETIONS)
            aggregate = {
                **summarise_divergence(log.items, seed=seed),
                "max_new_tokens": max_new_tokens,
            }
            run.finish(log, aggregate, **digests)
    show(run.result, json, _lines(run.result, log.items))


def _completions(
    base: Judged,
    prompts: Sequence[Prompt],
    folder: Path,
    weights: str,
    max_new_tokens: int,
    batch_tokens: int,
) -> list[dict[str, Any]]:
    """Completions of all prompts: those that ``folder`` has, and new ones, which it then has."""
    header = {
        "benchmark": "completions",
        "weights_sha256": weights,
        "prompts_sha256": digest([prompt.tokens for prompt in prompts]),
        "max_new_tokens": max_new_tokens,
        "decoding": "greedy",
    }
    path = folder / COMPLETIONS
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        found = read_log(path, partial=True)
        if found.header != {"format": found.header["format"], **header}:
            raise InputError(
                f"{path}: completions of another model, of other prompts or of another length; "
                "give another --completions, or remove the file"
            )
        if found.aggregate is not None:
            return [found.items[str(i)] for i in range(len(prompts))]
    with stage("completions"), ItemLog(path, header) as log:
        complete(
            base.model,
            base.tokenizer,
            prompts,
            log,
            max_new_tokens=max_new_tokens,
            batch_tokens=batch_tokens,
        )
        log.finish({"completions": len(prompts)})
        return [log.items[str(i)] for i in range(len(prompts))]


def _groups(base: Judged, texts: Sequence[TokenSequence], batch_tokens: int) -> list[list[Batch]]:
    device = next(base.model.parameters()).device
    group = length_class(base.model)
    return grouped(make_batches(texts, budget=batch_tokens, device=device, group=group))


def _in_memory(base: Judged, groups: Sequence[Sequence[Batch]]) -> Callable[[int], Outputs]:
    """The base model's outputs on a group, computed when they are asked for.

    Read by a copy of its head: an update may change the head itself.
    """
    head = copy.deepcopy(outputs(base.model, [], "base model").head)
    return lambda number: replace(outputs(base.model, groups[number], "base model"), head=head)


def _streamed(
    base: Judged, groups: Sequence[Sequence[Batch]], run: Evaluation, key: str
) -> Callable[[int], Outputs]:
    """The base model's outputs on a group, written to disk now and read when they are asked for.

    Only its head stays in memory. What an interrupted run has written serves again if its ``key``
    is the same: the model, the texts and how they are batched.
    """

    def name(number: int) -> str:
        return f"base-{key}-{number:05}.safetensors"

    head = outputs(base.model, [], "base model").head
    with stage("base"):
        for number, batches in enumerate(groups):
            if not (run.folder.state / name(number)).is_file():
                computed = outputs(base.model, batches, "base model")
                run.folder.keep(name(number), computed.save)
    return lambda number: Outputs.load(run.folder.state / name(number), head, groups[number])


def _check_vocabulary(name: str, base: object, edited: object) -> None:
    """Raises InputError where the two models' tokens, or their numbers, are not the same."""
    if base != edited:
        raise InputError(
            f"--edited {name}: its vocabulary is not MODEL's, so their outputs cannot be compared "
            "token by token"
        )


def _outputs_of(model: Any) -> int:
    """Number of logits: the vocabulary, and what a model was padded to."""
    return model.get_output_embeddings().weight.shape[0]


def _measure(
    log: ItemLog,
    judged: Judged,
    groups: Sequence[Sequence[Batch]],
    reference: Callable[[int], Outputs],
    prompts: Sequence[Prompt],
    answers: Sequence[Mapping[str, Any]],
    tokenizer: Any,
) -> None:
    def note(index: int, kl: Tensor) -> None:
        tokens = answers[index]["tokens"]
        log.add(
            str(index),
            kl=kl.mean().item(),
            tokens=len(tokens),
            prompt=prompts[index].text,
            strings=token_strings(tokenizer, prompts[index].tokens[-1], tokens),
            token_kl=rounded(kl),
        )

    with stage("kl"):
        divergences(groups, reference, judged.edited, note, done={int(i) for i in log.items})


def _free() -> None:
    gc.collect()
    with contextlib.suppress(RuntimeError):
        torch.cuda.empty_cache()


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
