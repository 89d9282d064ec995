"""``kfade eval choice``: multiple-choice questions by letters and by texts; lm-eval's tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from kfade.cli import options as o
from kfade.cli.eval import (
    Evaluation,
    Judged,
    digest_model,
    evaluation,
    interval,
    settings_of,
)
from kfade.cli.session import show
from kfade.errors import InputError
from kfade.evaluate.choice import SCORINGS, answer_questions, summarise_choice, verdict
from kfade.evaluate.lm_eval import check_installed, run_tasks
from kfade.evaluate.log import digest
from kfade.evaluate.questions import Question, read_sets
from kfade.models.load import model_window
from kfade.runtime.stages import stage

TASK_TOKENS = 512  # positions that an item of lm-eval is taken to have, to size its batches

NAME_WIDTH = 24  # of the printed table's first column
COLUMNS = ("letters", "text", "/token", "/character")  # SCORINGS in that table

Questions = Annotated[
    list[Path] | None,
    typer.Option(
        "--questions",
        help="JSONL of {question, choices, answer}, MMLU's csv, or a folder of csv files; may be "
        "given several times.",
        show_default=False,
        rich_help_panel=o.DATA,
    ),
]
Tasks = Annotated[
    str | None,
    typer.Option(
        "--tasks", help="lm-eval's own tasks, as in mmlu,wmdp_bio.", rich_help_panel=o.DATA
    ),
]
TaskFolder = Annotated[
    Path | None,
    typer.Option(
        "--task-folder", help="Folder of further lm-eval tasks (YAML).", rich_help_panel=o.DATA
    ),
]
Cloze = Annotated[
    bool,
    typer.Option(
        "--cloze",
        help="Questions are beginnings of texts that a choice continues.",
        rich_help_panel=o.DATA,
    ),
]


def choice(
    model: o.Model,
    out: o.Out,
    questions: Questions = None,
    tasks: Tasks = None,
    task_folder: TaskFolder = None,
    cloze: Cloze = False,
    update: o.UpdateDir = None,
    quantise: o.Quantise = None,
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
    """Accuracy on multiple-choice questions, or on tasks of lm-eval, with standard errors.

    Example: `kfade eval choice MODEL --update out/run --questions mmlu/test --out out/mmlu`
    """
    settings = settings_of(locals())
    if bool(questions) == bool(tasks):
        raise InputError("give --questions or --tasks, and one of them")
    paths = [str(path) for path in questions or ()]
    settings["questions"] = (paths[0] if len(paths) == 1 else paths) if paths else None
    asked = read_sets(questions or (), limit)
    if tasks:
        check_installed()
    with evaluation("choice", out, resume, settings) as run:
        subject = run.load(
            model, update=update, quantise=quantise, dtype=dtype, device=device,
            trust_remote_code=trust_remote_code, revision=revision, tokenizer=tokenizer,
        )  # fmt: skip
        with subject.edited() as edited:
            digests = {"weights_sha256": digest_model(edited)}
            if tasks:
                names = [name.strip() for name in tasks.split(",") if name.strip()]
                batch_size = max(1, batch_tokens // TASK_TOKENS)
                _run_tasks(run, subject, digests, names, task_folder, limit, batch_size, seed)
            else:
                _ask(run, subject, digests, asked, cloze, batch_tokens)
    show(run.result, json, _lines(run.result))


def _ask(
    run: Evaluation,
    subject: Judged,
    digests: dict[str, str],
    sets: Mapping[str, Sequence[Question]],
    cloze: bool,
    batch_tokens: int,
) -> None:
    """Of one set the items are called by their numbers, of several by the set's name too."""
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
        missing = [item for item in questions if item not in log.items]

        def note(place: int, scores: dict[str, list[float]]) -> None:
            question = questions[missing[place]]
            log.add(
                missing[place],
                question=question.question[:200],
                subject=question.subject,
                choices=len(question.choices),
                answer=question.answer,
                correct=verdict(scores, question.answer),
                scores=scores,
            )

        with stage("questions"):
            answer_questions(
                subject.model,
                subject.tokenizer,
                [questions[item] for item in missing],
                note,
                cloze=cloze,
                window=model_window(subject.model),
                batch_tokens=batch_tokens,
            )
        figures = {name: summarise_choice([log.items[i] for i in own]) for name, own in ids.items()}
        several = {"questions": len(questions), "sets": figures}
        run.finish(log, several if len(sets) > 1 else figures[next(iter(sets))], **digests)


def _run_tasks(
    run: Evaluation,
    subject: Judged,
    digests: dict[str, str],
    tasks: list[str],
    task_folder: Path | None,
    limit: int | None,
    batch_size: int,
    seed: int,
) -> None:
    with stage("tasks"):
        items, figures = run_tasks(
            subject.model,
            subject.tokenizer,
            tasks,
            task_folder=task_folder,
            limit=limit,
            batch_size=batch_size,
            seed=seed,
        )
    with run.items(**digests) as log:
        for name, values in items.items():
            if name not in log.items:
                log.add(name, **values)
        run.finish(log, {"tasks": figures, "items": len(items)}, **digests)


def _lines(result: Mapping[str, Any]) -> list[str]:
    if "tasks" in result:
        return [
            f"{task}: " + ", ".join(f"{name} {interval(value)}" for name, value in figures.items())
            for task, figures in result["tasks"].items()
        ]
    lines = [_row("accuracy in %, by", "n", "chance", COLUMNS)]
    for name, own in result.get("sets", {"all questions": result}).items():
        chance = f"{100 * own['chance']:.1f}"
        lines.append(_row(name, own["questions"], chance, _percents(own["accuracy"])))
        for subject, figures in own.get("subjects", {}).items():
            lines.append(_row(f"  {subject or '-'}", figures["questions"], "", _percents(figures)))
    return [*lines, f"every question in {result['out']}/items.jsonl"]


def _row(name: str, count: object, chance: str, cells: Sequence[str]) -> str:
    """One line of a table 80 characters wide."""
    short = name if len(name) < NAME_WIDTH else f"{name[: NAME_WIDTH - 2]}…"
    return f"{short:<{NAME_WIDTH}}{count:>5}{chance:>7}" + "".join(f"{c:>11}" for c in cells)


def _percents(accuracies: Mapping[str, Any]) -> list[str]:
    """Accuracy ± standard error by each scoring."""
    figures = [accuracies[scoring] for scoring in SCORINGS]
    return [f"{100 * f['value']:.1f} ±{100 * f['standard_error']:.1f}" for f in figures]
