"""MT-Bench: questions of several turns, answered by a model, graded by a judge (Zheng et al. 2023).

Answers and judgements are two logs, so that neither is lost when the other fails: answers by
``{run}/{question}``, judgements by ``{run}/{question}/{turn}``. Each run answers anew, with its own
seed, and is judged anew.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from kfade.data.chat import ChatTemplate
from kfade.data.examples import PLAIN_QA, Example
from kfade.data.rows import read_rows
from kfade.data.sequences import encode_prompt
from kfade.errors import InputError
from kfade.evaluate.generation import generate_texts
from kfade.evaluate.judge import Judge, judge_messages, rating_of
from kfade.evaluate.log import ItemLog
from kfade.evaluate.uncertainty import standard_error
from kfade.runtime.progress import track

# FastChat's sampling by category; 0 is greedy.
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
OTHER_TEMPERATURE = 0.7
# FastChat shows its judge references for these only; its file of them holds others, too.
ONE_RIGHT_ANSWER = ("math", "reasoning", "coding")
NEXT_QUESTION = "\nQuestion:"  # where a model without a chat template begins to ask itself
BLOCK = 16  # questions between two writes of the log


@dataclass(frozen=True)
class BenchQuestion:
    """What the user says turn by turn, and right answers where there are any."""

    id: str
    category: str
    turns: tuple[str, ...]
    references: tuple[str, ...] = ()

    @property
    def temperature(self) -> float:
        """Of the answers' sampling."""
        return TEMPERATURES.get(self.category, OTHER_TEMPERATURE)


def read_bench(path: Path, references: Path | None = None) -> list[BenchQuestion]:
    """Questions of a file in the form of MT-Bench's ``question.jsonl``.

    Args:
        references: right answers, in the form of its ``reference_answer/gpt-4.jsonl``; they go
            before those of the questions' own file, for mathematics, reasoning and coding only.

    Raises:
        InputError: no such file, a malformed line, an id twice, an empty file, references of other
            questions.
    """
    questions: dict[str, BenchQuestion] = {}
    for where, row in read_rows(str(path)):
        question = _question(row, where)
        if question.id in questions:
            raise InputError(f"{where}: question_id {question.id} is there twice")
        questions[question.id] = question
    if not questions:
        raise InputError(f"{path} holds no questions")
    if references is None:
        return list(questions.values())
    answers = dict(_reference(row, where) for where, row in read_rows(str(references)))
    if not questions.keys() & answers:
        raise InputError(f"{references}: answers none of the questions of {path}")
    return [
        replace(question, references=answers[question.id])
        if question.category in ONE_RIGHT_ANSWER and question.id in answers
        else question
        for question in questions.values()
    ]


def answer_questions(
    model: nn.Module,
    tokenizer: Any,
    questions: Sequence[BenchQuestion],
    log: ItemLog,
    *,
    runs: int = 1,
    template: ChatTemplate | None = None,
    max_new_tokens: int = 1024,
    batch_tokens: int = 4096,
    seed: int = 0,
) -> None:
    """Answer what ``log`` does not hold yet, a block of questions at a time.

    A block that was cut off is answered anew as a whole, so that a resumed evaluation runs the same
    batches. What is drawn for a question depends on it, the run and the seed, not on the others.

    Args:
        template: how conversations are rendered. Where no template is used, ``Question: `` and
            ``Answer: `` stand before the turns, and an answer ends where the model asks the next
            question itself.

    Raises:
        InputError: the chat template is missing; a conversation outgrows the model's window.
    """
    plain = not (template or ChatTemplate()).used_by(tokenizer)
    work = [(run, block) for run in range(runs) for block in _blocks(questions)]
    for run, block in track(work, "answers", lambda w: len(w[1])):
        if all(f"{run}/{question.id}" in log.items for question in block):
            continue
        answers: list[list[str]] = [[] for _ in block]
        for turn in range(max(len(question.turns) for question in block)):
            asked = [i for i, question in enumerate(block) if turn < len(question.turns)]
            said = [_conversation(block[i], answers[i]) for i in asked]
            texts = generate_texts(
                model,
                tokenizer,
                [encode_prompt(example, tokenizer, template=template) for example in said],
                max_new_tokens=max_new_tokens,
                batch_tokens=batch_tokens,
                temperature=block[0].temperature,
                seed=seed * 1_000_003 + run * 101 + turn,
            )
            for i, text in zip(asked, texts, strict=True):
                answers[i].append((text.split(NEXT_QUESTION)[0] if plain else text).strip())
        for question, own in zip(block, answers, strict=True):
            if f"{run}/{question.id}" not in log.items:
                log.add(f"{run}/{question.id}", category=question.category, answers=own)


def judge_answers(
    judge: Judge,
    questions: Sequence[BenchQuestion],
    answers: Mapping[str, Mapping[str, Any]],
    log: ItemLog,
    *,
    runs: int = 1,
) -> None:
    """Have every answer graded that ``log`` holds no judgement of, and keep the reply.

    Raises:
        InputError: the judge refused, or failed at every try; what was judged is in the log.
    """
    work = [
        (run, question, turn)
        for run in range(runs)
        for question in questions
        for turn in range(1, len(question.turns) + 1)
        if f"{run}/{question.id}/{turn}" not in log.items
    ]
    for run, question, turn in track(work, "judgements"):
        given = answers[f"{run}/{question.id}"]["answers"][:turn]
        reply = judge.ask(judge_messages(question.turns, given, question.references))
        log.add(
            f"{run}/{question.id}/{turn}",
            category=question.category,
            question=question.turns[turn - 1],
            answer=given[-1],
            rating=rating_of(reply.text),
            reply=reply.text,
            cut_off=reply.cut_off,
        )


def summarise_ratings(judgements: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Mean ratings over all, by turn and by category, and how sure they are.

    Returns:
        ``score``; ``standard_error`` of it over runs, s/√runs (None for one run), and
        ``standard_error_questions``, s/√n of the questions' own means; ``by_run``, ``by_turn``,
        ``by_category``; ``judged``; ``unrated``: replies that held no rating, which count in no
        mean, and ``cut_off``: those of them that ended at the longest judgement. A mean of nothing
        is None.
    """
    runs: dict[str, list[float]] = defaultdict(list)
    turns: dict[str, list[float]] = defaultdict(list)
    categories: dict[str, list[float]] = defaultdict(list)
    questions: dict[str, list[float]] = defaultdict(list)
    unrated = cut_off = 0
    for key, judgement in judgements.items():
        run, rest = key.split("/", 1)
        question, turn = rest.rsplit("/", 1)
        rating = judgement["rating"]
        if rating is None:
            unrated += 1
            cut_off += judgement.get("cut_off", False)
            continue
        for groups, name in (
            (runs, run),
            (turns, turn),
            (categories, judgement["category"]),
            (questions, question),
        ):
            groups[name].append(rating)
    run_means = [statistics.fmean(ratings) for ratings in runs.values()]
    question_means = [statistics.fmean(ratings) for ratings in questions.values()]
    ratings = [rating for group in runs.values() for rating in group]
    return {
        "score": statistics.fmean(ratings) if ratings else None,
        "standard_error": standard_error(run_means),
        "standard_error_questions": standard_error(question_means),
        "by_run": _means(runs),
        "by_turn": _means(turns),
        "by_category": _means(categories),
        "judged": len(judgements),
        "unrated": unrated,
        "cut_off": cut_off,
    }


def _blocks(questions: Sequence[BenchQuestion]) -> list[list[BenchQuestion]]:
    """Questions of one temperature together."""
    groups: dict[float, list[BenchQuestion]] = defaultdict(list)
    for question in questions:
        groups[question.temperature].append(question)
    return [
        group[start : start + BLOCK]
        for group in groups.values()
        for start in range(0, len(group), BLOCK)
    ]


def _conversation(question: BenchQuestion, answers: Sequence[str]) -> Example:
    """The conversation so far, up to where the model speaks again."""
    turns: list[tuple[str, str]] = []
    for turn, answer in zip(question.turns, answers, strict=False):
        turns += [("user", turn), ("assistant", answer)]
    turns.append(("user", question.turns[len(answers)]))
    return Example(f"question {question.id}", turns=tuple(turns), plain_prefix=PLAIN_QA)


def _question(row: Any, where: str) -> BenchQuestion:
    match row:
        case {"question_id": int() | str() as key, "category": str(category), "turns": [*turns]}:
            references = row.get("reference") or []
            texts = [*turns, *references] if isinstance(references, list) else [None]
            if turns and all(isinstance(text, str) for text in texts):
                return BenchQuestion(str(key), category, tuple(turns), tuple(references))
    raise InputError(
        f'{where}: write {{"question_id": 1, "category": "...", "turns": ["...", "..."]}}, and '
        '"reference": ["...", "..."] where there are right answers'
    )


def _reference(row: Any, where: str) -> tuple[str, tuple[str, ...]]:
    """(id of the question, right answers by turn)."""
    match row:
        case {"question_id": int() | str() as key, "choices": [{"turns": [*turns]}, *_]}:
            if turns and all(isinstance(turn, str) for turn in turns):
                return str(key), tuple(turns)
    raise InputError(
        f'{where}: write {{"question_id": 1, "choices": [{{"turns": ["...", "..."]}}]}}, as in '
        "MT-Bench's reference_answer/gpt-4.jsonl"
    )


def _means(groups: Mapping[str, Iterable[float]]) -> dict[str, float]:
    return {name: statistics.fmean(ratings) for name, ratings in sorted(groups.items())}
