"""What each of several processes evaluates for test_several_processes.py.

:func:`evaluate` runs every evaluation through the command line. The tests call it without
processes, too, for the files that must come out.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from unittest.mock import patch

import torch
import zoo

from kfade.cli import main
from kfade.errors import InputError
from kfade.evaluate.division import in_order, map_shared, undivided
from kfade.evaluate.item_log import ItemLog
from kfade.evaluate.judge import Judge, Reply
from kfade.evaluate.lm_eval import _language_model
from kfade.evaluate.memorisation import token_statistics
from kfade.evaluate.tofu_logs import SETS
from kfade.method.update import Update
from kfade.runtime import distributed

UPDATE = ("--update", "update.safetensors")
KL = ("--prompts", "prompts.jsonl", "--max-new-tokens", "5", "--batch-tokens", "30")
EVALUATIONS = {
    "kl": ("kl", "model", *UPDATE, *KL),
    "kl of another model": ("kl", "model", "--edited", "edited", *KL),
    "kl of rounding": ("kl", "model", "--quantise", "int4", *KL),
    "tofu": (
        *("tofu", "model", *UPDATE, "--retain-model", "edited", "--data", "tofu"),
        *("--split", "forget01", "--max-new-tokens", "4", "--batch-tokens", "40"),
    ),
    "choice": (
        *("choice", "model", *UPDATE, "--questions", "choice.jsonl", "--questions", "more.jsonl"),
        *("--batch-tokens", "60"),
    ),
    "mt-bench": (
        *("mt-bench", "model", *UPDATE, "--questions", "bench.jsonl", "--max-new-tokens", "3"),
        *("--template-date", "2026-01-31"),
        *("--runs", "2", "--judge-url", "http://localhost", "--judge-model", "judge"),
    ),
    "memorisation": (
        *("memorisation", "model", "--members", "members.jsonl"),
        *("--non-members", "others.jsonl", "--batch-tokens", "20"),
    ),
    "quantisation": ("quantisation", "model", *UPDATE),
}
UNSHARDED = ("quantisation",)  # it runs no model
LEFT = ("kl of another model", "tofu", "mt-bench")  # to be resumed by one process
INTERRUPTED_AT = 4  # items
ITEMS = 23  # of a division that is counted


def write_inputs(folder: Path) -> None:
    """Models, an update and data for all evaluations."""
    model, edited = (zoo.tiny("llama", dtype=torch.float32) for _ in range(2))
    generator = torch.Generator().manual_seed(1)
    deltas = {
        name: 0.1 * torch.randn(p.shape, generator=generator)
        for name, p in model.named_parameters()
        if "mlp" in name
    }
    Update(deltas).save(folder / "update.safetensors")
    Update({name: 2 * delta for name, delta in deltas.items()}).apply(edited)
    zoo.save(folder / "model", model)
    zoo.save(folder / "edited", edited)
    letters = "abcdefghijklmnop"
    texts = [" ".join(letters[i : i + 3 + i % 5]) for i in range(11)]
    data = {
        "prompts": [{"instruction": text} for text in texts],
        "choice": [
            {"question": text, "choices": ["q r", "s", "t u v"][: 2 + i % 2], "answer": i % 2}
            for i, text in enumerate(texts)
        ],
        "more": [{"question": "w x", "choices": ["y", "z y"], "answer": 1}] * 2,
        "bench": [
            {"question_id": i, "category": kind, "turns": [text, "z"][: 1 + i % 2]}
            for i, (text, kind) in enumerate(zip(texts[:7], ["math", "writing"] * 4, strict=False))
        ],
        "members": [{"text": text} for text in texts],
        "others": [{"text": text[::-1]} for text in texts[2:9]],
    }
    (folder / "tofu").mkdir()
    for name in SETS:
        file = f"tofu/{'forget01' if name == 'forget' else name}_perturbed"
        data[file] = [
            {
                "question": f"{text} {name[0]}",
                "answer": f"m n {text[0]}",
                "perturbed_answer": [f"o p {text}", "q r s", "t"],
                "paraphrased_answer": f"{text[2]} m",
            }
            for text in texts[:4]
        ]
    for name, rows in data.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def grade(judge: Judge, messages: list[dict[str, str]]) -> Reply:
    """A judge's reply that depends on what it is asked."""
    return Reply(f"[[{1 + sum(map(ord, messages[-1]['content'])) % 10}]]")


@contextlib.contextmanager
def interruption() -> Iterator[None]:
    """A KeyboardInterrupt when item ``INTERRUPTED_AT`` is added to a log."""
    add, added = ItemLog.add, []

    def counted(log: ItemLog, item: str, **values: object) -> None:
        added.append(item)
        if len(added) == INTERRUPTED_AT:
            raise KeyboardInterrupt
        add(log, item, **values)

    with patch.object(ItemLog, "add", counted):
        yield


@contextlib.contextmanager
def small() -> Iterator[None]:
    """Blocks, groups and rounds of few items; a judge that is not asked over a network."""
    sizes = {
        **{"evaluate.tofu.BLOCK": 3, "evaluate.mt_bench.BLOCK": 2, "evaluate.choice.CHUNK": 5},
        **{"runs.eval_kl.GROUP_TOKENS": 9, "evaluate.tokens.BATCHES": 2},
    }
    with contextlib.ExitStack() as patches:
        for name, size in sizes.items():
            patches.enter_context(patch(f"kfade.{name}", size))
        patches.enter_context(patch.object(Judge, "ask", grade))
        yield


def evaluate(folder: Path, to: Path, more: tuple[str, ...] = ()) -> dict[str, list[int]]:
    """Run every evaluation into a folder of ``to``, at once and with an interruption.

    Returns:
        Exit codes by evaluation.
    """
    os.chdir(folder)
    codes = {}
    with small():
        for name, words in EVALUATIONS.items():
            if more and name in UNSHARDED:
                continue
            whole = ["eval", *words, *more, "--out", str(to / name)]
            cut = ["eval", *words, *more, "--out", str(to / f"{name}, resumed")]
            with interruption():
                first = main(cut)
            codes[name] = [main([*whole, "--json"]), first, main([*cut, "--resume"])]
    return codes


def leave(to: Path, more: tuple[str, ...]) -> list[int]:
    """Exit codes of interrupted evaluations, which another number of processes can resume."""
    with small():
        codes = []
        for name in LEFT:
            with interruption():
                codes.append(main(["eval", *EVALUATIONS[name], *more, "--out", str(to / name)]))
    return codes


def resume(folder: Path, to: Path) -> list[int]:
    """Exit codes of what :func:`leave` has left, when it is resumed."""
    os.chdir(folder)
    with small():
        return [
            main(["eval", *EVALUATIONS[name], "--resume", "--out", str(to / name)]) for name in LEFT
        ]


def refuse(more: tuple[str, ...]) -> int:
    """The exit code of an evaluation that finds values that are not finite in few sequences."""
    last = zoo.WORDS.index("p")

    def broken(logits_NV: torch.Tensor, target_N: torch.Tensor) -> torch.Tensor:
        values = token_statistics(logits_NV, target_N)
        values[target_N == last] = torch.nan
        return values

    with patch("kfade.runs.eval_memorisation.token_statistics", broken):
        return main(["eval", *EVALUATIONS["memorisation"], *more, "--out", "refused"])


def divisions() -> dict[str, object]:
    """What this process did of divided work, and what came out."""
    done: list[int] = []

    def square(item: int) -> int:
        done.append(item)
        return item * item

    def fail(item: int) -> int:
        if item in (7, 12):
            raise InputError(f"item {item} is broken")
        return item

    def inner(item: int) -> list[int]:
        return list(map_shared([item, item + 1], square, "inner", cost=float))

    found: dict[str, object] = {}
    results = list(map_shared(range(ITEMS), square, "outer", cost=float, each=3))
    found["once"] = {"results": results, "done": [*done]}
    done.clear()
    found["nested"] = {
        "results": list(map_shared(range(4), inner, "outer", cost=float)),
        "done": [*done],
    }
    done.clear()
    with undivided():
        results = list(map_shared(range(4), square, "outer", cost=float))
    found["undivided"] = {"results": results, "done": [*done]}
    before: list[int] = []
    try:
        before.extend(map_shared(range(ITEMS), fail, "failing", cost=lambda item: 1, each=3))
    except InputError as error:
        found["failed"] = str(error)
    found["exchanged"] = list(in_order({distributed.rank(): distributed.rank()}))
    return found


class Request(NamedTuple):
    """As much of lm-eval's ``Instance`` as is read."""

    args: tuple[str, ...]


def lm_eval_requests(model: torch.nn.Module) -> dict[str, object]:
    """lm-eval's requests, answered by a class in the place of its own."""
    asked: list[tuple[str, ...]] = []

    class HFLM:
        def __init__(self, **options: object) -> None:
            pass

        def loglikelihood(self, requests: list[Request]) -> list[str]:
            asked.extend(request.args for request in requests)
            return [" ".join(request.args) for request in requests]

        loglikelihood_rolling = generate_until = loglikelihood

    module = ModuleType("lm_eval.models.huggingface")
    module.HFLM = HFLM  # type: ignore[attr-defined]
    requests = [Request((context, choice)) for context in "abcdefg" for choice in "xy"]
    with patch.dict(sys.modules, {module.__name__: module}):
        answers = _language_model(model, None, 1).loglikelihood(requests)
    return {"answers": answers, "asked": asked}


def work(folder: Path, to: Path, sharded: bool) -> int:
    """Everything, in one of the processes that the tests start."""
    more = ("--shard",) if sharded else ()
    with distributed.processes(), patch.object(distributed, "processes", contextlib.nullcontext):
        codes = evaluate(folder, to, more)
        found = {
            "codes": codes,
            "left": leave(to / "left", more),
            "refused": refuse(more),
            "check": main(["check", "model", *more]),
            **divisions(),
            "lm-eval": lm_eval_requests(zoo.tiny("llama")),
        }
        (to / f"rank-{distributed.rank()}.json").write_text(json.dumps(found))
    return 0
