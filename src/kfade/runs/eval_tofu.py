"""Evaluation on TOFU: forget quality and model utility, of a model or of saved logs."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from kfade.data.chat import ChatTemplate
from kfade.errors import InputError
from kfade.evaluate.generation import Decoding
from kfade.evaluate.item_log import ItemLog
from kfade.evaluate.log import digest
from kfade.evaluate.rouge import RougeLRecall
from kfade.evaluate.tofu import LEGACY_ITEMS, TofuQuestion, read_tofu, template_for
from kfade.evaluate.tofu import evaluate_tofu as measure_tofu
from kfade.evaluate.tofu_logs import TofuLog, aggregate, load_ks_test, notes_on
from kfade.evaluate.tofu_read import log_of, read_tofu_log
from kfade.models.load import load_tokenizer
from kfade.models.weights import digest_weights
from kfade.runs import options as o
from kfade.runs.config import TemplateConfig
from kfade.runs.evaluation import (
    EvaluatedModel,
    Evaluation,
    EvaluationRequest,
    Subject,
    evaluation,
    load_evaluated,
    settings_of,
)
from kfade.runs.template import rendering_of
from kfade.runtime.stages import stage

RETAIN_ITEMS = "retain.jsonl"


@o.settings(o.DATA)
@dataclass(frozen=True, kw_only=True)
class TofuTemplate(TemplateConfig):
    """The prompt format of questions."""

    template: str = "auto"
    """Prompt format of questions: auto (chosen for the model), chat, llama2, phi or plain."""

    @property
    def enabled(self) -> bool | None:
        """Always None: :func:`kfade.evaluate.tofu.template_for` chooses."""
        return None


@o.settings(o.DATA)
@dataclass(frozen=True, kw_only=True)
class TofuRequest(EvaluationRequest):
    """A split of TOFU, and the retain model for comparison."""

    split: str = "forget10"
    """Split of TOFU: forget01, forget05 or forget10."""
    data: Path | None = None
    """Folder with a copy of the data set. Unset: locuslab/TOFU on the hub."""
    rendering: TofuTemplate = field(default_factory=TofuTemplate)
    """The prompt format of questions."""
    max_new_tokens: Annotated[int, o.at_least(1)] = 200
    """Maximum length of a generated answer, in tokens."""
    tofu_legacy: Annotated[bool, o.FLAG] = False
    """Measure as the reference code: the first 300 items of each set, and with Phi's prompt format
    'Answer: ' is part of the scored text."""
    retain_log: Annotated[Path | None, Parameter(group=o.LOGS)] = None
    """Log of the retain model, to which forget quality compares: a folder of kfade eval tofu, or
    eval_log_aggregated.json of the reference code. Unset: no forget quality."""
    retain_model: Annotated[str | None, Parameter(group=o.EVALUATED)] = None
    """Retain model, instead of --retain-log; it is measured after MODEL."""


def evaluate_tofu(request: TofuRequest, out: Path, *, resume: bool = False) -> dict[str, Any]:
    """Measure forget quality, model utility and its nine parts.

    The result's ``notes`` say what limits a comparison of the two logs.

    Raises:
        InputError: a setting or a file is wrong, or a package is missing.
    """
    config = request.subject.model
    if request.retain_log and request.retain_model:
        raise InputError("give --retain-log or --retain-model, not both")
    if request.retain_model:
        load_ks_test()
    retain = _read_retain(request.retain_log)
    RougeLRecall()
    if request.retain_model:  # raises if it does not exist
        trusted = config.trust_remote_code
        load_tokenizer(request.retain_model, trust_remote_code=trusted, tokenizer=config.tokenizer)
    settings = {**settings_of(request), "from_log": None}
    options = _measure_options(request, settings, out, resume)
    legacy = LEGACY_ITEMS if request.tofu_legacy else None
    limits = [n for n in (request.limit, legacy) if n is not None]
    questions = read_tofu(request.split, folder=request.data, limit=min(limits, default=None))
    with evaluation("tofu", out, resume, settings) as run:
        subject = run.load(request.subject, shard=request.shard)
        about = _about(subject, questions, options)
        with run.items(**about) as log:
            _measure(subject, questions, log, options)
            if request.retain_model:
                del subject
                gc.collect()  # a model holds references to itself
                other = replace(config, model=request.retain_model, revision=None)
                kept = load_evaluated(Subject(other), shard=request.shard)
                retain = _measure_retain(run, kept, questions, options)
            measured = log_of(log.items, str(out), {**settings, **about})
            run.finish(log, aggregate(measured, retain), **about)
    return {**run.result, "notes": notes_on(measured, retain)}


def aggregate_tofu(log: Path, retain_log: Path | None = None) -> dict[str, Any]:
    """The result of :func:`evaluate_tofu`, from saved logs; no model is run.

    Args:
        log: folder of an evaluation, or ``eval_log_aggregated.json`` of the reference code.
        retain_log: the retain model's log, of either kind.

    Raises:
        InputError: a log does not exist or is incomplete.
    """
    retain = _read_retain(retain_log)
    measured = read_tofu_log(log)
    result = aggregate(measured, retain)  # raises if the log is incomplete
    return {**result, "notes": notes_on(measured, retain)}


def _read_retain(path: Path | None) -> TofuLog | None:
    """Read the retain model's log, which must have the items of the forget set."""
    if path is None:
        return None
    load_ks_test()
    retain = read_tofu_log(path)
    retain.items("forget")  # raises before the long work
    return retain


def _measure_options(
    request: TofuRequest, settings: dict[str, Any], out: Path, resume: bool
) -> dict[str, Any]:
    """The options of the measurement; writes the chat template in use into ``settings``."""
    return {
        "template": request.rendering.template,
        "chat": rendering_of(request.rendering, settings, out, resume=resume),
        "decoding": Decoding(request.max_new_tokens, request.batch_tokens),
        "legacy": request.tofu_legacy,
    }


def _about(
    subject: EvaluatedModel, questions: list[TofuQuestion], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Digests and facts that decide the numbers besides the options.

    The date is included if the prompts contain it.
    """
    with subject.edited() as edited:
        about: dict[str, Any] = {
            "weights_sha256": digest_weights(edited),
            "data_sha256": digest(questions),
            "prompt_format": template_for(options["template"], edited, subject.tokenizer),
        }
    chat: ChatTemplate = options["chat"]
    if about["prompt_format"] == "chat" and chat.reads_date(subject.tokenizer):
        about["prompt_date"] = str(chat.now)
    return about


def _measure(
    subject: EvaluatedModel, questions: list[TofuQuestion], log: ItemLog, options: Mapping[str, Any]
) -> None:
    with stage("items"), subject.edited() as edited:
        measure_tofu(edited, subject.tokenizer, questions, log, **options)


def _measure_retain(
    run: Evaluation,
    subject: EvaluatedModel,
    questions: list[TofuQuestion],
    options: Mapping[str, Any],
) -> TofuLog:
    """Measure the retain model; its log is written to the folder, and --retain-log can read it."""
    header = {
        "benchmark": "tofu",
        "model": subject.name,
        "max_new_tokens": options["decoding"].max_new_tokens,
        **{name: run.settings[name] for name in ("template_args", "template_sha256")},
        **_about(subject, questions, options),
    }
    with ItemLog(run.folder.state / RETAIN_ITEMS, header) as log:
        _measure(subject, questions, log, options)
        retain = log_of(log.items, RETAIN_ITEMS, header)
        log.finish(aggregate(retain))
    run.folder.publish(RETAIN_ITEMS)
    return retain
