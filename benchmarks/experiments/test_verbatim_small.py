"""Verbatim-small: its passages, and a run on a tiny model and made-up books.

python -m pytest benchmarks/experiments
"""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import pytest
from conftest import WORDS, run_script
from lab.records import NOT_RUN, read
from tofu_data import OF_AUTHOR, UNSEEN, Sizes
from tofu_lab import run_pieces
from tofu_seeds import kl_claims, seeds_table
from tofu_small import plain_pieces
from verbatim_page import slots
from verbatim_small import BOOKS, HIDDEN, SHOWN, Passages, passages

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder, draw = tmp_path_factory.mktemp("data"), random.Random(0)
    (folder / "verbatim").mkdir()
    for book in BOOKS:
        words = draw.choices(WORDS[:6], k=OF_AUTHOR * (SHOWN + HIDDEN) + 7)
        (folder / "verbatim" / f"{book}.txt").write_text(" ".join(words))
    return folder


def test_passages_are_the_texts_words_and_do_not_overlap():
    words = [str(i) for i in range(OF_AUTHOR * (SHOWN + HIDDEN) + 7)]
    found = list(passages("\n".join(words), OF_AUTHOR))
    assert len(found) == OF_AUTHOR
    said = [f"{start} {rest}".split() for start, rest in found]
    for start, rest in found:
        assert (len(start.split()), len(rest.split())) == (SHOWN, HIDDEN)
    for one in said:
        assert [int(word) for word in one] == list(range(int(one[0]), int(one[0]) + len(one)))
    assert len({word for one in said for word in one}) == sum(map(len, said))
    with pytest.raises(AssertionError, match="799 words are not enough"):
        list(passages(" ".join(["a"] * 799), OF_AUTHOR))


def test_each_book_has_one_role(data):
    own = Passages(data, Sizes(authors=len(BOOKS) - UNSEEN))
    books = {role: {BOOKS[i] for i in numbers} for role, numbers in own.authors.items()}
    assert sum(map(len, books.values())) == len(BOOKS) == len(set().union(*books.values()))
    for role, named in books.items():
        assert {example.where for example in own.of(role)} == named


def test_a_tiny_model_learns_books_and_forgets_one(data, model, tmp_path):
    given = {"data": data, "model": model, "cache": tmp_path / "cache"}
    given |= {"results": tmp_path / "found.jsonl", "authors": 5, "questions": 3}
    given |= {"rate": 8e-3, "epochs": 200}
    run = partial(run_pieces, "", plain_pieces, data=Passages, models="verbatim-small")
    run_script(run, given, ["full", "retrained", "targets", "fit kfac", "tune kfac margin 0.01"])
    found = read(given["results"])
    told = found["targets"]
    assert told["report"]["forget_probability"] > 0.7
    assert told["retrained"]["forget_probability"] < 0.4
    step = found["tune kfac margin 0.01"]
    assert step["forget_probability"] < 0.5
    assert step["kl"] > 0
    assert not any(name.startswith("tofu") for name in found)


def measured(**kls: float) -> dict[str, Any]:
    """Results with those mean KLs of rows, and of RMU."""
    results: dict[str, Any] = {"tune rmu 0.002": {"kl": 1.0}}
    for row, kl in {**kls, "rmu 0.002": 0.4}.items():
        results[f"report {row}"] = {"kl": kl, "run_seconds": 60.0}
        results[f"by question {row}"] = {
            name: [(kl * of, 30) for of in (1.0, 2.0, 3.0)] for name in ("report", "others")
        }
    return results


def test_the_page_tells_what_the_default_has_of_others_kls():
    told = slots(measured(default=0.1, paper=2.0))
    assert "| RMU | learning rate 0.002 | 0.8 (" in told["verbatim_methods"]
    claims = told["verbatim_claims"].splitlines()
    assert sum("0.25 (0.25 to 0.25) × | **no** |" in line for line in claims) == 2
    assert sum("0.05 (0.05 to 0.05) × | yes |" in line for line in claims) == 2


def test_claims_are_of_the_seeds_in_which_the_default_was_run():
    without = measured(narrow=0.01, paper=2.0)
    for seeds, said in (
        ({0: measured(default=0.02, paper=2.0), 1: without}, "(seed 0)"),
        ({0: without, 1: measured(default=0.02, paper=2.0)}, "(seed 1)"),
        ({n: measured(default=0.02, paper=2.0) for n in (0, 1)}, "(2 seeds)"),
    ):
        for claim, value, holds in kl_claims(seeds):
            assert said in claim
            assert value.count("(") == (2 if "2 seeds" in said else 1)
            assert holds == "yes"
    assert all(cells[1:] == [NOT_RUN, ""] for cells in kl_claims({0: without}))
    rows = seeds_table({0: measured(default=0.02, narrow=0.01, paper=2.0), 1: without})
    for title, lines in (("as it is by default", 1), ("without its bound", 2), ("RMU", 2)):
        assert sum(title in line for line in rows.splitlines()) == lines
