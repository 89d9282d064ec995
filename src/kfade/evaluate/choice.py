"""Multiple choice by likelihood.

A question's choices are scored by log p(choice | question); the largest wins. By letters, as
lm-evaluation-harness does for MMLU and WMDP: all choices are shown and p is that of a letter. Small
models do not follow letters, so also by the choices' own texts: in all, per token, and per
character (the harness's ``acc_norm``). In all, a short text gains from being short; per token, a
long name gains from the spelling of its later tokens. Chance is one over the number of choices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kfade.data.sequences import continuation
from kfade.evaluate.questions import LETTERS, Question, letter_prompt, text_prompt
from kfade.evaluate.tokens import log_likelihoods, token_values
from kfade.runtime.progress import track

CHUNK = 256  # questions whose answers are kept at once; their sequences are sorted by length
SCORINGS = ("letters", "text", "text_per_token", "text_per_character")


@dataclass(frozen=True)
class ChoiceResult:
    """Which questions were answered rightly."""

    correct: tuple[bool, ...]
    probabilities: tuple[float, ...] = ()
    """Of the right choice among the choices, exp(its score) / Σ exp(score); empty where only the
    verdicts are known."""

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
    scored = _score_texts(
        model, tokenizer, questions, [q.question for q in questions], None, batch_tokens
    )
    results = {}
    for word, key in (("total", "text"), ("per token", "text_per_token")):
        own = [(scores[key], q.answer) for scores, q in zip(scored, questions, strict=True)]
        correct = tuple(_best(scores) == answer for scores, answer in own)
        among = [torch.tensor(scores, dtype=torch.float64).softmax(dim=0) for scores, _ in own]
        right = (p[answer].item() for p, (_, answer) in zip(among, own, strict=True))
        results[word] = ChoiceResult(correct, tuple(right))
    return results


def answer_questions(
    model: nn.Module,
    tokenizer: Any,
    questions: Sequence[Question],
    note: Callable[[int, dict[str, list[float]]], None],
    *,
    cloze: bool = False,
    window: int | None = None,
    batch_tokens: int = 4096,
) -> None:
    """Call ``note(index, scores)`` for each question: a score of each choice by each scoring.

    Args:
        cloze: the question is the beginning of a text that a choice continues; it is put as it is,
            not as ``Question: ... Answer:``, where texts are scored.
        window: the model's longest input; of a longer one the last tokens are kept.
    """
    starts = range(0, len(questions), CHUNK)
    for start in track(starts, "questions", lambda s: min(CHUNK, len(questions) - s)):
        some = questions[start : start + CHUNK]
        contexts = [q.question if cloze else text_prompt(q) for q in some]
        letters = _score_letters(model, tokenizer, some, window, batch_tokens)
        texts = _score_texts(model, tokenizer, some, contexts, window, batch_tokens)
        for index, (letter, text) in enumerate(zip(letters, texts, strict=True), start):
            note(index, {"letters": letter, **text})


def verdict(scores: Mapping[str, Sequence[float]], answer: int) -> dict[str, bool]:
    """Whether the best-scored choice is the right one, by scoring; the first of equals counts."""
    return {scoring: _best(scores[scoring]) == answer for scoring in SCORINGS}


def summarise_choice(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Accuracy with its standard error by scoring, in all and by subject.

    Each item has ``correct`` (by scoring), ``subject`` and ``choices`` (their number). In all, each
    question counts alike, as in the harness's groups.
    """
    subjects = sorted({item["subject"] for item in items})
    result: dict[str, Any] = {
        "questions": len(items),
        "chance": sum(1 / item["choices"] for item in items) / len(items),
        "accuracy": _accuracies(items),
    }
    if len(subjects) > 1:
        own = {name: [item for item in items if item["subject"] == name] for name in subjects}
        result["subjects"] = {
            name: {"questions": len(some), **_accuracies(some)} for name, some in own.items()
        }
    return result


def _score_letters(
    model: nn.Module,
    tokenizer: Any,
    questions: Sequence[Question],
    window: int | None,
    batch_tokens: int,
) -> list[list[float]]:
    """log p of each letter; one forward pass a question where a letter is one token."""
    prompts = [letter_prompt(question) for question in questions]
    most = max(len(question.choices) for question in questions)
    ends = [continuation(tokenizer, "Answer:", f" {letter}") for letter in LETTERS[:most]]
    if any(end.loss_tokens > 1 for end in ends):
        sequences = [
            continuation(tokenizer, prompt, f" {letter}", window=window)
            for prompt, question in zip(prompts, questions, strict=True)
            for letter in LETTERS[: len(question.choices)]
        ]
        totals = log_likelihoods(model, sequences, batch_tokens=batch_tokens, name="letters")
        return _by_question(questions, totals)
    letters = [end.tokens[-1] for end in ends]
    scores: list[list[float]] = [[] for _ in questions]

    def all_letters(logits_NV: Tensor, target_N: Tensor) -> Tensor:
        return logits_NV.log_softmax(dim=-1)[:, letters]

    def note(index: int, values: Tensor) -> None:
        scores[index] = values[0, : len(questions[index].choices)].tolist()

    sequences = [continuation(tokenizer, prompt, " A", window=window) for prompt in prompts]
    token_values(model, sequences, all_letters, note, name="letters", batch_tokens=batch_tokens)
    return scores


def _score_texts(
    model: nn.Module,
    tokenizer: Any,
    questions: Sequence[Question],
    contexts: Sequence[str],
    window: int | None,
    batch_tokens: int,
) -> list[dict[str, list[float]]]:
    """log p of each choice's text after the question's context: in all and by its lengths.

    The space between them belongs to the choice, as in the harness.
    """
    sequences = [
        continuation(tokenizer, context.rstrip(" "), f" {choice}", window=window)
        for context, question in zip(contexts, questions, strict=True)
        for choice in question.choices
    ]
    totals = log_likelihoods(model, sequences, batch_tokens=batch_tokens, name="texts")
    by_question = _by_question(questions, totals)
    tokens = _by_question(questions, [sequence.loss_tokens for sequence in sequences])
    return [
        {
            "text": scores,
            "text_per_token": [s / n for s, n in zip(scores, counts, strict=True)],
            "text_per_character": [
                s / max(1, len(choice)) for s, choice in zip(scores, q.choices, strict=True)
            ],
        }
        for q, scores, counts in zip(questions, by_question, tokens, strict=True)
    ]


def _by_question(questions: Sequence[Question], values: Sequence[Any]) -> list[list[Any]]:
    """``values`` of all choices in a row, as a list of each question's own."""
    rest = iter(values)
    return [[next(rest) for _ in question.choices] for question in questions]


def _best(scores: Sequence[float]) -> int:
    return scores.index(max(scores))


def _accuracies(items: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    results = {s: ChoiceResult(tuple(item["correct"][s] for item in items)) for s in SCORINGS}
    return {
        scoring: {"value": result.accuracy, "standard_error": result.standard_error}
        for scoring, result in results.items()
    }
