"""Forget quality and model utility of a model on TOFU, or of saved logs."""

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
from kfade.evaluate.log import ItemLog, digest
from kfade.evaluate.rouge import RougeLRecall
from kfade.evaluate.tofu import LEGACY_ITEMS, TofuQuestion, read_tofu, template_for
from kfade.evaluate.tofu import evaluate_tofu as measure_tofu
from kfade.evaluate.tofu_logs import TofuLog, aggregate, load_ks_test, notes_on
from kfade.evaluate.tofu_read import log_of, read_tofu_log
from kfade.models.layers import digest_weights
from kfade.models.load import load_tokenizer
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
    """How questions are put."""

    template: str = "auto"
    """auto, chat, llama2, phi or plain."""

    @property
    def enabled(self) -> bool | None:
        """None: :func:`kfade.evaluate.tofu.template_for` decides."""
        return None


@o.settings(o.DATA)
@dataclass(frozen=True, kw_only=True)
class TofuRequest(EvaluationRequest):
    """One split of TOFU, and the retain model to compare with."""

    split: str = "forget10"
    """forget01, forget05 or forget10."""
    data: Path | None = None
    """Folder with a copy of the data set. Unset: the hub's locuslab/TOFU."""
    rendering: TofuTemplate = field(default_factory=TofuTemplate)
    """How questions are put."""
    max_new_tokens: Annotated[int, o.at_least(1)] = 200
    """Longest generated answer."""
    tofu_legacy: Annotated[bool, o.FLAG] = False
    """As the reference code: the first 300 items of each set, and Phi's 'Answer: ' scored."""
    retain_log: Annotated[Path | None, Parameter(group=o.LOGS)] = None
    """Log of the retain model, which forget quality compares with: a folder of kfade eval tofu,
    or the reference code's eval_log_aggregated.json."""
    retain_model: Annotated[str | None, Parameter(group=o.EVALUATED)] = None
    """Or the retain model itself, which is measured after MODEL."""


def evaluate_tofu(request: TofuRequest, out: Path, *, resume: bool = False) -> dict[str, Any]:
    """Forget quality, model utility and its nine parts; ``notes`` tell what to mind.

    Raises:
        InputError: what is asked for cannot be done, or a package for it is missing.
    """
    config = request.subject.model
    if request.retain_log and request.retain_model:
        raise InputError("give --retain-log or --retain-model, not both")
    if request.retain_model:
        load_ks_test()
    retain = _read_retain(request.retain_log)
    RougeLRecall()
    if request.retain_model:  # is it there?
        trusted = config.trust_remote_code
        load_tokenizer(request.retain_model, trust_remote_code=trusted, tokenizer=config.tokenizer)
    settings = {**settings_of(request), "from_log": None}
    how = _how(request, settings, out, resume)
    legacy = LEGACY_ITEMS if request.tofu_legacy else None
    limits = [n for n in (request.limit, legacy) if n is not None]
    questions = read_tofu(request.split, folder=request.data, limit=min(limits, default=None))
    with evaluation("tofu", out, resume, settings) as run:
        subject = run.load(request.subject)
        about = _about(subject, questions, how)
        with run.items(**about) as log:
            _measure(subject, questions, log, how)
            if request.retain_model:
                del subject
                gc.collect()  # a model holds references to itself
                other = replace(config, model=request.retain_model, revision=None)
                retain = _measure_retain(run, load_evaluated(Subject(other)), questions, how)
            measured = log_of(log.items, str(out), {**settings, **about})
            run.finish(log, aggregate(measured, retain), **about)
    return {**run.result, "notes": notes_on(measured, retain)}


def aggregate_tofu(log: Path, retain_log: Path | None = None) -> dict[str, Any]:
    """What :func:`evaluate_tofu` tells, of saved logs: no model is run.

    Args:
        log: folder of an evaluation, or the reference code's ``eval_log_aggregated.json``.
        retain_log: the retain model's, of either kind.

    Raises:
        InputError: no such log, or one that lacks what is needed.
    """
    retain = _read_retain(retain_log)
    measured = read_tofu_log(log)
    result = aggregate(measured, retain)  # first: it says what a log lacks
    return {**result, "notes": notes_on(measured, retain)}


def _read_retain(path: Path | None) -> TofuLog | None:
    """The retain model's log, which must have what forget quality needs."""
    if path is None:
        return None
    load_ks_test()
    retain = read_tofu_log(path)
    retain.items("forget")  # said before the long work
    return retain


def _how(request: TofuRequest, settings: dict[str, Any], out: Path, resume: bool) -> dict[str, Any]:
    """How questions are put and answered; ``settings`` then hold the template that is used."""
    return {
        "template": request.rendering.template,
        "chat": rendering_of(request.rendering, settings, out, resume=resume),
        "decoding": Decoding(request.max_new_tokens, request.batch_tokens),
        "legacy": request.tofu_legacy,
    }


def _about(
    subject: EvaluatedModel, questions: list[TofuQuestion], how: Mapping[str, Any]
) -> dict[str, Any]:
    """What decides the numbers besides the options.

    The date is there if the prompts hold it.
    """
    with subject.edited() as edited:
        about: dict[str, Any] = {
            "weights_sha256": digest_weights(edited),
            "data_sha256": digest(questions),
            "prompt_format": template_for(how["template"], edited, subject.tokenizer),
        }
    chat: ChatTemplate = how["chat"]
    if about["prompt_format"] == "chat" and chat.reads_date(subject.tokenizer):
        about["prompt_date"] = str(chat.now)
    return about


def _measure(
    subject: EvaluatedModel, questions: list[TofuQuestion], log: ItemLog, how: Mapping[str, Any]
) -> None:
    with stage("items"), subject.edited() as edited:
        measure_tofu(edited, subject.tokenizer, questions, log, **how)


def _measure_retain(
    run: Evaluation, subject: EvaluatedModel, questions: list[TofuQuestion], how: Mapping[str, Any]
) -> TofuLog:
    """The retain model's items, kept beside MODEL's: a log that --retain-log takes."""
    header = {
        "benchmark": "tofu",
        "model": subject.name,
        "max_new_tokens": how["decoding"].max_new_tokens,
        **{name: run.settings[name] for name in ("template_args", "template_sha256")},
        **_about(subject, questions, how),
    }
    with ItemLog(run.folder.state / RETAIN_ITEMS, header) as log:
        _measure(subject, questions, log, how)
        retain = log_of(log.items, RETAIN_ITEMS, header)
        log.finish(aggregate(retain))
    run.folder.publish(RETAIN_ITEMS)
    return retain
