"""Evaluation on multiple-choice questions, scored by letters and by texts, or on lm-eval tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from kfade.errors import InputError
from kfade.evaluate.choice import answer_questions, summarise_choice, verdict
from kfade.evaluate.lm_eval import check_installed, run_tasks
from kfade.evaluate.log import digest
from kfade.evaluate.questions import Question, read_sets
from kfade.models.lengths import model_window
from kfade.models.weights import digest_weights
from kfade.runs import options as o
from kfade.runs.evaluation import (
    EvaluatedModel,
    Evaluation,
    EvaluationRequest,
    evaluation,
    settings_of,
)
from kfade.runtime.stages import stage

TASK_TOKENS = 512  # assumed positions of an lm-eval item, for the batch size


@o.settings(o.DATA)
@dataclass(frozen=True, kw_only=True)
class ChoiceRequest(EvaluationRequest):
    """The questions, or tasks of lm-eval."""

    questions: Annotated[list[Path], o.REPEATED] = field(default_factory=list)
    """Questions: JSONL of {question, choices, answer}, a CSV file of MMLU, or a folder of CSV
    files. May be given several times."""
    tasks: str | None = None
    """Tasks of lm-eval, as in mmlu,wmdp_bio, instead of --questions."""
    task_folder: Path | None = None
    """Folder with further tasks of lm-eval (YAML). Unset: lm-eval's own tasks only."""
    cloze: Annotated[bool, o.FLAG] = False
    """Treat each question as the beginning of a text that a choice continues."""
    seed: Annotated[int, Parameter(group=o.RUN)] = 0
    """Random seed of lm-eval, for example of its few-shot examples."""


def evaluate_choice(request: ChoiceRequest, out: Path, *, resume: bool = False) -> dict[str, Any]:
    """Accuracy on multiple-choice questions, or on tasks of lm-eval, with standard errors.

    Raises:
        InputError: questions and tasks, or neither, are given; or a setting or a file is wrong.
    """
    if bool(request.questions) == bool(request.tasks):
        raise InputError("give either --questions or --tasks")
    settings = settings_of(request)
    paths = [str(path) for path in request.questions]
    settings["questions"] = (paths[0] if len(paths) == 1 else paths) if paths else None
    sets = read_sets(request.questions, request.limit)
    if request.tasks:
        check_installed()
    with evaluation("choice", out, resume, settings) as run:
        subject = run.load(request.subject, shard=request.shard)
        with subject.edited() as edited:
            digests = {"weights_sha256": digest_weights(edited)}
            if request.tasks:
                _run_tasks(run, subject, digests, request)
            else:
                _answer(run, subject, digests, sets, request)
    return run.result


def _answer(
    run: Evaluation,
    subject: EvaluatedModel,
    digests: dict[str, str],
    sets: Mapping[str, Sequence[Question]],
    request: ChoiceRequest,
) -> None:
    """Answer all questions. Items are named by number; with several sets, by set and number."""
    ids = {
        name: [f"{name}/{i}" if len(sets) > 1 else str(i) for i in range(len(own))]
        for name, own in sets.items()
    }
    questions = {
        item: question
        for name, own in sets.items()
        for item, question in zip(ids[name], own, strict=True)
    }
    digests["data_sha256"] = digest(list(questions.values()))
    with run.items(**digests) as log:
        answer = partial(
            answer_questions,
            subject.model,
            subject.tokenizer,
            cloze=request.cloze,
            window=model_window(subject.model),
            batch_tokens=request.batch_tokens,
        )
        with stage("questions"):
            for item, question, scores in log.measure(questions, answer):
                log.add(
                    item,
                    question=question.question[:200],
                    subject=question.subject,
                    choices=len(question.choices),
                    answer=question.answer,
                    correct=verdict(scores, question.answer),
                    scores=scores,
                )
        figures = {name: summarise_choice([log.items[i] for i in own]) for name, own in ids.items()}
        several = {"questions": len(questions), "sets": figures}
        run.finish(log, several if len(sets) > 1 else figures[next(iter(sets))], **digests)


def _run_tasks(
    run: Evaluation, subject: EvaluatedModel, digests: dict[str, str], request: ChoiceRequest
) -> None:
    tasks = [name.strip() for name in (request.tasks or "").split(",") if name.strip()]
    with stage("tasks"):
        items, figures = run_tasks(
            subject.model,
            subject.tokenizer,
            tasks,
            task_folder=request.task_folder,
            limit=request.limit,
            batch_size=max(1, request.batch_tokens // TASK_TOKENS),
            seed=request.seed,
        )
    with run.items(**digests) as log:
        for name, values in items.items():
            if name not in log.items:
                log.add(name, **values)
        run.finish(log, {"tasks": figures, "items": len(items)}, **digests)
