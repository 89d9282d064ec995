"""Multiple-choice questions: reading them from files, and their prompts.

The prompts are exactly those of lm-evaluation-harness, zero-shot: with letters as in its ``mmlu``
and ``wmdp`` tasks, with texts as in ``mmlu_continuation``.
"""

from __future__ import annotations

import csv
import io
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from kfade.data.rows import read_rows, read_utf8
from kfade.errors import InputError

LETTERS = string.ascii_uppercase


@dataclass(frozen=True)
class Question:
    """A question, or the beginning of a text, and its possible answers or continuations."""

    question: str
    choices: tuple[str, ...]
    answer: int
    subject: str = ""
    """Its subject, as the first line of a prompt names it."""


def letter_prompt(question: Question) -> str:
    """Description, question, lettered choices, ``Answer:``; a space and a letter follow."""
    about = f" about {question.subject}" if question.subject else ""
    description = f"The following are multiple choice questions (with answers){about}.\n\n"
    choices = [f"{LETTERS[i]}. {choice}\n" for i, choice in enumerate(question.choices)]
    return f"{description}{question.question.strip()}\n{''.join(choices)}Answer:"


def text_prompt(question: Question) -> str:
    """Question and ``Answer:``; what follows is a space and the text of a choice."""
    return f"Question: {question.question.strip()}\nAnswer:"


def name_of_set(path: str) -> str:
    """Name of the questions of a file or folder: its own name, or mmlu for ``.../mmlu/test``."""
    own = PurePath(path)
    whole = own.stem in ("test", "val") and own.parent.name
    return (own.parent.name if whole else own.stem).replace("_", " ")


def read_sets(paths: Sequence[Path], limit: int | None = None) -> dict[str, list[Question]]:
    """Questions of each path by :func:`name_of_set`, with the folder's name where two are alike.

    Raises:
        InputError: a path given twice, or what :func:`read_questions` refuses.
    """
    names = [name_of_set(str(path)) for path in paths]
    sets: dict[str, list[Question]] = {}
    for path, name in zip(paths, names, strict=True):
        if names.count(name) > 1:
            name = f"{path.resolve().parent.name} {name}"
        if name in sets:
            raise InputError(f"{path}: a set of questions called {name} is given twice")
        sets[name] = read_questions(path, limit)
    return sets


def read_questions(path: Path, limit: int | None = None) -> list[Question]:
    """Questions of a JSONL file, of a file in MMLU's csv form, or of a folder of csv files.

    JSONL: ``{"question", "choices", "answer"[, "subject"]}``, answers counted from 0. csv: no
    header; a row has a question, its choices and the answer's letter. The subject is the file's
    name without ``_test``, ``_val`` or ``_dev``. A folder: all csv files in it, or in its ``test``.

    Args:
        limit: take the first so many of each file only.

    Raises:
        InputError: nothing there, a malformed line, an answer that is not among the choices.
    """
    if path.is_dir():
        files = sorted(path.glob("*.csv")) or sorted((path / "test").glob("*.csv"))
        if not files:
            raise InputError(f"{path}: no csv files in it, nor in a folder test; give a file")
        return [question for file in files for question in read_questions(file, limit)]
    if not path.is_file():
        raise InputError(f"{path}: no such file of questions")
    if path.suffix == ".csv":
        questions = _read_csv(path)
    else:
        questions = [_question(row, where) for where, row in read_rows(str(path))]
    if not questions:
        raise InputError(f"{path} holds no questions")
    return questions[:limit]


def _question(row: Any, where: str) -> Question:
    match row:
        case {"question": str(question), "choices": [*choices], "answer": int(answer)}:
            subject = row.get("subject") or ""  # data sets hold null for a missing value
            texts = all(isinstance(text, str) for text in (subject, *choices))
            if texts and 2 <= len(choices) <= len(LETTERS) and answer in range(len(choices)):
                return Question(question, tuple(choices), answer, subject)
    raise InputError(
        f'{where}: write {{"question": "...", "choices": ["...", ...], "answer": number of the '
        'right one, from 0[, "subject": "..."]}'
    )


def _read_csv(path: Path) -> list[Question]:
    subject = path.stem
    for ending in ("_test", "_val", "_dev"):
        subject = subject.removesuffix(ending)
    questions = []
    reader = csv.reader(io.StringIO(read_utf8(path), newline=""))
    try:
        rows = [(reader.line_num, row) for row in reader if row]  # without empty lines
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: not csv ({error})") from None
    for line, row in rows:
        question, *choices, letter = row if len(row) >= 4 else ("", "", "")
        if letter not in [*LETTERS[: len(choices)]]:
            raise InputError(
                f"{path}, line {line}: write a question, its choices and the right one's letter, "
                "as in: question,first,second,third,fourth,A"
            )
        answer = LETTERS.index(letter)
        questions.append(Question(question, tuple(choices), answer, subject.replace("_", " ")))
    return questions
