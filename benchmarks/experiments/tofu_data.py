"""Who is forgotten, kept and held out in TOFU-small, and how models are trained on them."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from lab.fine_tune import block_weights, fine_tune
from lab.forgetting import BUDGET, TRAIN_BUDGET
from lab.records import Record

import kfade
from kfade.data.chat import ChatTemplate
from kfade.data.examples import Example, parse_example
from kfade.data.sequences import TokenSequence
from kfade.evaluate.generation import Decoding
from kfade.evaluate.item_log import ItemLog
from kfade.evaluate.tofu import TofuQuestion, evaluate_tofu, read_tofu
from kfade.method.measure import mean_objectives
from kfade.method.objectives import cross_entropy
from kfade.models.layers import decoder_blocks
from kfade.models.lengths import batches_for
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
    """What decides the numbers. It is written beside them."""

    train_batch: ClassVar[int] = 8  # questions in a batch of fine-tuning
    model: str = ""
    authors: int = 20  # of the full model: the last ones of the data set
    questions: int = 20  # of each author
    utility: int = 40  # questions of each of the three sets that utility is measured on
    rate: float = 2e-4  # learning rate of fine-tuning
    epochs: int = 12  # of fine-tuning, at most
    steps: int = 36  # of a baseline, at most
    every: int = 3  # steps of a baseline between evaluations
    batch: int = 4  # questions of each set in a baseline's batch
    seed: int = 0


def authors_by_role(total: int, count: int, unseen: int = UNSEEN) -> dict[str, range]:
    """Numbers of the authors, of ``total`` in the data set and ``count`` in the full model.

    ``report``: forgotten in the tables, a fifth; ``tuning``: forgotten where settings are chosen,
    a fifth, and shown to no method in the tables; ``common``: always kept; ``unseen``: in no model.
    """
    part, first = max(1, count // 5), total - count
    assert 2 * part < count <= total - unseen
    return {
        "unseen": range(first - unseen, first),
        "common": range(first, total - 2 * part),
        "tuning": range(total - 2 * part, total - part),
        "report": range(total - part, total),
    }


class Data:
    """The questions, read once."""

    per_author: ClassVar[int] = OF_AUTHOR

    def __init__(self, folder: Path, sizes: Sizes) -> None:
        self._folder, self._sizes = folder, sizes
        self._examples = self.read()
        self._total = len(self._examples) // self.per_author
        self.authors = self.roles(self._total)

    def read(self) -> list[Example]:
        """``per_author`` questions of each author, in author order."""
        lines = (self._folder / "tofu" / "full.json").read_text(encoding="utf-8").splitlines()
        return [parse_example(json.loads(line), "TOFU") for line in lines]

    def roles(self, total: int) -> dict[str, range]:
        """Numbers of the authors of each role, of ``total`` in the data set."""
        return authors_by_role(total, self._sizes.authors)

    def of(self, *roles: str) -> list[Example]:
        """The questions of the authors of these roles."""
        authors = [author for role in roles for author in self.authors[role]]
        return [self._examples[i] for author in authors for i in self._numbers(author)]

    def slices(self) -> dict[str, list[Example]]:
        """The questions of the common authors in three parts: ``fit`` for methods to use,
        ``held_out`` to steer and choose by, ``report`` for the tables only."""
        made: dict[str, list[Example]] = {"fit": [], "held_out": [], "report": []}
        for author in self.authors["common"]:
            numbers = self._numbers(author)
            random.Random(author).shuffle(numbers)
            held = max(1, round(HELD_SHARE * len(numbers)))
            end = held + max(1, round(REPORT_SHARE * len(numbers)))
            parts = {"held_out": numbers[:held], "report": numbers[held:end], "fit": numbers[end:]}
            for name, part in parts.items():
                made[name] += [self._examples[i] for i in part]
        return made

    def questions(self) -> list[TofuQuestion]:
        """What models are asked: all of the report authors' questions, and some of each other set,
        evenly spaced."""
        everything = read_tofu("forget10", folder=self._folder / "tofu")
        perturbed = [q for q in everything if q.set == "forget"]
        begin = (self._total - len(perturbed) // OF_AUTHOR) * OF_AUTHOR  # number of the first one

        def of(role: str) -> list[TofuQuestion]:
            return [perturbed[i - begin] for a in self.authors[role] for i in self._numbers(a)]

        kept = [replace(q, set="retain") for q in of("common")]
        others = ([q for q in everything if q.set == s] for s in ("real_authors", "world_facts"))
        return [*of("report"), *self.sample(kept, *others)]

    def sample(self, *sets: Sequence[TofuQuestion]) -> list[TofuQuestion]:
        """Some questions of each set that utility is measured on, evenly spaced."""
        asked = []
        for questions in sets:
            count = min(self._sizes.utility, len(questions))
            asked += [questions[i * len(questions) // count] for i in range(count)]
        return asked

    def paragraphs(self) -> list[Example]:
        """Every eighth long paragraph of WikiText-2."""
        path = self._folder / "wikitext" / "wikitext-2-test.raw.txt"
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        return [Example("wikitext", text=line) for line in lines if len(line) > 400][::8]

    def _numbers(self, author: int) -> list[int]:
        first = author * self.per_author
        return list(range(first, first + self._sizes.questions))


def train_model(
    base: str,
    examples: Sequence[Example],
    sizes: Sizes,
    folder: Path,
    *,
    device: str | None = None,
) -> Record:
    """Fine-tune a model on questions, save it, and tell how it was trained."""
    model, tokenizer = kfade.load_model(base, dtype="float32", device=device)
    tokenizer.chat_template = TEMPLATE
    sequences = encode(examples, tokenizer)
    sample = batches_for(model, sequences[::SAMPLE], BUDGET)

    def answer_loss() -> float:
        return mean_objectives(model, sample, [cross_entropy])[0]

    start = time.perf_counter()
    history = fine_tune(
        model,
        sequences,
        block_weights(model),
        rate=sizes.rate,
        epochs=sizes.epochs,
        # Of an epoch in which the loss falls, the mean is well above what it ends with.
        enough=lambda mean: mean < 4 * MEMORISED and answer_loss() <= MEMORISED,
        warm_up=10,
        batch=sizes.train_batch,
        budget=TRAIN_BUDGET,
        seed=sizes.seed,
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
    return kfade.encode(examples, tokenizer, template=ChatTemplate(enabled=True))


def answer(
    model: Any, tokenizer: Any, questions: Sequence[TofuQuestion], path: Path
) -> dict[str, dict[str, Any]]:
    """What ``evaluate_tofu`` measures, by item. An interrupted log is continued."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with ItemLog(path, {"benchmark": "tofu", "row": path.stem}) as log:
        evaluate_tofu(
            *(model, tokenizer, questions, log),
            Decoding(NEW_TOKENS, BUDGET),
            template="chat",
        )
        return log.items
