"""Multiple-choice questions: where they come from and how they are put to a model.

The prompts are those of lm-evaluation-harness, zero-shot, to the character: with letters as in its
``mmlu`` and ``wmdp`` tasks, with texts as in ``mmlu_continuation``.
"""

from __future__ import annotations

import csv
import json
import string
from dataclasses import dataclass
from pathlib import Path

from kfade.errors import InputError

LETTERS = string.ascii_uppercase


@dataclass(frozen=True)
class Question:
    """A question, or the beginning of a text, and its possible answers or continuations."""

    question: str
    choices: tuple[str, ...]
    answer: int
    subject: str = ""
    """What it is about, as the description line names it."""


def letter_prompt(question: Question) -> str:
    """Description, question, lettered choices, ``Answer:``; a space and a letter follow."""
    about = f" about {question.subject}" if question.subject else ""
    description = f"The following are multiple choice questions (with answers){about}.\n\n"
    choices = [f"{LETTERS[i]}. {choice}\n" for i, choice in enumerate(question.choices)]
    return f"{description}{question.question.strip()}\n{''.join(choices)}Answer:"


def text_prompt(question: Question) -> str:
    """Question and ``Answer:``; what follows is a space and the text of a choice."""
    return f"Question: {question.question.strip()}\nAnswer:"


def read_questions(path: Path) -> list[Question]:
    """Questions of a JSONL file, of a file in MMLU's csv form, or of a folder of such files.

    JSONL: ``{"question", "choices", "answer"[, "subject"]}``, the answer counted from 0. csv: no
    header, a question, its choices and the answer's letter in a row; the subject is the file's name
    without ``_test``, ``_val`` or ``_dev``. A folder: all csv files in it, or in its ``test``.

    Raises:
        InputError: nothing there, a malformed line, an answer that is not among the choices.
    """
    if path.is_dir():
        files = sorted(path.glob("*.csv")) or sorted((path / "test").glob("*.csv"))
        if not files:
            raise InputError(f"{path}: no csv files in it, nor in a folder test; give a file")
        return [question for file in files for question in read_questions(file)]
    if not path.is_file():
        raise InputError(f"{path}: no such file of questions")
    try:
        questions = _read_csv(path) if path.suffix == ".csv" else _read_json_lines(path)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    if not questions:
        raise InputError(f"{path} holds no questions")
    return questions


def _read_json_lines(path: Path) -> list[Question]:
    questions = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            question = Question(
                row["question"], tuple(row["choices"]), row["answer"], row.get("subject", "")
            )
            assert isinstance(question.question, str)
            assert 2 <= len(question.choices) <= len(LETTERS)
            assert all(isinstance(choice, str) for choice in question.choices)
            assert question.answer in range(len(question.choices))
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError, AssertionError):
            raise InputError(
                f'{path}, line {number}: write {{"question": "...", "choices": ["...", ...], '
                '"answer": number of the right one, from 0}'
            ) from None
        questions.append(question)
    return questions


def _read_csv(path: Path) -> list[Question]:
    subject = path.stem
    for ending in ("_test", "_val", "_dev"):
        subject = subject.removesuffix(ending)
    questions = []
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.reader(file)
        for row in reader:
            question, *choices, letter = row if len(row) >= 4 else ("", "", "")
            if not letter or letter not in LETTERS[: len(choices)]:
                raise InputError(
                    f"{path}, line {reader.line_num}: write a question, its choices and the right "
                    "one's letter, as in: question,first,second,third,fourth,A"
                )
            answer = LETTERS.index(letter)
            questions.append(Question(question, tuple(choices), answer, subject.replace("_", " ")))
    return questions
