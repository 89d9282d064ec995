"""``kfade eval mt-bench``: a model's answers, graded by a judge model behind an API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kfade.cli import options as o
from kfade.cli.session import console, session, show
from kfade.runs.eval_judge import BenchRequest, JudgeConfig, evaluate_mt_bench


def mt_bench(
    request: BenchRequest,
    *,
    judge: JudgeConfig,
    out: o.Out,
    resume: o.Resume = False,
    json: o.Json = False,
) -> None:
    """Mean rating, 1 to 10, of MODEL's answers to questions of several turns.

    Example: `kfade eval mt-bench MODEL --update out/run --questions question.jsonl
    --judge-url http://localhost:8000/v1 --judge-model NAME --runs 3 --out out/mt-bench`
    """
    with session():
        result = evaluate_mt_bench(request, judge, out, resume=resume)
    _show(result, json)


def _show(result: Mapping[str, Any], as_json: bool) -> None:
    if result["unrated"]:
        console.print(
            f"note: {result['unrated']} of {result['judged']} replies of the judge contained no "
            "[[rating]] from 1 to 10; they are not in the means (see reply in items.jsonl)"
        )
    if result["cut_off"]:
        console.print(
            f"note: {result['cut_off']} of those replies were cut off before their rating: raise "
            "--judge-max-tokens"
        )
    if result["score"] is None:
        show(dict(result), as_json, ["no reply of the judge contained a rating"])
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
