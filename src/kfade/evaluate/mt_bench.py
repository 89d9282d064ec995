"""MT-Bench: questions of several turns, answered by a model, graded by a judge (Zheng et al. 2023).

Answers and judgements go to two logs, so that answers are kept when the judge fails. Answers are
named ``{run}/{question}``, judgements ``{run}/{question}/{turn}``. Each run answers again, with
its own seed, and is judged again.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from kfade.data.chat import ChatTemplate
from kfade.data.examples import PLAIN_QA, Example
from kfade.data.rows import read_rows
from kfade.data.sequences import encode_prompt
from kfade.errors import InputError
from kfade.evaluate.division import map_shared
from kfade.evaluate.generation import Decoding, generate_texts
from kfade.evaluate.item_log import ItemLog
from kfade.evaluate.judge import Judge, Reply, judge_messages, rating_of
from kfade.evaluate.log import blocks
from kfade.evaluate.uncertainty import standard_error

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
# FastChat shows the judge references for these only, though its file also holds others.
ONE_RIGHT_ANSWER = ("math", "reasoning", "coding")
NEXT_QUESTION = "\nQuestion:"  # ends an answer without a chat template
BLOCK = 16  # questions between two writes of the log
DECODING = Decoding(max_new_tokens=1024)


@dataclass(frozen=True)
class BenchQuestion:
    """The user's turns, and right answers to them where there are any."""

    id: str
    category: str
    turns: tuple[str, ...]
    references: tuple[str, ...] = ()

    @property
    def temperature(self) -> float:
        """Sampling temperature of the answers."""
        return TEMPERATURES.get(self.category, OTHER_TEMPERATURE)


def read_bench(path: Path, references: Path | None = None) -> list[BenchQuestion]:
    """Questions of a file in the form of MT-Bench's ``question.jsonl``.

    Args:
        references: right answers, in the form of its ``reference_answer/gpt-4.jsonl``. They replace
            those in the file of questions, for mathematics, reasoning and coding only.

    Raises:
        InputError: no such file, a malformed line, an id twice, an empty file, references of other
            questions.
    """
    questions: dict[str, BenchQuestion] = {}
    for where, row in read_rows(str(path)):
        question = _question(row, where)
        if question.id in questions:
            raise InputError(f"{where}: question_id {question.id} is used twice")
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
    decoding: Decoding = DECODING,
    *,
    runs: int = 1,
    template: ChatTemplate | None = None,
) -> None:
    """Answer the questions that ``log`` lacks, a block at a time.

    An incomplete block is answered again as a whole, so that a resumed evaluation runs the same
    batches. The sampling for a question depends on the question, the run and the seed alone.

    Args:
        decoding: its temperature is not used; each question has its own.
        template: how conversations are rendered. Without a chat template, prompts consist of
            ``Question: `` and ``Answer: ``, and an answer ends where the model writes the next
            question.

    Raises:
        InputError: the chat template is missing; a conversation outgrows the model's window.
    """
    plain = not (template or ChatTemplate()).used_by(tokenizer)
    work = [
        (run, block)
        for run in range(runs)
        for block in _blocks(questions)
        if any(f"{run}/{question.id}" not in log.items for question in block)
    ]

    def answer(task: tuple[int, Sequence[BenchQuestion]]) -> list[list[str]]:
        run, block = task
        answers: list[list[str]] = [[] for _ in block]
        for turn in range(max(len(question.turns) for question in block)):
            asked = [i for i, question in enumerate(block) if turn < len(question.turns)]
            said = [_conversation(block[i], answers[i]) for i in asked]
            prompts = [encode_prompt(e, tokenizer, template=template) for e in said]
            seed = decoding.seed * 1_000_003 + run * 101 + turn
            own = replace(decoding, temperature=block[0].temperature, seed=seed)
            texts = generate_texts(model, tokenizer, prompts, own)
            for i, text in zip(asked, texts, strict=True):
                answers[i].append((text.split(NEXT_QUESTION)[0] if plain else text).strip())
        return answers

    answered = map_shared(work, answer, "answers", cost=lambda task: len(task[1]), model=model)
    for (run, block), answers in zip(work, answered, strict=True):
        for question, given in zip(block, answers, strict=True):
            if f"{run}/{question.id}" not in log.items:
                log.add(f"{run}/{question.id}", category=question.category, answers=given)


def judge_answers(
    judge: Judge,
    questions: Sequence[BenchQuestion],
    answers: Mapping[str, Mapping[str, Any]],
    log: ItemLog,
    *,
    runs: int = 1,
) -> None:
    """Have the judge grade every answer that has no judgement in ``log``.

    Raises:
        InputError: the judge refused, or failed at every try; earlier judgements are in the log.
    """
    work = [
        (run, question, turn)
        for run in range(runs)
        for question in questions
        for turn in range(1, len(question.turns) + 1)
        if f"{run}/{question.id}/{turn}" not in log.items
    ]

    def given(run: int, question: BenchQuestion, turn: int) -> list[str]:
        said: list[str] = answers[f"{run}/{question.id}"]["answers"]
        return said[:turn]

    def ask(task: tuple[int, BenchQuestion, int]) -> Reply:
        question = task[1]
        return judge.ask(judge_messages(question.turns, given(*task), question.references))

    replies = map_shared(work, ask, "judgements", cost=lambda task: 1)
    for (run, question, turn), reply in zip(work, replies, strict=True):
        log.add(
            f"{run}/{question.id}/{turn}",
            category=question.category,
            question=question.turns[turn - 1],
            answer=given(run, question, turn)[-1],
            rating=rating_of(reply.text),
            reply=reply.text,
            cut_off=reply.cut_off,
        )


def summarise_ratings(judgements: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Mean ratings, over all judgements and by run, turn and category, with standard errors.

    Returns:
        ``score``; ``standard_error``, its standard error over runs, s/√runs (None for one run);
        ``standard_error_questions``, that over the questions' mean ratings, s/√n; ``by_run``,
        ``by_turn``, ``by_category``; ``judged``; ``unrated``, replies without a rating, which no
        mean includes; ``cut_off``, unrated replies that ended at the judge's token limit. A mean
        of no ratings is None.
    """
    ratings: list[float] = []
    unrated: list[Mapping[str, Any]] = []
    by: dict[str, dict[str, list[float]]] = {
        name: defaultdict(list) for name in ("run", "turn", "category", "question")
    }
    for key, judgement in judgements.items():
        run, rest = key.split("/", 1)
        question, turn = rest.rsplit("/", 1)
        if judgement["rating"] is None:
            unrated.append(judgement)
            continue
        ratings.append(judgement["rating"])
        names = {"run": run, "turn": turn, "category": judgement["category"], "question": question}
        for name, group in names.items():
            by[name][group].append(judgement["rating"])
    means = {
        name: {group: statistics.fmean(own) for group, own in sorted(groups.items())}
        for name, groups in by.items()
    }
    return {
        "score": statistics.fmean(ratings) if ratings else None,
        "standard_error": standard_error(list(means["run"].values())),
        "standard_error_questions": standard_error(list(means["question"].values())),
        **{f"by_{name}": means[name] for name in ("run", "turn", "category")},
        "judged": len(judgements),
        "unrated": len(unrated),
        "cut_off": sum(judgement.get("cut_off", False) for judgement in unrated),
    }


def _blocks(questions: Sequence[BenchQuestion]) -> list[Sequence[BenchQuestion]]:
    """Blocks of questions of one temperature."""
    groups: dict[float, list[BenchQuestion]] = defaultdict(list)
    for question in questions:
        groups[question.temperature].append(question)
    return [block for group in groups.values() for block in blocks(group, BLOCK)]


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
