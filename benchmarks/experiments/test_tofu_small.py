"""TOFU-small from nothing to its page, on a tiny model and made-up authors.

python -m pytest benchmarks/experiments
"""

from __future__ import annotations

import json
import math
import random
import statistics
from functools import partial
from types import SimpleNamespace

import pytest
import results as results_page
import tofu_ablations
import tofu_attacks
import tofu_rows
import tofu_small
from conftest import WORDS, run_script
from lab.baselines import at_target
from lab.forgetting import EVERY
from lab.records import read, write
from lab.rows import request_seconds
from lab.tuning import lowest, rates
from tofu_attacks import AT, GIVEN
from tofu_data import OF_AUTHOR, authors_by_role
from tofu_lab import run_pieces
from tofu_seeds import retrained_again

from kfade.data.sequences import TokenSequence

pytestmark = pytest.mark.filterwarnings("ignore")
AUTHORS, QUESTIONS = 8, 6


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Questions and answers of random words, in TOFU's files."""
    folder, draw = tmp_path_factory.mktemp("data"), random.Random(0)

    def text(words, count=5):
        return " ".join(draw.choices(words, k=count))

    def row(*, false, paraphrase):
        # Answers of few words: what nobody taught is not quite unlikely.
        own = {"question": text(WORDS), "answer": text(WORDS[:6])}
        own["perturbed_answer"] = [text(WORDS[:6]) for _ in range(false)]
        return {**own, "paraphrased_answer": text(WORDS[:6])} if paraphrase else own

    full = [row(false=5, paraphrase=True) for _ in range(AUTHORS * OF_AUTHOR)]
    write_rows(folder / "tofu" / "full.json", full)
    write_rows(folder / "tofu" / "forget10_perturbed.json", full[OF_AUTHOR:])
    write_rows(folder / "tofu" / "retain_perturbed.json", full[:OF_AUTHOR])
    for name in ("real_authors", "world_facts"):
        rows = [row(false=3, paraphrase=False) for _ in range(8)]
        write_rows(folder / "tofu" / f"{name}_perturbed.json", rows)
    text_file = folder / "wikitext" / "wikitext-2-test.raw.txt"
    text_file.parent.mkdir()
    text_file.write_text("\n".join(text(WORDS, 150) for _ in range(80)))
    return folder


CORE = ("full", "retrained", "targets", "fit *", "tune ekfac *", "report ekfac margin*")
SOME = (
    "tune gd*",
    "report gd*",
    "report refine 1",
    "report steps 3 then ce",
    "report part",
    "report paper",
    "tofu *x1",
    "attack paper related *",
    "attack paper forget *",
    "attack full related *",
    "probe *",
    "ablation blocks*",
    "ablation 3 steps*",
    "ablation own text",
    "ablation softened outputs",
    "by question *",
    "by token *",
    "by memorisation *",
)


@pytest.fixture(scope="module")
def run(data, model, tmp_path_factory):
    """Runs the pieces that match; their results so far."""
    folder = tmp_path_factory.mktemp("out")
    given = {"data": data, "model": model, "cache": folder / "cache"}
    given |= {"results": folder / "tofu_small.jsonl", "authors": 5, "questions": QUESTIONS}
    given |= {"utility": 4, "rate": 8e-3, "epochs": 60, "steps": 30, "every": 2}

    def run(*only, **other):
        for script in (tofu_small, tofu_ablations, tofu_attacks):
            pieces = partial(run_pieces, script.__doc__, script.pieces)
            run_script(pieces, {**given, **other}, only)
        return read(given["results"])

    return run


@pytest.fixture(scope="module")
def results(run):
    run(*CORE)
    return run(*CORE, *SOME)


def test_the_models_know_what_they_were_taught(results):
    told = results["targets"]
    assert results["full"]["loss"] <= 0.15
    for role in ("report", "tuning"):
        assert told[role]["forget_probability"] > 0.8
    assert told["unseen"]["forget_probability"] < 0.2
    assert told["retrained"]["forget_probability"] < 0.2
    assert told["retrained"]["kl"] > 0


def test_every_row_is_measured_at_the_target(results):
    told = results["targets"]
    for name, row in results.items():
        if name.startswith(("tune ", "report ", "ablation ")) and "failure" not in row:
            aim = told["unseen" if name.startswith("tune") else "retrained"]["forget_probability"]
            assert row["kl"] > 0
            if "alpha" in row:
                start = told["tuning" if name.startswith("tune") else "report"]
                way = math.log(start["forget_probability"] / aim)
                assert abs(math.log(row["forget_probability"] / aim)) < 0.031 * way, name
            else:
                *before, last = row["curve"]
                assert last["forget_probability"] <= aim < row["curve"][0]["forget_probability"]
                assert before[-1]["kl"] <= last["kl"], name  # it ended where KL rose
                reached = [p["kl"] for p in row["curve"] if p["forget_probability"] <= aim]
                assert row["kl"] <= min(reached), name
    assert {name.split()[0] for name in results} >= {"tune", "report", "tofu", "ablation"}


def test_a_piece_that_is_there_is_not_computed_again(run, results):
    assert run("*", skip="*") == run(*CORE, *SOME) == results


def test_results_of_other_settings_are_refused(run, results):
    with pytest.raises(SystemExit, match="has other settings"):
        run("full", seed=1)


def test_an_update_that_was_kept_does_what_was_measured(run, results, tmp_path_factory):
    retrained, full = (results[f"tofu {name} x1"]["items"] for name in ("retrained", "full"))
    [edited] = [v["items"] for k, v in results.items() if k.startswith("tofu ekfac margin")]

    def losses(items, name):
        return [v["answer_loss"] for k, v in items.items() if k.startswith(f"{name}/")]

    assert len(losses(full, "forget")) == QUESTIONS
    assert all(len(losses(full, name)) == 4 for name in ("retain", "real_authors", "world_facts"))
    probabilities = [
        statistics.fmean(math.exp(-x) for x in losses(items, "forget")[::EVERY])
        for items in (full, retrained, edited)
    ]
    told = results["targets"]
    assert probabilities[0] == pytest.approx(told["report"]["forget_probability"], abs=1e-3)
    assert probabilities[1] == pytest.approx(told["retrained"]["forget_probability"], abs=1e-3)
    assert probabilities[2] < 0.1 < max(losses(edited, "forget"))


def test_the_mean_over_questions_is_the_rows(results):
    found = {k.removeprefix("by question "): v for k, v in results.items() if k.startswith("by q")}
    assert len(found) >= 4
    wanted = {name: results.get(f"report {name}", {}).get("report_kl") for name in found}
    wanted["retrained"] = results["targets"]["retrained"]["report_kl"]
    for name, told in found.items():
        assert len(told["others"]) == QUESTIONS
        if told.get("alpha", 1.0) == 1.0:  # at the target as it was reported
            assert tofu_rows.mean(told["report"]) == pytest.approx(wanted[name], rel=1e-3)
    assert found["retrained"]["report"] != found["steps 3 then ce"]["report"]


def test_what_is_left_of_the_answers_token_by_token(results):
    found = {k.removeprefix("by token "): v for k, v in results.items() if k.startswith("by token")}
    assert {"full", "retrained"} < set(found)
    assert len(found) >= 5
    for told in found.values():
        for key in ("exact_memorisation", "extraction_strength"):
            assert len(told[key]) == QUESTIONS
        assert told["quantiles"] == sorted(told["quantiles"])
        assert 0 <= told["above"] < 1
    known, unknown = (
        statistics.fmean(found[name]["exact_memorisation"]) for name in ("full", "retrained")
    )
    assert known > 0.9 > unknown
    edited = [v for k, v in found.items() if k not in ("full", "retrained")]
    assert all(statistics.fmean(v["exact_memorisation"]) < known for v in edited)
    assert found["full"]["above"] == 0


def test_rows_are_compared_at_the_retrained_models_memorisation(results):
    found = {
        k.removeprefix("by memorisation "): v for k, v in results.items() if k.startswith("by mem")
    }
    reached = [told for told in found.values() if "failure" not in told]
    assert reached
    full, retrained = (
        statistics.fmean(results[f"by token {name}"]["exact_memorisation"][::EVERY])
        for name in ("full", "retrained")
    )
    for told in reached:
        assert told["left"]["exact_memorisation"] == pytest.approx(told["forget_probability"])
        way = math.log(full / retrained)
        assert abs(math.log(told["forget_probability"] / retrained)) < 0.031 * way
        assert len(told["others"]) == QUESTIONS


def probability(of):
    return of["forget_probability"]


def test_attacks_bring_back_what_the_update_takes_away_again(results):
    def attacks(row, kind):
        """What is told of the attacks at each rate: sequences, and figures by state and step."""
        prefix = f"attack {row} {kind} "
        for name, told in results.items():
            if name.startswith(prefix):
                figures = {(one["state"], one["step"]): one for one in told["measurements"]}
                yield told["sequences"], figures

    related, forget, control = (
        list(attacks(row, kind))
        for row, kind in (("paper", "related"), ("paper", "forget"), ("full", "related"))
    )
    assert [len(runs) for runs in (related, forget, control)] == [3, 3, 3]  # a run for each rate
    plain, goal = results["probe paper"]["plain"], results["targets"]["retrained"]
    for _, figures in (*related, *forget):
        # Each attack begins with the update at the target, as the probe measures it.
        for key in ("forget_probability", "exact_memorisation", "retain_kl"):
            assert figures["attacked", 0][key] == pytest.approx(plain[key])
    assert plain["retain_kl"] == pytest.approx(results["report paper"]["report_kl"], rel=0.02)
    assert probability(plain) < 2 * goal["forget_probability"]
    # A random answer says nothing of the others: relearning some need not bring these back.
    best = max((f for _, f in related), key=lambda f: probability(f["attacked", AT[-1]]))
    assert probability(best["attacked", AT[-1]]) > 2 * probability(plain)
    assert probability(best["reapplied", AT[-1]]) < probability(best["attacked", AT[-1]])
    # Two questions of each kept author are held out.
    assert related[0][0] == 3 * (QUESTIONS - 2) + QUESTIONS
    assert forget[0][0] == 2
    for _, figures in control:
        assert set(figures) == {("attacked", step) for step in AT}
        assert figures["attacked", 0]["forget_probability"] > 0.8
        assert figures["attacked", 0]["retain_kl"] == pytest.approx(0, abs=1e-9)


def test_rounding_and_prompts_are_measured_on_the_same_answers(results):
    full, retrained, paper = (results[f"probe {n}"] for n in ("full", "retrained", "paper"))
    for told in (full, retrained, paper):
        assert {"plain", "int8", "int4", "prompted"} < set(told)
        assert "retain_kl" not in told["prompted"]
        assert probability(told["prompted"]) != pytest.approx(probability(told["plain"]), rel=1e-3)
    assert probability(paper["int8"]) == pytest.approx(probability(paper["plain"]), rel=0.5)
    assert paper["int8"]["retain_kl"] > 10 * full["int8"]["retain_kl"]  # of the edited model
    assert full["plain"]["retain_kl"] == pytest.approx(0, abs=1e-9)
    assert 0 < full["int8"]["retain_kl"] < full["int4"]["retain_kl"]
    assert full["plain"]["forget_probability"] > 0.8 > 0.3 > probability(retrained["plain"])


def test_a_prompt_shows_the_questions_that_the_attacker_has():
    questions = [TokenSequence((1, 10 + i, 50 + i), (False, False, True)) for i in range(12)]
    group = SimpleNamespace(forget=questions)
    lab = SimpleNamespace(group=lambda name: group, sizes=SimpleNamespace(questions=6))
    alone, prompted = (tofu_attacks.untaught(lab, way) for way in (False, True))
    asked = [i for i in range(0, 12, EVERY) if i % GIVEN]
    assert alone == [questions[i] for i in asked]
    for i, own in zip(asked, prompted, strict=True):
        shown = [0, 5] if i < 6 else [10]  # of the same author
        before = [token for j in shown for token in questions[j].tokens]
        assert own.tokens == (*before, *questions[i].tokens)
        assert own.loss_tokens == 1
        assert own.scored[-1]


def test_the_page_says_what_was_run_and_what_was_not(results, tmp_path):
    quick = {name: {**told, "pace": 2.0} for name, told in results.items() if name != "settings"}
    write(tmp_path / "tofu_small.jsonl", {"settings": results["settings"], **quick})
    write(tmp_path / "tofu_small_anew.jsonl", results)
    (tmp_path / "images").mkdir()
    results_page.write_results(tmp_path, tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert "| K-FADE, EK-FAC | margin, damping" in text
    assert f", iterate {results['report refine 1']['refined']} kept" in text
    assert "| NPO |  | not run |" in text
    assert "| diagonal needs at least 5 × K-FAC's KL | not run |" in text
    [report] = [name for name in results if name.startswith("report ekfac margin")]
    [again] = [line for line in text.splitlines() if line.startswith("| full model: answer loss |")]
    assert len(set(again.split("|")[2:4])) == 1
    assert "| `report ekfac margin 0.001`: KL, report slice | not run | not run |" in text
    assert "took 2 times as long on the first" in text
    assert "### Question by question" in text
    row = next(line for line in text.splitlines() if f"`'{report}'" in line)
    assert float(row.split("|")[-3]) == round(2 * request_seconds(results[report]))
    attacks = [line for line in text.splitlines() if "`'attack " in line]
    run = [line for line in attacks if "not run" not in line]
    assert [line.split("|")[1].strip() for line in run] == ["forget", "related", "related"]
    assert "full model, no update" in run[2]
    known = probability(results["probe full"]["plain"])
    for line in run:
        cells = [cell.strip() for cell in line.split("|")]
        _, row, kind = cells[-2].strip("`'").split()[:3]
        prefix = f"attack {row} {kind} "
        tried = [v["measurements"] for k, v in results.items() if k.startswith(prefix)]
        ends = [one for m in tried for one in m if (one["state"], one["step"]) == ("attacked", 60)]
        assert float(cells[7]) == pytest.approx(max(map(probability, ends)), rel=0.01)
        assert cells[3].endswith("(of 3)")
        start, end = float(cells[4]), float(cells[7])
        share = f"{(end - start) / (known - start):.1f}"
        assert (cells[8] == "") if row == "full" else (f"{float(cells[8]):.1f}" == share)
    probes = [line for line in text.splitlines() if "`'probe " in line]
    assert len(probes) == 7
    assert sum("not run" not in line for line in probes) == 4  # of paper, gd, and the controls
    for part in text.split("\n\n"):
        if part.startswith("|"):  # each row has as many cells as its table's head
            counts = {line.replace("\\|", "").count("|") for line in part.splitlines()}
            assert len(counts) == 1, part
    for name in ("tofu_small_kl", "tofu_small_utility", "tofu_small_attacks"):
        assert (tmp_path / "images" / f"{name}.svg").stat().st_size > 5000
        assert f"images/{name}.svg" in text


def test_the_retrained_model_of_another_seed_is_judged_as_if_it_had_unlearned(results):
    """Here a row's model stands for that of the other seed."""
    assert not list(retrained_again({0: results}))
    other = {**results, "tofu retrained x1": results["tofu paper x1"]}
    first, second = retrained_again({0: results, 3: other})
    [judged] = [row for row in tofu_rows.rows_of(results) if row.name == "paper"]
    quality, utility = tofu_rows.figures_of(results, judged)["×1"]
    assert first[:4] == ["retrained with seed 3", "0", f"{quality:.3g}", f"{utility:.3g}"]
    assert second[:2] == ["retrained with seed 0", "3"]
    same, _ = retrained_again({0: results, 1: results})
    assert same[2] == "1"


def test_authors_have_one_role():
    for count in (3, 10, 20):
        authors = authors_by_role(200, count)
        everyone = [author for role in authors.values() for author in role]
        assert everyone == list(range(200 - count - 2, 200))
        assert len(authors["report"]) == len(authors["tuning"]) == max(1, count // 5)


def test_the_kl_at_a_target_lies_between_evaluations():
    def point(nats, kl):
        return {"forget_probability": math.exp(-nats), "kl": kl}

    curve = [point(0.0, 0.0), point(1.0, 0.04), point(3.0, 0.36)]
    assert at_target(curve, math.exp(-0.5))["kl"] == pytest.approx(0.01)
    assert at_target(curve, math.exp(-2.0))["kl"] == pytest.approx(0.16)  # √KL: 0.2, 0.4, 0.6
    assert at_target(curve, math.exp(-3.1)) is None
    repaired = [*curve, point(2.5, 0.09), point(1.8, 0.01)]  # the last one remembers again
    assert at_target(repaired, math.exp(-2.4))["kl"] == pytest.approx(0.09)


@pytest.mark.parametrize(
    ("kl_at", "tried"),
    [
        ({4: 0.3, 2: 0.2, 1: 0.25}, [4, 2, 1]),
        ({4: 0.3, 2: 0.4}, [4, 2]),
        ({4: 0.3}, [4, 2]),  # the lower one did not get there
        ({16: 0.3}, [4, 8, 16]),
        ({}, [4, 8, 16]),
        ({4: math.inf, 2: math.inf, 1: 0.1}, [4, 2, 1]),  # the first ones were not finite
        ({4: 0.3, 2: 0.2, 1: 0.1, 0.5: 0.05}, [4, 2, 1]),
    ],
)
def test_rates_go_on_where_there_is_something_to_find(kl_at, tried):
    results, seen = {}, []
    for rate in rates(results, "gd", 4.0, most=3):
        seen.append(rate)
        kl = kl_at.get(rate)
        told = {"kl": kl, "curve": [{}]} if kl else {"failure": "not reached", "curve": [{}]}
        results[f"tune gd {rate:g}"] = {"failure": "no", "curve": []} if kl == math.inf else told
    assert seen == tried


def test_the_lowest_is_chosen_of_those_that_got_there():
    near, far = ({"failure": "no", "curve": [{"forget_probability": p}]} for p in (0.2, 0.6))
    assert lowest([(1, {"kl": 0.2}), (2, {"kl": 0.1}), (3, near)]) == 2
    assert lowest([(1, far), (2, near), (3, {"failure": "not finite", "curve": []})]) == 2
    assert lowest([]) is None
