"""TOFU: questions about fictitious authors, each answered and scored (Maini et al. 2024).

There are four sets: authors to forget, authors to retain, real authors, world facts. For each
question we measure the loss of the right answer, of its paraphrase, and of wrong answers worded
like the paraphrase, and the ROUGE-L recall of the answer that the model generates. The figures
computed from these values are in ``tofu_logs.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from kfade.data.chat import ChatTemplate
from kfade.data.examples import Example
from kfade.data.rows import read_rows
from kfade.data.sequences import TokenSequence, continuation, encode, open_tokens
from kfade.errors import InputError
from kfade.evaluate.division import map_shared
from kfade.evaluate.generation import Decoding, generate_texts
from kfade.evaluate.item_log import ItemLog
from kfade.evaluate.log import blocks
from kfade.evaluate.rouge import RougeLRecall, check_truth
from kfade.evaluate.tofu_logs import SETS
from kfade.evaluate.tokens import log_likelihoods
from kfade.models.lengths import model_window

HUB_NAME = "locuslab/TOFU"
SPLITS = ("forget01", "forget05", "forget10")
PARAPHRASED = ("forget", "retain")  # the sets of fictitious authors
TEMPLATES = ("auto", "chat", "llama2", "phi", "plain")
LEGACY_ITEMS = 300  # of each set, that the reference code scores
BLOCK = 32  # questions between two writes of the log
DECODING = Decoding(max_new_tokens=200)


@dataclass(frozen=True)
class TofuQuestion:
    """One question of a set with its true and its wrong answers."""

    set: str
    number: int
    question: str
    answer: str
    base: str
    """Wrong answers are compared with it: the paraphrase, or the answer where there is none."""
    false: tuple[str, ...]

    @property
    def id(self) -> str:
        """Its name in the log."""
        return f"{self.set}/{self.number}"


def read_tofu(
    split: str, *, folder: Path | None = None, limit: int | None = None
) -> list[TofuQuestion]:
    """The four sets' questions, from a folder of ``.json`` or ``.jsonl`` files or from the hub.

    Args:
        split: ``forget01``, ``forget05`` or ``forget10``.
        folder: holds ``{split}_perturbed`` and so on, each JSON lines or one JSON list.
        limit: the first so many of each set.

    Raises:
        InputError: an unknown split, a missing file, a row without the benchmark's keys.
    """
    if split not in SPLITS:
        raise InputError(f"--split {split}: give one of {', '.join(SPLITS)}")
    names = {name: f"{name}_perturbed" for name in SETS} | {"forget": f"{split}_perturbed"}
    questions = []
    for set_name, name in names.items():
        rows = _rows(name, folder)[:limit]
        if not rows:
            raise InputError(f"{name}: the set is empty; get a whole copy of the TOFU data")
        questions += [_question(set_name, i, row, where) for i, (where, row) in enumerate(rows)]
    return questions


def evaluate_tofu(
    model: nn.Module,
    tokenizer: Any,
    questions: Sequence[TofuQuestion],
    log: ItemLog,
    decoding: Decoding = DECODING,
    *,
    template: str = "auto",
    chat: ChatTemplate | None = None,
    legacy: bool = False,
) -> None:
    """Measure the questions that ``log`` lacks; ``log_of`` in ``tofu_read.py`` reads its items.

    Losses are means over the tokens of the answer and the EOS that ends it.

    Args:
        template: see :func:`template_for`.
        chat: how a chat template renders, where one is used.
        legacy: count Phi's ``Answer: `` as part of the answer, as the reference code does.

    Raises:
        InputError: rouge-score is not installed; an answer is empty; a sequence is over the
            model's window.
    """
    recall = RougeLRecall()
    template = template_for(template, model, tokenizer)
    pending = [question for question in questions if question.id not in log.items]
    for question in pending:
        check_truth(question.answer, f"TOFU question {question.id}")
    encoded = _encode(pending, tokenizer, template, chat, legacy=legacy)
    _check_window(pending, encoded, model_window(model))

    def measure(block: Sequence[tuple[TofuQuestion, _Encoded]]) -> list[dict[str, Any]]:
        answers = [sequence for _, item in block for sequence in item.answers]
        totals = log_likelihoods(model, answers, batch_tokens=decoding.batch_tokens)
        losses = (-t / answer.loss_tokens for answer, t in zip(answers, totals, strict=True))
        generated = generate_texts(model, tokenizer, [i.prompt for _, i in block], decoding)
        found = []
        for (question, item), text in zip(block, generated, strict=True):
            answer_loss, base_loss, *false_losses = (next(losses) for _ in item.answers)
            values = {
                "question": question.question,
                "answer": question.answer,
                "generated": text,
                "answer_loss": answer_loss,
                "base_loss": base_loss,
                "false_losses": false_losses,
                "rouge_l": recall(question.answer, text, question.id),
            }
            found.append(values)
        return found

    work = blocks(list(zip(pending, encoded, strict=True)), BLOCK)
    measured = map_shared(work, measure, "TOFU", cost=len, model=model)
    for block, found in zip(work, measured, strict=True):
        for (question, _), values in zip(block, found, strict=True):
            log.add(question.id, **values)


def template_for(word: str, model: Any, tokenizer: Any) -> str:
    """The prompt format: ``chat``, ``llama2``, ``phi`` or ``plain``.

    ``auto`` takes ``phi`` for a Phi model, ``llama2`` where the chat template is Llama-2's own
    (the benchmark's models were tuned on a shorter form of it), else ``chat`` where there is a
    chat template, else ``plain``.
    """
    if word not in TEMPLATES:
        raise InputError(f"--template {word}: give one of {', '.join(TEMPLATES)}")
    if word != "auto":
        return word
    if model.config.model_type == "phi":
        return "phi"
    if tokenizer.chat_template is None:
        return "plain"
    return "llama2" if "<<SYS>>" in str(tokenizer.chat_template) else "chat"


@dataclass(frozen=True)
class _Encoded:
    """A question as tokens."""

    prompt: tuple[int, ...]
    """From which an answer is generated."""
    answers: tuple[TokenSequence, ...]
    """The prompt with the answer, the base answer, and each wrong one after it."""


def _encode(
    questions: Sequence[TofuQuestion],
    tokenizer: Any,
    template: str,
    chat: ChatTemplate | None = None,
    *,
    legacy: bool,
) -> list[_Encoded]:
    texts = [(question.answer, question.base, *question.false) for question in questions]
    if template == "chat":
        examples = [
            Example(question.id, turns=(("user", question.question), ("assistant", text)))
            for question, own in zip(questions, texts, strict=True)
            for text in own
        ]
        template_used = replace(chat or ChatTemplate(), enabled=True)
        sequences = encode(examples, tokenizer, template=template_used)
        groups = []
        for own in texts:
            groups.append(tuple(sequences[: len(own)]))
            sequences = sequences[len(own) :]
        return [_Encoded(group[0].tokens[: group[0].scored.index(True)], group) for group in groups]
    encoded = []
    for question, own in zip(questions, texts, strict=True):
        before, lead = _written(question.question, template, legacy=legacy)
        answers = [continuation(tokenizer, before, lead + text, closed=True) for text in own]
        encoded.append(_Encoded(tuple(open_tokens(tokenizer, before)), tuple(answers)))
    return encoded


def _written(question: str, template: str, *, legacy: bool) -> tuple[str, str]:
    """The text before what is scored, and the text that the scored part begins with."""
    if template == "llama2":
        return f"[INST] {question} [/INST]", ""
    if template == "phi" and legacy:
        return f"Question: {question}\n", "Answer: "
    return f"Question: {question}\nAnswer:", " "


def _check_window(
    questions: Sequence[TofuQuestion], encoded: Sequence[_Encoded], window: int | None
) -> None:
    for question, item in zip(questions, encoded, strict=True):
        length = max(len(sequence.tokens) for sequence in item.answers)
        if window and length > window:
            raise InputError(
                f"TOFU question {question.id}: {length} tokens with its answer, over the model's "
                f"window of {window}; this model cannot be measured on it"
            )


def _rows(name: str, folder: Path | None) -> list[tuple[str, Any]]:
    """(where, row) of one set."""
    if folder is None:
        return read_rows(f"hf:{HUB_NAME}:{name}:train")
    files = [folder / f"{name}{suffix}" for suffix in (".json", ".jsonl")]
    path = next((file for file in files if file.is_file()), None)
    if path is None:
        raise InputError(
            f"{folder}: has no {name}.json; give the folder of a copy of the data set {HUB_NAME}"
        )
    return read_rows(str(path))


def _question(set_name: str, number: int, row: Any, where: str) -> TofuQuestion:
    match row:
        case {
            "question": str(question),
            "answer": str(answer),
            "perturbed_answer": [str(), *_] as false,
        } if all(isinstance(text, str) for text in false):
            # Real authors and world facts have no paraphrases.
            base = row.get("paraphrased_answer") if set_name in PARAPHRASED else answer
            if isinstance(base, str):
                return TofuQuestion(set_name, number, question, answer, base, tuple(false))
    raise InputError(
        f"{where}: not a row of TOFU; it needs question, answer and perturbed_answer (a list), and "
        "paraphrased_answer in the sets of fictitious authors"
    )
