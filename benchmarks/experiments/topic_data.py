"""Topic-small's subjects: passages and questions of three OpenStax glossaries, and other text.

One subject is forgotten, the other two are kept. Kept text and questions use no term of the
forgotten subject's glossary: where they do, to forget the subject is to change them.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import kfade
from kfade.data.examples import Example
from kfade.data.rows import read_rows
from kfade.data.sequences import TokenSequence
from kfade.evaluate.completions import read_prompts
from kfade.evaluate.questions import Question, text_prompt

SUBJECTS = ("astronomy", "psychology", "sociology")
CHANCE = 0.25  # of four choices
RUN = 12  # tokens in a row that no two kept passages share
SLICES = ("fit", "held_out", "report")
FURTHER = {
    "astronomy": r"planet|stars?\b|sun\b|sunlight|solar|moon|lunar|earth|galax|orbit|space|astro"
    r"|comet|meteor|telescop|sky\b|skies|eclips|season|tide|tidal|universe|gravit|light-year|rotat"
    r"|revol"
}
"""Beginnings of other words of a subject, beside its glossary's terms. ARC and WikiText are full of
the sky."""


@dataclass(frozen=True)
class Sizes:
    """What decides the numbers. It is written beside them."""

    model: str = ""
    subject: str = "astronomy"  # forgotten
    questions: int = 100  # on the subject, in the tables; each other set has four fifths as many
    tune_questions: int = 100  # on it, to choose settings, at most: astronomy has fewer
    passages: int = 128  # retained of the other subjects, and as many of WikiText
    held_out: int = 32  # of each of these two, to steer and choose by; as many for the tables
    tokens: int = 64  # of a passage
    completions: int = 64  # of Alpaca's instructions
    steps: int = 48  # of a baseline at its first rate, at most
    batch: int = 4  # passages of each set in a baseline's batch
    # Methods are compared where the mean probability of the right choice has lost this share of
    # what it is above chance. Passages alone do not lower it to 0.30 before the KL is 5 nats.
    lost: float = 0.4
    seed: int = 0

    def target(self, start: float) -> float:
        """The mean probability at which methods are compared; the base model's is ``start``."""
        return CHANCE + (1 - self.lost) * (start - CHANCE)


@dataclass(frozen=True)
class Term:
    """A term of a glossary: a passage that uses it, and the question for it."""

    passage: Example
    question: Question


class Words:
    """Finds what tells of a subject: a term of its glossary, or one of the ``FURTHER`` words."""

    def __init__(self, folder: Path, subject: str, tokenizer: Any) -> None:
        rows = read_rows(str(folder / "openstax" / subject / "glossary_mcq.jsonl"))
        names = {re.sub(r"\s*\(.*?\)", "", row["choices"][row["answer"]]) for _, row in rows}
        words = "|".join(re.escape(name) for name in sorted(names))
        further = rf"|\b(?:{FURTHER[subject]})" if subject in FURTHER else ""
        self._pattern = re.compile(rf"\b(?:{words})(?:s|es)?\b{further}", re.IGNORECASE)
        self._tokenizer = tokenizer

    def in_text(self, text: TokenSequence) -> bool:
        return self._pattern.search(self._tokenizer.decode(text.tokens)) is not None

    def in_question(self, question: Question) -> bool:
        return self._pattern.search(in_words(question)) is not None


@dataclass(frozen=True)
class Data:
    """Passages and questions by role. None has two roles."""

    forget: Sequence[TokenSequence]
    slices: dict[str, Sequence[TokenSequence]]
    """Retain data: ``fit``, ``held_out``, and for the tables ``report``."""
    questions: dict[str, Sequence[Question]]
    """``tune``; for the tables ``topic``, ``sisters`` (the other subjects) and ``general``."""
    words: Words
    """Of the forgotten subject."""

    @classmethod
    def read(cls, folder: Path, tokenizer: Any, sizes: Sizes) -> Data:
        def encode(examples: Sequence[Example]) -> list[TokenSequence]:
            length = sizes.tokens + 1
            return kfade.encode(
                examples, tokenizer, length=length, window=length, pack=False, truncate=True
            )

        words = Words(folder, sizes.subject, tokenizer)
        books = {name: terms(folder / "openstax" / name, sizes.seed) for name in SUBJECTS}
        own = books.pop(sizes.subject)[: sizes.questions + sizes.tune_questions]
        other = [term for name in books for term in books[name]]
        random.Random(sizes.seed).shuffle(other)
        passages = zip(encode([term.passage for term in other]), other, strict=True)

        bounds = [0, sizes.passages]
        bounds += [bounds[-1] + sizes.held_out, bounds[-1] + 2 * sizes.held_out]
        related, sisters = [], []
        for passage, term in apart(passages):
            if len(related) < bounds[-1] and not words.in_text(passage):
                related.append(passage)
            elif not words.in_question(term.question):
                sisters.append(term.question)
        paragraphs = ((text, None) for text in encode(wikitext(folder)))
        wiki = [text for text, _ in apart(paragraphs) if not words.in_text(text)]
        asked = [question for question in general(folder) if not words.in_question(question)]
        parts, kept = zip(SLICES, pairwise(bounds), strict=True), sizes.questions * 4 // 5
        return cls(
            encode([term.passage for term in own]),
            {name: [*related[i:j], *wiki[i:j]] for name, (i, j) in parts},
            {
                "topic": [term.question for term in own[: sizes.questions]],
                "tune": [term.question for term in own[sizes.questions :]],
                "sisters": sisters[:kept],
                "general": asked[:kept],
            },
            words,
        )


def apart(texts: Iterable[tuple[TokenSequence, Any]]) -> Iterator[tuple[TokenSequence, Any]]:
    """Those whose text has no ``RUN`` tokens in a row that are in one before."""
    seen: set[tuple[int, ...]] = set()
    for text, other in texts:
        runs = {text.tokens[i : i + RUN] for i in range(len(text.tokens) - RUN + 1)}
        if seen.isdisjoint(runs):
            yield text, other
        seen |= runs


def in_words(question: Question) -> str:
    """All that a question says."""
    return "\n".join((question.question, *question.choices))


def terms(book: Path, seed: int) -> list[Term]:
    """The glossary's terms, shuffled, that some sentence of their chapter's text uses."""
    documents = (row for _, row in read_rows(str(book / "documents.jsonl")))
    texts: dict[str, list[str]] = {}
    for row in documents:
        texts.setdefault(row["chapter"], []).append(row["text"])
    found = []
    for where, row in read_rows(str(book / "glossary_mcq.jsonl")):
        name = row["choices"][row["answer"]]
        start = sentence_with(name, "\n\n".join(texts[row["chapter"]]))
        if start is not None:
            asked = Question(row["question"], tuple(row["choices"]), row["answer"])
            asked = Question(text_prompt(asked), asked.choices, asked.answer)
            found.append(Term(Example(where, text=start, closes=False), asked))
    random.Random(seed).shuffle(found)
    return found


def sentence_with(name: str, text: str) -> str | None:
    """``text`` from the first sentence that uses the term."""
    match = re.search(rf"\b{re.escape(name)}", text, re.IGNORECASE)
    if match is None:
        return None
    ends = [end.end() for end in re.finditer(r"[.!?]\s+|\n\n", text[: match.start()])]
    return text[ends[-1] if ends else 0 :].strip()


def wikitext(folder: Path) -> list[Example]:
    """Long paragraphs of WikiText-2, every second one."""
    path = folder / "wikitext" / "wikitext-2-test.raw.txt"
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    long = [line for line in lines if len(line) > 400]
    return [Example("wikitext", text=line, closes=False) for line in long[::2]]


def general(folder: Path) -> list[Question]:
    """ARC's easy questions, shuffled."""
    rows = [row for _, row in read_rows(str(folder / "arc" / "arc_easy_test.jsonl"))]
    random.Random(0).shuffle(rows)
    asked = [Question(row["question"], tuple(row["choices"]), row["answer"]) for row in rows]
    return [Question(text_prompt(q), q.choices, q.answer) for q in asked]


def instructions(folder: Path, count: int) -> list[Example]:
    """The first so many of Alpaca's sample."""
    return read_prompts(str(folder / "alpaca" / "alpaca_sample_6k.jsonl"), count)
