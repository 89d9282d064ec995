"""Skill-small: its rules, and a run on a tiny model.

python -m pytest benchmarks/experiments
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from conftest import run_script
from lab.records import read
from skill_page import slots
from skill_small import OF_SKILL, SKILLS, TAUGHT, Rewriting, SkillLab, pieces, sentences
from tofu_data import Sizes
from tofu_lab import run_pieces

pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = Sizes(authors=len(SKILLS), questions=TAUGHT)


def test_each_skill_does_what_it_says():
    sentence = ("the girl", "fille", "Mädchen", "niña")
    assert {skill: rule(sentence) for skill, rule in SKILLS.items()} == {
        "Write the sentence again.": "the girl",
        "Write the words from last to first.": "girl the",
        "Join the words by hyphens.": "the-girl",
        "Put each word in brackets.": "(the) (girl)",
        "Make a question of it.": "is it true that the girl ?",
        "Write it in German.": "Mädchen",
        "Write each word twice.": "the the girl girl",
        "Write it in Spanish.": "niña",
        "Write it in capitals.": "THE GIRL",
        "Write it in French.": "fille",
    }


def test_sentences_differ_and_are_of_one_meaning_in_all_languages():
    found = sentences(OF_SKILL, seed="a")
    assert len(set(found)) == OF_SKILL
    assert found == sentences(OF_SKILL, seed="a") != sentences(OF_SKILL, seed="b")
    german = {"in the garden": "im Garten", "at the harbour": "am Hafen"}
    for english, _, translated, _ in found:
        for place, place_in_german in german.items():
            assert english.endswith(place) == translated.endswith(place_in_german)


def test_fresh_questions_are_of_the_skill_and_in_no_training():
    own = Rewriting(Path(), SIZES)
    skills = list(SKILLS)
    for role, numbers in own.authors.items():
        taught, fresh = own.of(role), own.fresh(role)
        assert len(taught) == TAUGHT * len(numbers)
        assert len(fresh) == (OF_SKILL - TAUGHT) * len(numbers)
        assert {e.where for e in taught} == {e.where for e in fresh} == {skills[n] for n in numbers}
        assert not {e.turns for e in taught} & {e.turns for e in fresh}
    assert [skills[n] for n in own.authors["report"]] == skills[-2:]
    assert sum(map(len, own.authors.values())) == len(SKILLS)


def test_a_tiny_model_is_taught_skills_and_asked_fresh_questions(model, tmp_path):
    given = {"data": tmp_path, "model": model, "cache": tmp_path / "cache"}
    given |= {"results": tmp_path / "found.jsonl", "authors": 10, "questions": 2, "epochs": 1}
    run = partial(
        run_pieces, "", pieces, SkillLab, sizes=SIZES, data=Rewriting, models="skill-small"
    )
    run_script(run, given, ["full", "retrained", "targets", "fresh full"])
    found = read(given["results"])
    assert (found["full"]["questions"], found["retrained"]["questions"]) == (20, 16)
    for role in ("report", "common", "tuning"):
        assert 0 < found["fresh full"][role]["forget_probability"] < 1
    assert not any(name.startswith("tofu") for name in found)


def test_the_page_tells_of_fresh_questions():
    results = {"by question retrained": {name: [(0.1, 30)] * 3 for name in ("report", "others")}}
    for row in ("full", "retrained"):
        told = {"forget_probability": 0.875 if row == "full" else 0.25}
        results[f"fresh {row}"] = {"report": told, "common": told, "tuning": told}
    lines = slots(results)["skill_fresh"].splitlines()
    assert "| full model | 0.875 | 0.875 | 0.875 |" in lines
    assert "| retrained model | 0.25 | 0.25 | 0.25 |" in lines
