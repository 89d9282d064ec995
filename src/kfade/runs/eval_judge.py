"""A model's answers, graded by a judge behind an API: from a request to a folder."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from kfade.errors import InputError
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
from kfade.runs import options as o
from kfade.runs.config import TemplateConfig
from kfade.runs.evaluation import EvaluationRequest, evaluation, settings_of
from kfade.runs.template import rendering_of
from kfade.runtime.stages import stage

ANSWERS = "answers.jsonl"


@o.settings(o.DATA)
@dataclass(frozen=True, kw_only=True)
class BenchRequest(EvaluationRequest):
    """Questions of several turns."""

    questions: Path
    """JSONL of {question_id, category, turns[, reference]}: MT-Bench's question.jsonl."""
    references: Path | None = None
    """Right answers that the judge sees: MT-Bench's reference_answer/gpt-4.jsonl."""
    runs: Annotated[int, o.at_least(1), Parameter(group=o.JUDGE)] = 1
    """Answer and judge so many times."""
    max_new_tokens: Annotated[int, o.at_least(1)] = 1024
    """Longest answer."""
    rendering: TemplateConfig = field(default_factory=TemplateConfig)
    """How conversations are rendered."""
    seed: Annotated[int, Parameter(group=o.RUN)] = 0
    """Seed of sampling."""


@o.settings(o.JUDGE)
@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """The model that grades, behind an API."""

    judge_url: str
    """Its server, as in http://localhost:8000/v1."""
    judge_model: str
    """Its name there."""
    judge_key_env: str | None = None
    """Environment variable that holds the API key. Unset: no key."""
    judge_timeout: Annotated[float, o.at_least(1)] = 300.0
    """Seconds to wait for one judgement."""
    judge_max_tokens: Annotated[int, o.at_least(1)] = 1024
    """Longest judgement."""

    def open(self) -> Judge:
        """The judge that these settings name.

        Raises:
            InputError: the environment variable of the key is not set.
        """
        key = None
        if self.judge_key_env is not None:
            # Not on the command line, where every user of the machine could read it.
            key = os.environ.get(self.judge_key_env)
            if not key:
                raise InputError(
                    f"--judge-key-env {self.judge_key_env}: this environment variable is not set"
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
        InputError: what is asked for cannot be done, or the judge cannot be reached.
    """
    judge = grader.open()
    settings = {
        **settings_of(request),
        # Where the judge is found decides no number: a resumed evaluation may look elsewhere.
        "judge_model": judge.model,
        "judge_max_tokens": judge.max_tokens,
    }
    how: dict[str, Any] = {
        "template": rendering_of(request.rendering, settings, out, resume=resume),
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
