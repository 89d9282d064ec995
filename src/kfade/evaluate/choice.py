"""Multiple choice by likelihood.

A question's choices are scored by log p(choice | question), in all or per token of the choice; the
largest wins. Per token, a long name gains from the spelling of its later tokens, which says nothing
of the question; in all, a short one gains from being short. So both are told. Chance is one over
the number of choices.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kfade.batches import Sequence as Tokens
from kfade.batches import make_batches
from kfade.errors import InputError
from kfade.head import hidden_states, read_head
from kfade.models import frozen
from kfade.progress import track


@dataclass(frozen=True)
class Question:
    """The beginning of a text and its possible continuations."""

    question: str
    choices: tuple[str, ...]
    answer: int


def read_questions(path: Path) -> list[Question]:
    """Questions of a JSONL file of ``{"question", "choices", "answer"}``.

    Raises:
        InputError: no such file, a malformed line, an answer that is not among the choices.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file of questions")
    questions = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            question = Question(row["question"], tuple(row["choices"]), row["answer"])
            question.choices[question.answer]
        except (json.JSONDecodeError, KeyError, TypeError, IndexError):
            raise InputError(
                f'{path}, line {number}: write {{"question": "...", "choices": ["...", ...], '
                '"answer": number of the right one, from 0}'
            ) from None
        questions.append(question)
    if not questions:
        raise InputError(f"{path} holds no questions")
    return questions


@dataclass(frozen=True)
class ChoiceResult:
    """Which questions were answered rightly."""

    correct: tuple[bool, ...]

    @property
    def accuracy(self) -> float:
        """Share of questions answered rightly."""
        return sum(self.correct) / len(self.correct)

    @property
    def standard_error(self) -> float:
        """Of the accuracy, binomial: √(a(1 − a)/n)."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / len(self.correct))


def answer_by_likelihood(
    model: nn.Module, tokenizer: Any, questions: Sequence[Question], *, batch_tokens: int = 4096
) -> dict[str, ChoiceResult]:
    """Answer each question with its likeliest continuation, a space before each choice.

    Returns:
        Results by scoring: ``total`` log-likelihood, and its mean ``per token``.
    """
    sequences = [
        _continuation(tokenizer, question.question, f" {choice}")
        for question in questions
        for choice in question.choices
    ]
    totals = log_likelihoods(model, sequences, batch_tokens=batch_tokens)
    means = [total / s.loss_tokens for total, s in zip(totals, sequences, strict=True)]
    return {
        "total": ChoiceResult(_right(questions, totals)),
        "per token": ChoiceResult(_right(questions, means)),
    }


def _right(questions: Sequence[Question], scores: Sequence[float]) -> tuple[bool, ...]:
    """Whether each question's best-scored choice is the right one."""
    rest = iter(scores)
    correct = []
    for question in questions:
        own = [next(rest) for _ in question.choices]
        correct.append(own.index(max(own)) == question.answer)
    return tuple(correct)


def log_likelihoods(
    model: nn.Module, sequences: Sequence[Tokens], *, batch_tokens: int = 4096
) -> list[float]:
    """Summed log-probability of each sequence's scored tokens, in nats."""
    device = next(model.parameters()).device
    totals = [0.0] * len(sequences)
    batches = make_batches(sequences, budget=batch_tokens, device=device)
    with frozen(model), torch.no_grad():
        head = read_head(model)
        for batch in track(batches, "questions", lambda b: b.positions):
            hidden_ND = batch.at_loss(hidden_states(model, batch.input_BT))
            target_N = batch.at_loss(batch.target_BT)
            values = []
            for part in head.chunks(hidden_ND):
                log_p = head(hidden_ND[part]).log_softmax(dim=-1)
                values.append(log_p.gather(1, target_N[part, None])[:, 0].double())
            sums = torch.zeros(batch.loss_BT.shape, dtype=torch.float64, device=device)
            sums[batch.loss_BT] = torch.cat(values)
            for index, total in zip(batch.id_B.tolist(), sums.sum(dim=1).tolist(), strict=True):
                totals[index] = total
    return totals


def _continuation(tokenizer: Any, start: str, continuation: str) -> Tokens:
    before = tokenizer(start).input_ids
    after = tokenizer(continuation, add_special_tokens=False).input_ids
    return Tokens((*before, *after), (False,) * len(before) + (True,) * len(after))
