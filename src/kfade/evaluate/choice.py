"""Multiple choice by likelihood.

Each choice of a question is scored by log p(choice | question), and the largest score wins. There
are four scorings:

    letters               all choices are shown, and p is that of a choice's letter, as
                          lm-evaluation-harness does for MMLU and WMDP
    text                  p of the choice's own text, for small models, which do not follow letters;
                          favours short texts
    text_per_token        the same over the number of tokens; favours long names, whose later tokens
                          follow from their spelling
    text_per_character    the same over the number of characters (the harness's ``acc_norm``)

Chance is one over the number of choices.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kfade.data.sequences import continuation
from kfade.evaluate.log import blocks
from kfade.evaluate.questions import LETTERS, Question, letter_prompt, text_prompt
from kfade.evaluate.tokens import log_likelihoods, token_values
from kfade.runtime.progress import track

CHUNK = 256  # questions scored together, their sequences sorted by length
SCORINGS = ("letters", "text", "text_per_token", "text_per_character")


@dataclass(frozen=True)
class ChoiceResult:
    """Which questions were answered correctly."""

    correct: tuple[bool, ...]
    probabilities: tuple[float, ...] = ()
    """Of the right choice: exp(its score) / Σ exp(score) over the choices. Empty where the scores
    are not known."""

    @property
    def accuracy(self) -> float:
        """Share of questions answered correctly."""
        return sum(self.correct) / len(self.correct)

    @property
    def standard_error(self) -> float:
        """Binomial standard error of the accuracy a: √(a(1 − a)/n)."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / len(self.correct))


def answer_by_likelihood(
    model: nn.Module, tokenizer: Any, questions: Sequence[Question], *, batch_tokens: int = 4096
) -> dict[str, ChoiceResult]:
    """Answer each question with its likeliest continuation, a space before each choice.

    Returns:
        Results by scoring: ``total`` log-likelihood, and its mean ``per token``.
    """
    contexts = [question.question for question in questions]
    scored = _score_texts(model, tokenizer, questions, contexts, batch_tokens=batch_tokens)
    results = {}
    for name, scoring in (("total", "text"), ("per token", "text_per_token")):
        correct, probabilities = [], []
        for question, scores in zip(questions, scored, strict=True):
            own = torch.tensor(scores[scoring], dtype=torch.float64)
            correct.append(_best(scores[scoring]) == question.answer)
            probabilities.append(own.softmax(dim=0)[question.answer].item())
        results[name] = ChoiceResult(tuple(correct), tuple(probabilities))
    return results


def answer_questions(
    model: nn.Module,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    cloze: bool = False,
    window: int | None = None,
    batch_tokens: int = 4096,
) -> Iterator[tuple[int, dict[str, list[float]]]]:
    """Yield (number, scores) of each question: a score of each choice by each scoring.

    Args:
        cloze: each question is the beginning of a text that a choice continues. Where texts are
            scored, it is put to the model as it is, not as ``Question: ... Answer:``.
        window: the model's longest input. The last tokens of a longer one are kept.
    """
    numbers = itertools.count()
    for some in track(blocks(questions, CHUNK), "questions", len):
        contexts = [q.question if cloze else text_prompt(q) for q in some]
        letters = _score_letters(model, tokenizer, some, window, batch_tokens)
        texts = _score_texts(model, tokenizer, some, contexts, window, batch_tokens)
        for letter, text in zip(letters, texts, strict=True):
            yield next(numbers), {"letters": letter, **text}


def verdict(scores: Mapping[str, Sequence[float]], answer: int) -> dict[str, bool]:
    """By scoring, whether the choice with the highest score, the first of equals, is right."""
    return {scoring: _best(scores[scoring]) == answer for scoring in SCORINGS}


def summarise_choice(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Accuracy with its standard error by scoring, of all items and by subject.

    Each item has ``correct`` (by scoring), ``subject`` and ``choices`` (their number). Over all
    items each question counts alike, as in the harness's groups.
    """
    result: dict[str, Any] = {
        "questions": len(items),
        "chance": sum(1 / item["choices"] for item in items) / len(items),
        "accuracy": _accuracies(items),
    }
    by_subject: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for item in items:
        by_subject[item["subject"]].append(item)
    if len(by_subject) > 1:
        result["subjects"] = {
            name: {"questions": len(own), **_accuracies(own)}
            for name, own in sorted(by_subject.items())
        }
    return result


def _score_letters(
    model: nn.Module,
    tokenizer: Any,
    questions: Sequence[Question],
    window: int | None,
    batch_tokens: int,
) -> list[list[float]]:
    """log p of each letter, from one forward pass a question where each letter is one token."""
    prompts = [letter_prompt(question) for question in questions]
    most = max(len(question.choices) for question in questions)
    ends = [continuation(tokenizer, "Answer:", f" {letter}") for letter in LETTERS[:most]]
    if any(end.loss_tokens > 1 for end in ends):
        sequences = [
            continuation(tokenizer, prompt, f" {letter}", window=window)
            for prompt, question in zip(prompts, questions, strict=True)
            for letter in LETTERS[: len(question.choices)]
        ]
        totals = iter(log_likelihoods(model, sequences, batch_tokens=batch_tokens, name="letters"))
        return [[next(totals) for _ in question.choices] for question in questions]
    letters = [end.tokens[-1] for end in ends]

    def all_letters(logits_NV: Tensor, target_N: Tensor) -> Tensor:
        return logits_NV.log_softmax(dim=-1)[:, letters]

    sequences = [continuation(tokenizer, prompt, " A", window=window) for prompt in prompts]
    found = dict(
        token_values(model, sequences, all_letters, name="letters", batch_tokens=batch_tokens)
    )
    return [found[i][0, : len(q.choices)].tolist() for i, q in enumerate(questions)]


def _score_texts(
    model: nn.Module,
    tokenizer: Any,
    questions: Sequence[Question],
    contexts: Sequence[str],
    window: int | None = None,
    batch_tokens: int = 4096,
) -> list[dict[str, list[float]]]:
    """log p of each choice's text after its question's context, by each scoring of texts.

    The space between the two belongs to the choice, as in the harness.
    """
    sequences = [
        continuation(tokenizer, context.rstrip(" "), f" {choice}", window=window)
        for context, question in zip(contexts, questions, strict=True)
        for choice in question.choices
    ]
    # Short choices share most of a pass: all of one token are read from that of their context.
    totals = log_likelihoods(model, sequences, batch_tokens=batch_tokens, name="texts", share=True)
    scored = iter(zip(sequences, totals, strict=True))
    results = []
    for question in questions:
        own = [(choice, *next(scored)) for choice in question.choices]
        results.append(
            {
                "text": [total for _, _, total in own],
                "text_per_token": [total / tokens.loss_tokens for _, tokens, total in own],
                "text_per_character": [total / max(1, len(text)) for text, _, total in own],
            }
        )
    return results


def _best(scores: Sequence[float]) -> int:
    return scores.index(max(scores))


def _accuracies(items: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    results = {s: ChoiceResult(tuple(item["correct"][s] for item in items)) for s in SCORINGS}
    return {
        scoring: {"value": result.accuracy, "standard_error": result.standard_error}
        for scoring, result in results.items()
    }
