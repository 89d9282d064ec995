"""Evaluation of memorisation, and of membership inference, on texts that were trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number

from kfade.data.examples import Example, load_examples
from kfade.data.sequences import TokenSequence, digest_sequences, encode
from kfade.errors import InputError
from kfade.evaluate.item_log import ItemLog
from kfade.evaluate.log import read_log
from kfade.evaluate.memorisation import (
    MIN_K,
    summarise_memorisation,
    text_statistics,
    token_statistics,
)
from kfade.evaluate.tokens import token_values
from kfade.models.lengths import model_window
from kfade.models.weights import digest_weights
from kfade.runs import options as o
from kfade.runs.config import TemplateConfig
from kfade.runs.evaluation import (
    EvaluatedModel,
    EvaluationRequest,
    evaluation,
    settings_of,
)
from kfade.runs.template import rendering_of
from kfade.runtime.stages import stage


@o.settings(o.DATA)
@dataclass(frozen=True, kw_only=True)
class MemorisationRequest(EvaluationRequest):
    """Members (texts that were trained on), non-members, and what is measured on them."""

    members: str
    """Members, texts that were trained on (or forgotten): JSONL or hf:NAME[:CONFIG][:SPLIT]."""
    non_members: str | None = None
    """Non-members, similar texts that were not trained on. Unset: no membership inference."""
    retain_log: Path | None = None
    """Log of this evaluation of a model that was not trained on the members: its folder or its
    items.jsonl. Unset: no comparison."""
    min_k: Annotated[float, Parameter(validator=Number(gte=0, lte=1))] = MIN_K
    """Share of tokens that Min-K % uses, 0 to 1."""
    rendering: TemplateConfig = field(default_factory=TemplateConfig)
    """How conversations are rendered."""
    truncate: bool = False
    """Truncate texts that are longer than the model's context window. Without it they are an
    error."""


def evaluate_memorisation(
    request: MemorisationRequest, out: Path, *, resume: bool = False
) -> dict[str, Any]:
    """Exact memorisation, extraction strength, perplexity; membership inference by four scores.

    Raises:
        InputError: a setting or a file is wrong, or ``retain_log`` is of other texts.
    """
    settings = settings_of(request)
    how: dict[str, Any] = {
        "template": rendering_of(request.rendering, settings, out, resume=resume),
        "truncate": request.truncate,
    }
    sources = {"member": request.members}
    if request.non_members:
        sources["non-member"] = request.non_members
    examples = {name: load_examples(source)[: request.limit] for name, source in sources.items()}
    retain = _read_retain(request.retain_log)
    with evaluation("memorisation", out, resume, settings) as run:
        subject = run.load(request.subject, shard=request.shard)
        names, sequences = _tokens(examples, subject, how)
        data = digest_sequences(sequences)
        if retain is not None and retain[0] != data:
            raise InputError(
                f"--retain-log {request.retain_log}: of other texts or of another tokenizer; "
                "evaluate the retain model with the same --members and --non-members"
            )
        with subject.edited() as edited:
            digests = {"weights_sha256": digest_weights(edited), "data_sha256": data}
            with run.items(**digests) as log:
                with stage("texts"):
                    _measure(log, subject, names, sequences, request)
                aggregate = _aggregate(log, names)
                if retain is not None:
                    aggregate["retain"] = retain[1]
                run.finish(log, aggregate, **digests)
    return run.result


def _read_retain(path: Path | None) -> tuple[str, dict[str, Any]] | None:
    """(digest of the data, aggregate figures) of a retain model's log."""
    if path is None:
        return None
    log = read_log(path / "items.jsonl" if path.is_dir() else path)
    if log.header.get("benchmark") != "memorisation":
        raise InputError(f"--retain-log {path}: not a log of kfade eval memorisation; give one")
    assert log.aggregate is not None
    return log.header["data_sha256"], log.aggregate


def _tokens(
    examples: Mapping[str, list[Example]], subject: EvaluatedModel, how: Mapping[str, Any]
) -> tuple[list[str], list[TokenSequence]]:
    """Item names and token sequences, one for each text.

    A ``{"text"}`` gets no EOS. It may be an excerpt, whose end no model can predict, and its
    extraction strength would then be 0.
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
        )
        names += [f"{name} {i}" for i in range(len(own))]
    return names, sequences


def _measure(
    log: ItemLog,
    subject: EvaluatedModel,
    names: list[str],
    sequences: list[TokenSequence],
    request: MemorisationRequest,
) -> None:
    """Measure the statistics of each text that the log does not have."""
    texts = dict(zip(names, sequences, strict=True))
    values_of = partial(
        token_values,
        subject.model,
        measure=token_statistics,
        name="texts",
        batch_tokens=request.batch_tokens,
    )
    for name, sequence, values in log.measure(texts, values_of):
        scored = [t for t, s in zip(sequence.tokens, sequence.scored, strict=True) if s]
        text = subject.tokenizer.decode(scored, skip_special_tokens=True)
        log.add(name, **text_statistics(values, text, request.min_k), text=text[:200])


def _aggregate(log: ItemLog, names: list[str]) -> dict[str, Any]:
    items = [(name, log.items[name]) for name in names]
    return summarise_memorisation(
        [item for name, item in items if name.startswith("member")],
        [item for name, item in items if name.startswith("non-member")],
    )
