"""A model's answers, graded by a judge behind an API: from a request to a folder."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kfade.evaluate.generation import Decoding
from kfade.evaluate.judge import Judge
from kfade.evaluate.log import ItemLog, digest
from kfade.evaluate.mt_bench import (
    answer_questions,
    judge_answers,
    read_bench,
    summarise_ratings,
)
from kfade.models.layers import digest_weights
from kfade.runs.evaluation import Rendering, Subject, evaluation, settings_of
from kfade.runs.template import rendering_of
from kfade.runs.words import chat_of
from kfade.runtime.stages import stage

ANSWERS = "answers.jsonl"


@dataclass(frozen=True)
class BenchRequest:
    """What is asked for."""

    subject: Subject
    """What is judged."""
    questions: Path
    """JSONL of {question_id, category, turns[, reference]}."""
    references: Path | None = None
    """Right answers that the judge sees."""
    runs: int = 1
    """Answer and judge so many times."""
    max_new_tokens: int = 1024
    """Longest answer."""
    rendering: Rendering = field(default_factory=Rendering)
    """How conversations are rendered."""
    limit: int | None = None
    """Take the first so many questions only."""
    batch_tokens: int = 4096
    """Positions in one forward pass."""
    seed: int = 0
    """Of sampling."""


def evaluate_mt_bench(
    request: BenchRequest, judge: Judge, out: Path, *, resume: bool = False
) -> dict[str, Any]:
    """Mean rating, 1 to 10, of a model's answers to questions of several turns.

    Raises:
        InputError: what is asked for cannot be done, or the judge cannot be reached.
    """
    settings = {
        **settings_of(request),
        # Where the judge is found decides no number: a resumed evaluation may look elsewhere.
        "judge_model": judge.model,
        "judge_max_tokens": judge.max_tokens,
    }
    how: dict[str, Any] = {
        "template": replace(
            rendering_of(settings, out, resume=resume),
            enabled=chat_of(settings["template"] or "auto"),
        ),
        "runs": request.runs,
    }
    decoding = Decoding(request.max_new_tokens, request.batch_tokens, seed=request.seed)
    asked = read_bench(request.questions, request.references)[: request.limit]
    with evaluation("mt-bench", out, resume, settings) as run:
        subject = run.load(request.subject)
        with subject.edited() as edited:
            about = {"weights_sha256": digest_weights(edited), "data_sha256": digest(asked)}
            header = {"benchmark": "mt-bench answers", **settings, **about}
            header = {k: str(v) if isinstance(v, Path) else v for k, v in header.items()}
            with stage("answers"), ItemLog(run.folder.state / ANSWERS, header) as answers:
                answer_questions(edited, subject.tokenizer, asked, answers, decoding, **how)
                answers.finish({"answers": len(answers.items)})
        with run.items(**about) as log:
            with stage("judgements"):
                judge_answers(judge, asked, answers.items, log, runs=request.runs)
            run.folder.publish(ANSWERS)
            run.finish(log, summarise_ratings(log.items), **about)
    return run.result
