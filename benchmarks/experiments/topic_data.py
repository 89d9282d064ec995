"""Topic-small's subject: passages and questions of three OpenStax glossaries, and other text.

Astronomy is forgotten: of the subjects at hand the model is furthest above chance there. Its sister
subjects, psychology and sociology, are kept.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kfade
from kfade.data.examples import Example
from kfade.data.rows import read_rows
from kfade.data.sequences import TokenSequence
from kfade.evaluate.completions import read_prompts
from kfade.evaluate.questions import Question, text_prompt

SUBJECT, SISTERS = "astronomy", ("psychology", "sociology")
OF_THE_SKY = re.compile(
    r"planet|star|\bsun\b|sunlight|solar|moon|lunar|earth|galax|orbit|space|astro|comet|meteor"
    r"|telescope|sky|eclipse|season|tide|universe|gravit|light-year|rotat|revol",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Sizes:
    """What decides the numbers, and is written beside them."""

    model: str = ""
    tune_questions: int = 48
    """Of the subject; settings are chosen and lengths searched by them."""
    questions: int = 100
    """Of the subject, in the tables; each other set has four fifths as many."""
    passages: int = 128
    """Of the sister subjects, and as many of WikiText, in the retain data."""
    held_out: int = 32
    """Passages of each of the two kinds to steer and choose by, and as many for the tables."""
    tokens: int = 64
    """Of a passage."""
    completions: int = 64
    """Of Alpaca's instructions, for the KL on benign completions."""
    steps: int = 48
    """Of a baseline at its first rate, at most."""
    batch: int = 4
    """Passages of each set in a baseline's batch."""
    target: float = 0.45
    """Mean probability of the right choice at which methods are compared; chance is a quarter, and
    0.30 is not reached by passages alone before the KL on retained text is 5 nats."""
    seed: int = 0


@dataclass(frozen=True)
class Term:
    """A term of a glossary: a passage that uses it, and the question for it."""

    passage: Example
    question: Question


@dataclass(frozen=True)
class Data:
    """Who is what. No passage, and no question, stands in two places."""

    forget: Sequence[TokenSequence]
    fit: Sequence[TokenSequence]
    held_out: Sequence[TokenSequence]
    report: Sequence[TokenSequence]
    """Retain text for the tables, as much as is held out."""
    questions: dict[str, Sequence[Question]]
    """``tune``, and of the tables: ``topic``, ``sisters``, ``general``."""

    @classmethod
    def read(cls, folder: Path, tokenizer: Any, sizes: Sizes) -> Data:
        def encode(examples: Sequence[Example]) -> list[TokenSequence]:
            length = sizes.tokens + 1
            return kfade.encode(
                examples, tokenizer, length=length, window=length, pack=False, truncate=True
            )

        own = terms(folder / "openstax" / SUBJECT, sizes.seed)
        own = own[: sizes.tune_questions + sizes.questions]
        other = [term for name in SISTERS for term in terms(folder / "openstax" / name, sizes.seed)]
        random.Random(sizes.seed).shuffle(other)
        fitted, steered = sizes.passages, sizes.passages + sizes.held_out
        end, kept = steered + sizes.held_out, sizes.questions * 4 // 5
        sisters, wiki = encode([term.passage for term in other[:end]]), encode(paragraphs(folder))
        return cls(
            encode([term.passage for term in own]),
            [*sisters[:fitted], *wiki[:fitted]],
            [*sisters[fitted:steered], *wiki[fitted:steered]],
            [*sisters[steered:end], *wiki[steered:end]],
            {
                "tune": [term.question for term in own[: sizes.tune_questions]],
                "topic": [term.question for term in own[sizes.tune_questions :]],
                "sisters": [term.question for term in other[end : end + kept]],
                "general": general(folder)[:kept],
            },
        )


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


def paragraphs(folder: Path) -> list[Example]:
    """Long paragraphs of WikiText-2, evenly spread, that are not of the sky."""
    path = folder / "wikitext" / "wikitext-2-test.raw.txt"
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    long = [line for line in lines if len(line) > 400 and not OF_THE_SKY.search(line)]
    return [Example("wikitext", text=line, closes=False) for line in long[::4]]


def general(folder: Path) -> list[Question]:
    """ARC's easy questions without those of the sky, shuffled."""
    rows = [row for _, row in read_rows(str(folder / "arc" / "arc_easy_test.jsonl"))]
    rows = [row for row in rows if not OF_THE_SKY.search(json.dumps(row))]
    random.Random(0).shuffle(rows)
    asked = [Question(row["question"], tuple(row["choices"]), row["answer"]) for row in rows]
    return [Question(text_prompt(q), q.choices, q.answer) for q in asked]


def instructions(folder: Path, count: int) -> list[Example]:
    """The first so many of Alpaca's sample."""
    return read_prompts(str(folder / "alpaca" / "alpaca_sample_6k.jsonl"), count)
