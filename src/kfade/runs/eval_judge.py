"""Evaluation on MT-Bench: answers of a model, graded by a judge model behind an API."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from kfade.errors import InputError
from kfade.evaluate.generation import Decoding
from kfade.evaluate.item_log import ItemLog
from kfade.evaluate.judge import Judge
from kfade.evaluate.log import digest
from kfade.evaluate.mt_bench import (
    answer_questions,
    judge_answers,
    read_bench,
    summarise_ratings,
)
from kfade.models.weights import digest_weights
from kfade.runs import options as o
from kfade.runs.config import TemplateConfig
from kfade.runs.evaluation import EvaluationRequest, evaluation, settings_of
from kfade.runs.template import rendering_of
from kfade.runtime.stages import stage

ANSWERS = "answers.jsonl"


@o.settings(o.DATA)
@dataclass(frozen=True, kw_only=True)
class BenchRequest(EvaluationRequest):
    """The questions, which have several turns, and how they are answered."""

    questions: Path
    """Questions, as in question.jsonl of MT-Bench: JSONL of {question_id, category, turns[,
    reference]}."""
    references: Path | None = None
    """Correct answers that the judge sees, as in reference_answer/gpt-4.jsonl of MT-Bench. Unset:
    those in --questions, if any."""
    runs: Annotated[int, o.at_least(1), Parameter(group=o.JUDGE)] = 1
    """Number of times that the questions are answered and judged."""
    max_new_tokens: Annotated[int, o.at_least(1)] = 1024
    """Maximum length of an answer, in tokens."""
    rendering: TemplateConfig = field(default_factory=TemplateConfig)
    """How conversations are rendered."""
    seed: Annotated[int, Parameter(group=o.RUN)] = 0
    """Random seed of sampling."""


@o.settings(o.JUDGE)
@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """The judge: a model behind an API that grades answers."""

    judge_url: str
    """URL of the judge's API, as in http://localhost:8000/v1."""
    judge_model: str
    """Name of the judge model at that API."""
    judge_key_env: str | None = None
    """Name of the environment variable with the API key. Unset: no key."""
    judge_timeout: Annotated[float, o.at_least(1)] = 300.0
    """Time limit for one judgement, in seconds."""
    judge_max_tokens: Annotated[int, o.at_least(1)] = 1024
    """Maximum length of a judgement, in tokens."""

    def open(self) -> Judge:
        """Make the judge of these settings.

        Raises:
            InputError: the environment variable of the key is not set.
        """
        key = None
        if self.judge_key_env is not None:
            # A key on the command line could be read by every user of the machine.
            key = os.environ.get(self.judge_key_env)
            if not key:
                raise InputError(
                    f"--judge-key-env {self.judge_key_env}: this environment variable is not set; "
                    "set it to the API key"
                )
        return Judge(
            self.judge_url,
            self.judge_model,
            key,
            timeout=self.judge_timeout,
            max_tokens=self.judge_max_tokens,
        )


def evaluate_mt_bench(
    request: BenchRequest, grader: JudgeConfig, out: Path, *, resume: bool = False
) -> dict[str, Any]:
    """Mean rating, 1 to 10, of a model's answers to questions of several turns.

    Raises:
        InputError: a setting or a file is wrong, or the judge cannot be reached.
    """
    judge = grader.open()
    settings = {
        **settings_of(request),
        # The URL decides no number: a resumed evaluation may use another one.
        "judge_model": judge.model,
        "judge_max_tokens": judge.max_tokens,
    }
    how: dict[str, Any] = {
        "template": rendering_of(request.rendering, settings, out, resume=resume),
        "runs": request.runs,
    }
    decoding = Decoding(request.max_new_tokens, request.batch_tokens, seed=request.seed)
    questions = read_bench(request.questions, request.references)[: request.limit]
    with evaluation("mt-bench", out, resume, settings) as run:
        subject = run.load(request.subject, shard=request.shard)
        with subject.edited() as edited:
            about = {"weights_sha256": digest_weights(edited), "data_sha256": digest(questions)}
            header = {"benchmark": "mt-bench answers", **settings, **about}
            header = {k: str(v) if isinstance(v, Path) else v for k, v in header.items()}
            with stage("answers"), ItemLog(run.folder.state / ANSWERS, header) as answers:
                answer_questions(edited, subject.tokenizer, questions, answers, decoding, **how)
                answers.finish({"answers": len(answers.items)})
        with run.items(**about) as log:
            with stage("judgements"):
                judge_answers(judge, questions, answers.items, log, runs=request.runs)
            run.folder.publish(ANSWERS)
            run.finish(log, summarise_ratings(log.items), **about)
    return run.result
