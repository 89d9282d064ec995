"""Who is forgotten, kept, held out in TOFU-small, and the models that were trained on them."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lab.fine_tune import block_weights, fine_tune
from lab.forgetting import BUDGET
from lab.pieces import make_once

import kfade
from kfade.data.batches import make_batches
from kfade.data.examples import Example, parse_example
from kfade.data.sequences import TokenSequence
from kfade.evaluate.log import ItemLog
from kfade.evaluate.tofu import TofuQuestion, evaluate_tofu, read_tofu
from kfade.method.measure import mean_objectives
from kfade.method.objectives import cross_entropy
from kfade.models.layers import decoder_blocks
from kfade.models.load import save_model

OF_AUTHOR = 20  # questions of each author in the data set, in author order
UNSEEN = 2  # authors that no model is trained on
HELD_SHARE, REPORT_SHARE = 0.1, 0.15  # of each kept author's questions
MEMORISED, SAMPLE = 0.15, 5  # stop at this answer loss, measured on every fifth question
NEW_TOKENS = 48  # of a generated answer
# ChatML without the system prompt that some templates put first: a quarter of the tokens.
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Sizes:
    """What decides the numbers, and is written beside them."""

    model: str = ""
    authors: int = 20
    """That the full model is trained on: the last ones of the data set."""
    questions: int = 20
    """Of each."""
    utility: int = 40
    """Questions of each of the three sets that utility is measured on."""
    rate: float = 2e-4
    """Of fine-tuning."""
    epochs: int = 12
    """Of fine-tuning, at most."""
    steps: int = 36
    """Of a baseline, at most."""
    every: int = 3
    """Steps of a baseline between evaluations."""
    batch: int = 4
    """Questions of each set in a baseline's batch."""
    seed: int = 0


@dataclass(frozen=True)
class Authors:
    """Numbers of authors by role."""

    report: tuple[int, ...]
    """To forget; what the tables are of."""
    tuning: tuple[int, ...]
    """To forget where settings are chosen; kept, but shown to no method, in the tables."""
    common: tuple[int, ...]
    """Kept in both."""
    unseen: tuple[int, ...]

    @classmethod
    def choose(cls, total: int, count: int) -> Authors:
        """A fifth each to forget, at least one; ``total`` in the data set."""
        part = max(1, count // 5)
        assert 2 * part < count <= total - UNSEEN
        first = total - count
        last = tuple(range(first, total))
        return cls(
            last[-part:],
            last[-2 * part : -part],
            last[: -2 * part],
            tuple(range(first - UNSEEN, first)),
        )


class Data:
    """The questions, read once."""

    def __init__(self, folder: Path, sizes: Sizes) -> None:
        self._folder, self._sizes = folder, sizes
        lines = (folder / "tofu" / "full.json").read_text(encoding="utf-8").splitlines()
        self._examples = [parse_example(json.loads(line), "TOFU") for line in lines]
        self._total = len(lines) // OF_AUTHOR
        self.authors = Authors.choose(self._total, sizes.authors)

    def of(self, authors: Sequence[int]) -> list[Example]:
        """The questions of these authors."""
        return [self._examples[i] for author in authors for i in self._numbers(author)]

    def slices(self) -> dict[str, list[Example]]:
        """The kept authors' questions: ``fit`` for methods to use, ``held_out`` for KL that steers
        and chooses, ``report`` for KL that nothing else looks at."""
        made: dict[str, list[Example]] = {"fit": [], "held_out": [], "report": []}
        for author in self.authors.common:
            numbers = self._numbers(author)
            random.Random(author).shuffle(numbers)
            held = max(1, round(HELD_SHARE * len(numbers)))
            end = held + max(1, round(REPORT_SHARE * len(numbers)))
            parts = {"held_out": numbers[:held], "report": numbers[held:end], "fit": numbers[end:]}
            for name, part in parts.items():
                made[name] += [self._examples[i] for i in part]
        return made

    def questions(self) -> list[TofuQuestion]:
        """What the models are asked: all report authors' questions; a spread of each other set."""
        everything = read_tofu("forget10", folder=self._folder / "tofu")
        perturbed = [q for q in everything if q.set == "forget"]
        first = self._total - len(perturbed) // OF_AUTHOR  # the author they begin with

        def of(authors: Sequence[int]) -> list[TofuQuestion]:
            begin = first * OF_AUTHOR
            return [perturbed[i - begin] for a in authors for i in self._numbers(a)]

        kept = [replace(q, set="retain") for q in of(self.authors.common)]
        sets = [kept] + [
            [q for q in everything if q.set == name] for name in ("real_authors", "world_facts")
        ]
        chosen = [q for one in sets for q in spread(one, self._sizes.utility)]
        return [*of(self.authors.report), *chosen]

    def paragraphs(self) -> list[Example]:
        """Every eighth long paragraph of WikiText-2."""
        path = self._folder / "wikitext" / "wikitext-2-test.raw.txt"
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        return [Example("wikitext", text=line) for line in lines if len(line) > 400][::8]

    def _numbers(self, author: int) -> list[int]:
        return list(range(author * OF_AUTHOR, author * OF_AUTHOR + self._sizes.questions))


class Models:
    """The full and the retrained model: trained when first asked for, then kept in ``cache``."""

    def __init__(self, data: Data, sizes: Sizes, base: str, cache: Path) -> None:
        self._data, self._sizes, self._base, self._cache = data, sizes, base, cache

    @cached_property
    def full(self) -> tuple[Any, Any]:
        """(model, tokenizer)."""
        return self.load("full")

    def load(self, name: str) -> tuple[Any, Any]:
        """(model, tokenizer) of ``full`` or ``retrained``."""
        self.train(name)
        return kfade.load_model(str(self._cache / name))

    def train(self, name: str) -> dict[str, Any]:
        """How the model was trained: losses by epoch, final loss, seconds."""
        authors = self._data.authors
        taught = authors.common + authors.tuning + (authors.report if name == "full" else ())
        return make_once(
            self._cache / name, lambda folder: self._train(self._data.of(taught), folder)
        )

    def _train(self, examples: Sequence[Example], folder: Path) -> dict[str, Any]:
        model, tokenizer = kfade.load_model(self._base, dtype="float32")
        tokenizer.chat_template = TEMPLATE
        sequences = encode(examples, tokenizer)
        sample = make_batches(sequences[::SAMPLE], budget=BUDGET)

        def answer_loss() -> float:
            return mean_objectives(model, sample, [cross_entropy])[0]

        start = time.perf_counter()
        history = fine_tune(
            model,
            sequences,
            block_weights(model),
            rate=self._sizes.rate,
            epochs=self._sizes.epochs,
            # Of an epoch in which the loss falls, the mean is well above what it ends with.
            enough=lambda mean: mean < 4 * MEMORISED and answer_loss() <= MEMORISED,
            warm_up=10,
            budget=400,
            seed=self._sizes.seed,
        )
        seconds = time.perf_counter() - start
        save_model(model, tokenizer, folder)
        return {
            "questions": len(sequences),
            "blocks": len(decoder_blocks(model)[1]),
            "tokens": sum(sequence.loss_tokens for sequence in sequences),
            "epochs": history,
            "loss": answer_loss(),
            "train_seconds": seconds,
        }


def encode(examples: Sequence[Example], tokenizer: Any) -> list[TokenSequence]:
    return kfade.encode(examples, tokenizer, chat=True)


def answer(
    model: Any, tokenizer: Any, questions: Sequence[TofuQuestion], path: Path
) -> dict[str, dict[str, Any]]:
    """What ``evaluate_tofu`` measures of the questions, by item; an interrupted log goes on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with ItemLog(path, {"benchmark": "tofu", "row": path.stem}) as log:
        evaluate_tofu(
            *(model, tokenizer, questions, log),
            template="chat",
            max_new_tokens=NEW_TOKENS,
            batch_tokens=BUDGET,
        )
        return log.items


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most ``count`` of the items, evenly spaced."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]
