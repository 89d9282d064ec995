"""Memorisation and membership inference, each figure against a slow formula."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path

import pytest
import torch
import zoo
from helpers import random_sequences, tiny_llama
from scipy.stats import mannwhitneyu

from kfade.cli import main
from kfade.evaluate.log import read_log
from kfade.evaluate.memorisation import (
    area_under_curve,
    extraction_strength,
    summarise_memorisation,
    text_statistics,
    token_statistics,
)
from kfade.evaluate.tokens import log_probability, token_values


@pytest.mark.parametrize(
    ("right", "strength"),
    [
        ("1111", 1.0),  # nothing needs to be given
        ("0111", 0.75),
        ("1101", 0.25),  # what came by itself before the last mistake does not count
        ("1110", 0.0),
        ("0000", 0.0),
        ("1", 1.0),
    ],
)
def test_extraction_strength_by_hand(right, strength):
    assert extraction_strength([r == "1" for r in right]) == strength


def test_token_statistics_by_hand():
    """p = (1/2, 1/4, 1/4): μ = −(½ ln 2 + ½ ln 4), and log p is ±½ ln 2 from it: σ = ½ ln 2."""
    logits = torch.tensor([[2.0, 1.0, 1.0]], dtype=torch.float64) * math.log(2)
    first = token_statistics(logits, torch.tensor([0]))[0].tolist()
    second = token_statistics(logits, torch.tensor([1]))[0].tolist()
    assert first == pytest.approx([-math.log(2), 1.0, 1.0])
    assert second == pytest.approx([-math.log(4), 0.0, -1.0])


def test_a_uniform_distribution_has_no_deviation():
    values = token_statistics(torch.zeros(1, 4), torch.tensor([2]))
    assert torch.isfinite(values).all()
    assert abs(values[0, 2]) < 1e-3


def test_token_statistics_against_a_slow_formula():
    model = tiny_llama()
    sequences = random_sequences(7)
    found = dict(token_values(model, sequences, token_statistics, name="x", batch_tokens=20))
    assert set(found) == set(range(7))
    for index, sequence in enumerate(sequences):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([sequence.tokens])).logits[0]
        rows = []
        for t, scored in enumerate(sequence.scored):
            if not scored:
                continue
            p = [math.exp(z) for z in logits[t - 1].tolist()]
            p = [x / sum(p) for x in p]
            mean = sum(x * math.log(x) for x in p)
            deviation = math.sqrt(sum(x * math.log(x) ** 2 for x in p) - mean**2)
            own = math.log(p[sequence.tokens[t]])
            right = max(range(len(p)), key=p.__getitem__) == sequence.tokens[t]
            rows.append([own, float(right), (own - mean) / deviation])
        assert torch.allclose(found[index], torch.tensor(rows, dtype=torch.float64), rtol=1e-7)


def test_text_statistics_by_hand():
    values = torch.tensor(
        [[-1.0, 1, 0.5], [-2.0, 0, -1.0], [-3.0, 1, -3.0], [-4.0, 1, 0.0], [-5.0, 1, -2.0]],
        dtype=torch.float64,
    )
    figures = text_statistics(values, "some text", 0.4)
    assert figures["tokens"] == 5
    assert figures["loss"] == pytest.approx(3.0)
    assert figures["exact_memorisation"] == pytest.approx(0.8)
    assert figures["extraction_strength"] == pytest.approx(0.6)
    scores = figures["scores"]
    assert scores["loss"] == pytest.approx(-3.0)
    assert scores["zlib"] == pytest.approx(-3.0 / len(zlib.compress(b"some text")))
    assert scores["min_k"] == pytest.approx(-4.5)  # of −4 and −5
    assert scores["min_k_plus_plus"] == pytest.approx(-2.5)  # of −3 and −2
    least = text_statistics(values, "some text", 0.1)["scores"]
    assert (least["min_k"], least["min_k_plus_plus"]) == (-5.0, -3.0)  # one token at least


def test_area_under_curve_by_hand_and_by_rank_sums():
    # Pairs (member, other): 3 > 1, 3 > 2, 3 > 0, 2 > 1, 2 = 2, 2 > 0: 5½ of 6.
    assert area_under_curve([3, 2], [1, 2, 0])["value"] == pytest.approx(5.5 / 6)
    generator = torch.Generator().manual_seed(0)
    members = torch.randint(0, 9, (40,), generator=generator).tolist()
    others = torch.randint(0, 7, (30,), generator=generator).tolist()
    statistic = mannwhitneyu(members, others).statistic
    assert area_under_curve(members, others)["value"] == pytest.approx(statistic / 1200)
    assert area_under_curve(members, members)["value"] == pytest.approx(0.5)
    assert area_under_curve([1, 1], [0, 0]) == {"value": 1.0, "standard_error": 0.0}
    # A = ½, m = n = 2: Q1 = Q2 = 1/3, variance (¼ + 2·(1/3 − ¼))/4 = 5/48
    chance = area_under_curve([0, 1], [0, 1])
    assert chance["standard_error"] == pytest.approx(math.sqrt(5 / 48))


def test_summary_by_hand():
    def item(loss, tokens, exact, score):
        scores = dict.fromkeys(("loss", "zlib", "min_k", "min_k_plus_plus"), score)
        return {
            **{"loss": loss, "tokens": tokens, "exact_memorisation": exact},
            **{"extraction_strength": 0.5, "scores": scores},
        }

    members = [item(1.0, 1, 0.2, 2.0), item(2.0, 3, 0.6, 1.0)]
    result = summarise_memorisation(members, [item(4.0, 5, 0.0, 0.0)])
    assert result["members"]["perplexity"] == pytest.approx(math.exp(7 / 4))
    exact = result["members"]["exact_memorisation"]
    assert exact["value"] == pytest.approx(0.4)
    assert exact["standard_error"] == pytest.approx(0.2)  # deviation 0.4/√2·... over √2
    assert result["non_members"]["texts"] == 1
    assert result["auc"]["min_k"]["value"] == 1.0
    assert "auc" not in summarise_memorisation(members, [])


def test_log_probability_is_cross_entropy():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 7, generator=generator)
    target = torch.tensor([0, 6, 3, 3, 1])
    theirs = -torch.nn.functional.cross_entropy(logits, target, reduction="none")
    assert torch.allclose(log_probability(logits, target)[:, 0], theirs)


# ---- the command


@pytest.fixture
def desk(tmp_path, monkeypatch) -> Path:
    """A model that was trained on the members until it knows them, and one that was not."""
    model = zoo.tiny("llama", dtype=torch.float32)
    model.save_pretrained(tmp_path / "fresh")
    members = ["a b c d e f", "g h a i j b", "k c l m d n", "e o p f q r"]
    others = ["s t a u v b", "w c x y d z", "b d f h j l", "z y x w v u"]
    tokens = zoo.tokenizer()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = torch.tensor([[*tokens(text).input_ids, 2] for text in members])
    for _ in range(60):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    model.eval().save_pretrained(tmp_path / "trained")
    for name in ("fresh", "trained"):
        tokens.save_pretrained(tmp_path / name)
    for name, texts in (("members", members), ("others", others)):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def memorisation(model: str, out: str, *more: str) -> int:
    texts = ["--members", "members.jsonl", "--non-members", "others.jsonl"]
    return main(["eval", "memorisation", model, *texts, "--out", out, *more])


def test_command_tells_a_model_that_has_seen_the_members(desk, capsys):
    assert memorisation("fresh", "before") == 0
    before = json.loads((desk / "before/metrics.json").read_text())
    assert before["members"]["perplexity"] > 10
    assert 0.1 < before["auc"]["loss"]["value"] < 0.9
    capsys.readouterr()
    assert memorisation("trained", "after", "--retain-log", "before", "--json") == 0
    after = json.loads(capsys.readouterr().out)
    assert after["members"]["perplexity"] < 3
    assert after["members"]["exact_memorisation"]["value"] > 0.7
    assert after["auc"]["loss"]["value"] == after["auc"]["min_k_plus_plus"]["value"] == 1.0
    assert after["retain"]["auc"] == before["auc"]
    items = read_log(desk / "after/items.jsonl").items
    assert items["member 0"]["tokens"] == 5  # b to f: a passage need not end there
    assert items["member 0"]["text"] == "b c d e f"
    assert set(items) == {f"{kind} {i}" for kind in ("member", "non-member") for i in range(4)}


def test_command_resumes(desk, monkeypatch):
    assert memorisation("trained", "whole") == 0
    calls = []

    def stop(*arguments):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return text_statistics(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("kfade.runs.eval_memorisation.text_statistics", stop)
        assert memorisation("trained", "cut") == 130
    assert memorisation("trained", "cut", "--resume") == 0
    whole, cut = (read_log(desk / name / "items.jsonl") for name in ("whole", "cut"))
    assert cut.aggregate["auc"] == whole.aggregate["auc"]
    ours, theirs = (log.aggregate["members"]["perplexity"] for log in (cut, whole))
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_command_refuses(desk, capsys):
    assert memorisation("fresh", "all") == 0
    assert memorisation("fresh", "few", "--limit", "2") == 0
    members = ["--members", "members.jsonl", "--out", "x"]
    assert main(["eval", "memorisation", "fresh", *members]) == 0  # members alone will do
    assert "auc" not in json.loads((desk / "x/metrics.json").read_text())
    capsys.readouterr()
    (desk / "bad.jsonl").write_text("{}\n")
    for more, said in (
        (("--retain-log", "few"), "of other texts"),
        (("--retain-log", "none"), "no such evaluation log"),
        (("--retain-log", "bad.jsonl"), "not an evaluation log"),
        (("--min-k", "2"), "--min-k."),
    ):
        assert memorisation("fresh", "y", *more) == 2
        assert said in " ".join(capsys.readouterr().err.split())
        assert not (desk / "y.part").exists()
