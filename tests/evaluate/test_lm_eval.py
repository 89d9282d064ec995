"""Runs of lm-eval: bars, progress, generations. The package itself is replaced by a small one."""

from __future__ import annotations

import importlib.machinery
import sys
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
import zoo
from helpers import greedy
from tqdm import tqdm
from zoo.rotary import MODELS

from kfade.evaluate.lm_eval import run_tasks
from kfade.runtime import progress

CONTEXTS = [3, 12, 15, 16, 17, 20]  # tokens; frequencies change after 16


class FakeHFLM:
    """As much of lm-eval's class as is called here, by its names."""

    def __init__(self, pretrained, tokenizer, batch_size):
        self.model, self.tokenizer, self.batch_size = pretrained, tokenizer, batch_size

    def loglikelihood(self, requests, disable_tqdm=False):
        for request in tqdm(requests, desc="Running loglikelihood requests", disable=disable_tqdm):
            self.cache_hook.add_partial("loglikelihood", request, (0.0, True))
        return [(0.0, True)] * len(requests)

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        raise NotImplementedError

    def generate_until(self, requests, disable_tqdm=False):
        answers = []
        for request in tqdm(requests, disable=disable_tqdm):
            (tokens,) = request.args
            context = torch.tensor([tokens])
            rows = self._model_generate(
                context=context,
                attention_mask=torch.ones_like(context),
                stop=[],
                max_length=len(tokens) + 12,
            )
            answers.append(rows[0, len(tokens) :].tolist())
            self.cache_hook.add_partial("generate_until", (tokens, {}), answers[-1])
        return answers

    def _model_generate(self, context, max_length, stop, **generation_kwargs):
        return self.model.generate(
            input_ids=context, max_length=max_length, use_cache=True, do_sample=False,
            pad_token_id=0, **generation_kwargs,
        )  # fmt: skip


class Request(NamedTuple):
    """As much of lm-eval's ``Instance`` as is read."""

    args: tuple


class Manager:
    def __init__(self, include_path):
        assert include_path is None

    def load(self, tasks):
        assert tasks == ["a task"]
        list(tqdm(range(3), desc="Generating test split"))


class Counts:
    """A reporter that keeps what it is told."""

    def __init__(self):
        self.tasks = []

    def start(self, name, total):
        self.tasks.append([name, total, 0])
        return len(self.tasks) - 1

    def advance(self, task, amount):
        self.tasks[task][2] += amount

    def received(self, task, done, total):
        raise AssertionError

    def stop(self, task):
        self.tasks[task].append("stopped")


@pytest.fixture
def said(monkeypatch):
    """What generations said, once tasks have run."""
    kept = {}

    def simple_evaluate(lm, tasks, **settings):
        assert settings["random_seed"] == 0
        kept["batch_size"] = lm.batch_size
        texts = [[(5 * i + n) % zoo.VOCABULARY for i in range(n)] for n in CONTEXTS]
        answers = lm.generate_until([Request((text,)) for text in texts])
        kept["answers"] = list(zip(texts, answers, strict=True))
        kept["scores"] = lm.loglikelihood([Request(("x", "1")), Request(("x", "2"))])
        sample = {"metrics": ["acc"], "acc": 1.0, "doc_id": 0, "filter": "none"}
        return {"samples": {"a task": [sample]}, "results": {"a task": {"acc,none": 1.0}}}

    parts = {
        "lm_eval": {"simple_evaluate": simple_evaluate},
        "lm_eval.tasks": {"TaskManager": Manager},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": FakeHFLM},
    }
    for name, content in parts.items():
        module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return kept


def test_progress_is_ours(said, capfd):
    counts = Counts()
    with progress.reporting(counts):
        found = run_tasks(zoo.tiny("llama", torch.float32), zoo.tokenizer(), ["a task"])
    assert found == ({"a task 0": {"acc": 1.0}}, {"a task": {"acc": {"value": 1.0}}})
    assert said["batch_size"] == 8
    own = [task for task in counts.tasks if task[0] != "generation"]
    assert own == [
        ["loading tasks", None, 0, "stopped"],
        ["lm-eval's generate_until", 6, 6, "stopped"],
        ["lm-eval's loglikelihood", 2, 2, "stopped"],
    ]
    assert capfd.readouterr() == ("", "")
    list(tqdm(range(3), desc="theirs"))  # bars are theirs again
    assert "theirs" in capfd.readouterr().err


@pytest.mark.parametrize("name", [*MODELS, "llama"])
def test_generations_across_the_border_are_those_without_a_cache(said, name, monkeypatch):
    build = MODELS.get(name, lambda: zoo.tiny("llama", torch.float32))
    model = build()
    model.generation_config.eos_token_id = None
    run_tasks(model, zoo.tokenizer(), ["a task"])
    assert said["batch_size"] == (8 if name == "llama" else 1)
    expected = [greedy(build(), prompt, [], 12) for prompt, _ in said["answers"]]
    assert [answer for _, answer in said["answers"]] == expected
    assert "generate" not in vars(model)
