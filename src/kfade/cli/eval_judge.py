"""``kfade eval mt-bench``: a model's answers, graded by a judge behind an API."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from kfade.cli import options as o
from kfade.cli.session import console, session, show
from kfade.errors import InputError
from kfade.evaluate.judge import Judge
from kfade.runs.eval_judge import BenchRequest, evaluate_mt_bench

JUDGE = "Judge"

Questions = Annotated[
    Path,
    typer.Option(
        "--questions",
        help="JSONL of {question_id, category, turns[, reference]}: MT-Bench's question.jsonl.",
        rich_help_panel=o.DATA,
    ),
]
References = Annotated[
    Path | None,
    typer.Option(
        "--references",
        help="Right answers that the judge sees: MT-Bench's reference_answer/gpt-4.jsonl.",
        show_default=False,
        rich_help_panel=o.DATA,
    ),
]
JudgeUrl = Annotated[
    str,
    typer.Option(
        "--judge-url", help="Server, as in http://localhost:8000/v1.", rich_help_panel=JUDGE
    ),
]
JudgeModel = Annotated[
    str, typer.Option("--judge-model", help="Its model's name.", rich_help_panel=JUDGE)
]
JudgeKeyEnv = Annotated[
    str | None,
    typer.Option(
        "--judge-key-env",
        help="Environment variable that holds the API key. [no key]",
        show_default=False,
        rich_help_panel=JUDGE,
    ),
]
JudgeTimeout = Annotated[
    float,
    typer.Option(
        "--judge-timeout", min=1, help="Seconds to wait for one judgement.", rich_help_panel=JUDGE
    ),
]
JudgeMaxTokens = Annotated[
    int,
    typer.Option("--judge-max-tokens", min=1, help="Longest judgement.", rich_help_panel=JUDGE),
]
Runs = Annotated[
    int,
    typer.Option("--runs", min=1, help="Answer and judge so many times.", rich_help_panel=JUDGE),
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer.", rich_help_panel=o.DATA)]
Seed = Annotated[int, typer.Option("--seed", help="Seed of sampling.", rich_help_panel=o.RUN)]


def mt_bench(
    model: o.Model,
    questions: Questions,
    judge_url: JudgeUrl,
    judge_model: JudgeModel,
    out: o.Out,
    references: References = None,
    update: o.UpdateDir = None,
    quantise: o.Quantise = None,
    judge_key_env: JudgeKeyEnv = None,
    judge_timeout: JudgeTimeout = 300.0,
    judge_max_tokens: JudgeMaxTokens = 1024,
    runs: Runs = 1,
    max_new_tokens: MaxNewTokens = 1024,
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
    seed: Seed = 0,
    resume: o.Resume = False,
    json: o.Json = False,
) -> None:
    """Mean rating, 1 to 10, of MODEL's answers to questions of several turns.

    Example: `kfade eval mt-bench MODEL --update out/run --questions question.jsonl
    --judge-url http://localhost:8000/v1 --judge-model NAME --runs 3 --out out/mt-bench`
    """
    request = o.request_of(BenchRequest, locals())
    judge = Judge(
        judge_url,
        judge_model,
        _key(judge_key_env),
        timeout=judge_timeout,
        max_tokens=judge_max_tokens,
    )
    with session():
        result = evaluate_mt_bench(request, judge, out, resume=resume)
    _show(result, json)


def _key(variable: str | None) -> str | None:
    """The key, out of the environment: on the command line it would be seen by everybody."""
    if variable is None:
        return None
    key = os.environ.get(variable)
    if not key:
        raise InputError(f"--judge-key-env {variable}: this environment variable is not set")
    return key


def _show(result: Mapping[str, Any], as_json: bool) -> None:
    if result["unrated"]:
        console.print(
            f"note: {result['unrated']} of {result['judged']} replies of the judge held no "
            "[[rating]] from 1 to 10; they count in no mean (see reply in items.jsonl)"
        )
    if result["cut_off"]:
        console.print(
            f"note: {result['cut_off']} of those replies were cut off before their rating: raise "
            "--judge-max-tokens"
        )
    if result["score"] is None:
        show(dict(result), as_json, ["no reply of the judge held a rating"])
        return
    over_runs, over_questions = result["standard_error"], result["standard_error_questions"]
    errors = [
        f"± {error:.2f} over {what}"
        for error, what in ((over_runs, "runs"), (over_questions, "questions"))
        if error is not None
    ]
    lines = [f"score {result['score']:.2f} of 10 {', '.join(errors)}"]
    lines += [f"  turn {name}: {mean:.2f}" for name, mean in result["by_turn"].items()]
    lines += [f"  {name}: {mean:.2f}" for name, mean in result["by_category"].items()]
    show(dict(result), as_json, lines)
