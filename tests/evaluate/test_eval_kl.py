"""KL on completions: against logits, against itself, streamed, resumed; its intervals."""

from __future__ import annotations

import contextlib
import json
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import zoo
from helpers import command_line, random_sequences, tiny_llama

from kfade.cli import main
from kfade.data.batches import make_batches
from kfade.errors import InputError
from kfade.evaluate.divergence import (
    Outputs,
    divergences,
    grouped,
    outputs,
    rounded,
    summarise_divergence,
    token_strings,
)
from kfade.evaluate.log import read_log
from kfade.evaluate.uncertainty import bootstrap
from kfade.method.update import Update
from kfade.runs.evaluation import load_evaluated


def small_update(model, size: float, seed: int = 1) -> Update:
    generator = torch.Generator().manual_seed(seed)
    return Update(
        {
            name: size * torch.randn(p.shape, generator=generator)
            for name, p in model.named_parameters()
            if "mlp" in name
        }
    )


def by_logits(base, edited, sequence) -> torch.Tensor:
    """Σ p (log p − log q) in float64 from the models' own logits, one sequence at a time."""
    tokens = torch.tensor([sequence.tokens])
    with torch.no_grad():
        log_p, log_q = (
            m(input_ids=tokens).logits[0].double().log_softmax(-1) for m in (base, edited)
        )
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    return torch.stack([kl[t - 1] for t, scored in enumerate(sequence.scored) if scored])


def in_memory(base, edited, sequences, group_tokens=20):
    """KL of every sequence by kfade, two models in memory."""
    groups = grouped(make_batches(sequences, budget=20), group_tokens)
    kl = divergences(
        groups,
        lambda number: outputs(base, groups[number], "base"),
        lambda: contextlib.nullcontext(edited),
    )
    found = dict(kl)
    return found


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # float32: what rounding of the logits themselves does to a KL of this size
    [(torch.float64, 1e-12), (torch.float32, 1e-6)],
)
def test_equals_the_direct_computation(dtype, tolerance):
    base, edited = tiny_llama(dtype), tiny_llama(dtype)
    small_update(base, 0.05).apply(edited)
    sequences = random_sequences(9)
    found = in_memory(base, edited, sequences)
    assert set(found) == set(range(9))
    for index, sequence in enumerate(sequences):
        direct = by_logits(base, edited, sequence)
        assert found[index].shape == direct.shape
        assert (found[index] - direct).abs().max() < tolerance
        assert direct.min() > 1e-5  # there is something to measure


def test_each_model_uses_its_own_head():
    base, edited = tiny_llama(), tiny_llama()
    with torch.no_grad():
        edited.lm_head.weight.mul_(1.3)
    (sequence,) = random_sequences(1)
    found = in_memory(base, edited, [sequence])[0]
    direct = by_logits(base, edited, sequence)
    assert torch.allclose(found, direct, rtol=1e-9, atol=0)
    assert direct.max() > 1e-3


def test_zero_for_the_model_with_itself():
    model = tiny_llama(torch.float32)
    found = in_memory(model, model, random_sequences(9))
    assert all(values.abs().max() < 1e-12 for values in found.values())


def test_an_update_gives_what_two_models_give_and_leaves_the_model(model):
    update = small_update(model, 0.05)
    edited = tiny_llama()
    update.apply(edited)
    sequences = random_sequences(9)
    groups = grouped(make_batches(sequences, budget=20), 12)
    assert len(groups) > 2
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    kl = divergences(
        groups,
        lambda number: outputs(model, groups[number], "base"),
        lambda: update.applied_to(model),
    )
    found = dict(kl)
    direct = in_memory(model, edited, sequences)
    assert all(torch.equal(found[i], direct[i]) for i in direct)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_streamed_equals_in_memory(tmp_path):
    base, edited = tiny_llama(), tiny_llama(seed=3)
    sequences = random_sequences(9)
    groups = grouped(make_batches(sequences, budget=20), 12)
    for number, group in enumerate(groups):
        outputs(base, group, "base").save(tmp_path / f"{number}.safetensors")
    head = outputs(base, [], "base").head
    kl = divergences(
        groups,
        lambda n: Outputs.load(tmp_path / f"{n}.safetensors", head, groups[n]),
        lambda: contextlib.nullcontext(edited),
    )
    found = dict(kl)
    direct = in_memory(base, edited, sequences)
    # Not to the bit: what comes from a file lies elsewhere in memory, and is summed otherwise.
    assert all(torch.allclose(found[i], direct[i], rtol=1e-9, atol=0) for i in direct)


def test_what_is_done_is_not_computed_again():
    model, sequences = tiny_llama(), random_sequences(9)
    groups = grouped(make_batches(sequences, budget=20), 12)
    first = set(groups[0][0].id_B.tolist())
    asked = []

    def base(number):
        asked.append(number)
        return outputs(model, groups[number], "base")

    done = {i for batch in groups[0] for i in batch.id_B.tolist()}
    assert first <= done
    found = dict(divergences(groups, base, lambda: contextlib.nullcontext(model), done=done))
    assert asked == list(range(1, len(groups)))
    assert set(found) == set(range(9)) - done


def test_groups_hold_all_batches_within_their_size():
    batches = make_batches(random_sequences(20), budget=20)
    groups = grouped(batches, 15)
    assert [batch for group in groups for batch in group] == batches
    for group in groups:
        assert len(group) == 1 or sum(batch.loss_tokens for batch in group) <= 15
    assert len(grouped(batches, 10**9)) == 1


def test_outputs_that_are_not_finite_are_refused():
    base, edited = tiny_llama(), tiny_llama()
    with torch.no_grad():
        edited.model.layers[0].mlp.up_proj.weight.fill_(float("nan"))
    with pytest.raises(InputError, match="are not finite"):
        in_memory(base, edited, random_sequences(3))


@pytest.mark.slow
def test_the_interval_covers():
    """200 repeats: completions of a skewed distribution; the interval of the mean per token."""
    hits = 0
    for repeat in range(200):
        draws = np.random.default_rng(repeat)
        kl = draws.gamma(2.0, 0.5, 80)  # mean 1
        tokens = draws.integers(5, 50, 80)
        items = {
            str(i): {"kl": k, "tokens": int(n), "token_kl": [k] * int(n)}
            for i, (k, n) in enumerate(zip(kl.tolist(), tokens, strict=True))
        }
        figure = summarise_divergence(items, seed=0, resamples=300)["kl_per_token"]
        hits += figure["low"] <= 1.0 <= figure["high"]
    assert 0.90 <= hits / 200 <= 0.99


def test_bootstrap_of_a_constant_and_of_a_pair():
    (constant,) = bootstrap(lambda chosen: [3.0], 5, seed=0)
    assert constant == {"value": 3.0, "low": 3.0, "high": 3.0}
    values = np.array([0.0, 1.0])  # a resample's mean is 0, 1/2 or 1, each end one time in four
    (pair,) = bootstrap(lambda chosen: [values[chosen].mean()], 2, seed=0)
    assert pair == {"value": 0.5, "low": 0.0, "high": 1.0}
    again = bootstrap(lambda chosen: [values[chosen].mean()], 2, seed=0)
    assert again == [pair]


def test_summary_by_hand():
    items = {
        "0": {"kl": 0.1, "tokens": 1, "token_kl": [0.1]},
        "1": {"kl": 0.4, "tokens": 3, "token_kl": [0.2, 0.9, 0.1]},
    }
    result = summarise_divergence(items)
    assert result["kl_per_token"]["value"] == pytest.approx((0.1 + 3 * 0.4) / 4)
    assert result["kl_per_completion"]["value"] == pytest.approx(0.25)
    assert result["quantiles"]["50"]["value"] == pytest.approx(0.25)
    assert result["quantiles"]["25"]["value"] == pytest.approx(0.175)
    assert (result["completions"], result["tokens"]) == (2, 4)
    assert [entry["item"] for entry in result["worst"]] == [1, 0]
    assert [t["position"] for t in result["worst"][0]["tokens"]] == [1, 0, 2]
    assert result["kl_per_token"]["low"] == pytest.approx(0.1)
    assert result["kl_per_token"]["high"] == pytest.approx(0.4)


def test_rounding_and_words():
    assert rounded(torch.tensor([0.000123456, 2.0])) == [0.0001235, 2.0]
    tokenizer = zoo.tokenizer()
    assert token_strings(tokenizer, 7, [8, 9]) == [" b", " c"]


# ---- the command


@pytest.fixture
def desk(tmp_path, monkeypatch) -> Path:
    """A base model, an edited one, their update, and instructions; as working folder."""
    base, edited = (zoo.tiny("llama", dtype=torch.float32) for _ in range(2))
    update = small_update(base, 0.05)
    update.save(tmp_path / "update.safetensors")
    update.apply(edited)
    for name, model in (("base", base), ("edited", edited)):
        zoo.save(tmp_path / name, model)
    rows = [{"instruction": f"{x} {y}", "input": ""} for x in "abcde" for y in "fg"]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def kl(*more: str, out: str = "out") -> int:
    given = ["--prompts", "p.jsonl", "--max-new-tokens", "6", "--out", out]
    return main(command_line(["eval", "kl", "base", *given], more))


def same_items(first: dict, second: dict) -> None:
    """Equal words in equal order, and KLs equal but for rounding."""
    assert list(first) == list(second)
    for name, item in first.items():
        other = second[name]
        assert item["strings"] == other["strings"]
        assert item["kl"] == pytest.approx(other["kl"], rel=1e-5)
        assert item["token_kl"] == pytest.approx(other["token_kl"], rel=1e-3)


UPDATE = ("--update", "update.safetensors")


def test_command_writes_what_it_promises(desk, capsys):
    assert kl(*UPDATE, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    names = {path.name for path in (desk / "out").iterdir()}
    assert names == {"items.jsonl", "completions.jsonl", "metrics.json", "manifest.json"}
    metrics = json.loads((desk / "out/metrics.json").read_text())
    assert {**metrics, "out": "out"} == printed
    log = read_log(desk / "out/items.jsonl")
    assert len(log.items) == metrics["completions"] == 10
    assert metrics["max_new_tokens"] == 6
    assert metrics["kl_per_token"]["low"] < metrics["kl_per_token"]["value"]
    for item in log.items.values():
        assert len(item["strings"]) == len(item["token_kl"]) == item["tokens"] <= 6
        assert item["kl"] == pytest.approx(np.mean(item["token_kl"]), rel=1e-3)
    manifest = json.loads((desk / "out/manifest.json").read_text())
    assert manifest["kind"] == "eval"
    assert manifest["config"]["update"] == "update.safetensors"
    assert manifest["base_sha256"] != manifest["edited_sha256"]


def test_command_in_memory_and_streamed_agree(desk, capsys):
    assert kl(*UPDATE, out="one") == 0
    assert kl("--edited", "edited", out="two") == 0
    one, two = (read_log(desk / name / "items.jsonl").items for name in ("one", "two"))
    same_items(one, two)
    assert "nats per token" in capsys.readouterr().err
    assert not list(desk.glob("two/**/*.safetensors"))
    assert kl("--edited", "base", out="three") == 0
    itself = json.loads((desk / "three/metrics.json").read_text())
    assert itself["kl_per_token"]["high"] < 1e-12


def test_command_resumes_to_the_same(desk, monkeypatch):
    assert kl(*UPDATE, out="whole") == 0
    for more, stopped in ((UPDATE, 4), (("--edited", "edited"), 7)):
        out = f"cut{stopped}"
        calls = []

        def stop(*arguments, calls=calls, stopped=stopped):
            calls.append(1)
            if len(calls) > stopped:
                raise KeyboardInterrupt
            return token_strings(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr("kfade.runs.eval_kl.token_strings", stop)
            assert kl(*more, out=out) == 130
        log = read_log(desk / f"{out}.part/state/items.jsonl", partial=True)
        assert len(log.items) == stopped
        assert kl(*more, out=out) == 2  # --resume has to be said
        assert kl(*more, "--resume", out=out) == 0
        whole, cut = (read_log(desk / name / "items.jsonl") for name in ("whole", out))
        same_items(cut.items, whole.items)
        for figure in ("value", "low", "high"):
            ours, theirs = (log.aggregate["kl_per_token"][figure] for log in (cut, whole))
            assert ours == pytest.approx(theirs, rel=1e-6)


def test_what_lies_there_of_other_texts_is_not_used_again(desk, monkeypatch):
    """Interrupted before the first item, resumed with other prompts of the same length."""
    streamed = ("--edited", "edited", "--completions", "kept")

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("kfade.runs.eval_kl.token_strings", stop)
        assert kl(*streamed) == 130
    assert list(desk.glob("out.part/state/base-*.safetensors"))
    (desk / "kept/completions.jsonl").unlink()
    rows = [{"instruction": f"{x} {y}", "input": ""} for x in "hijkl" for y in "mn"]
    (desk / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert kl(*streamed, "--resume") == 0
    assert kl("--edited", "edited", out="anew") == 0
    cut, anew = (read_log(desk / name / "items.jsonl") for name in ("out", "anew"))
    same_items(cut.items, anew.items)


def test_two_models_are_never_in_memory_together(desk, monkeypatch):
    seen = []

    def watched(*arguments, **named):
        assert all(model() is None for model in seen), "the base model is still there"
        subject = load_evaluated(*arguments, **named)
        seen.append(weakref.ref(subject.model))
        return subject

    for module in ("evaluation", "eval_kl"):
        monkeypatch.setattr(f"kfade.runs.{module}.load_evaluated", watched)
    assert kl("--edited", "edited") == 0
    assert len(seen) == 2


def test_completions_are_kept_and_used_again(desk, capsys, monkeypatch):
    assert kl(*UPDATE, "--completions", "kept", out="one") == 0

    def refuse(*arguments, **named):
        raise AssertionError("generated again")

    monkeypatch.setattr("kfade.evaluate.completions.generate", refuse)
    assert kl("--edited", "edited", "--completions", "kept", out="two") == 0
    assert kl("--quantise", "int4", "--completions", "kept", out="three") == 0
    assert json.loads((desk / "three/metrics.json").read_text())["kl_per_token"]["value"] > 1e-6
    capsys.readouterr()
    assert kl(*UPDATE, "--completions", "kept", "--limit", "3", out="four") == 2
    assert "of other prompts" in capsys.readouterr().err
    arguments = ["--prompts", "p.jsonl", "--max-new-tokens", "6", "--out", "five"]
    command = ["eval", "kl", "edited", *arguments, *UPDATE, "--completions", "kept"]
    assert main(command) == 2
    assert "completions of another model" in capsys.readouterr().err
    assert not (desk / "five.part").exists()


def test_command_refuses(desk, capsys):
    other = zoo.tiny("llama", dtype=torch.float32)
    other.resize_token_embeddings(40, mean_resizing=False)
    zoo.save(desk / "other", other)
    words = zoo.tokenizer()
    words.add_tokens(["another"])
    zoo.tiny("llama", dtype=torch.float32).save_pretrained(desk / "words")
    words.save_pretrained(desk / "words")
    for more, said in (
        ((), "the edited model is missing or given twice"),
        ((*UPDATE, "--edited", "edited"), "the edited model is missing or given twice"),
        (("--edited", "words"), "its vocabulary differs from MODEL's"),
        (("--edited", "other"), "its vocabulary differs from MODEL's"),
        (("--edited", "none"), "could not be loaded"),
        (("--update", "none"), "no such update"),
        ((*UPDATE, "--quantise", "int2"), "give int8 or int4"),
        (
            (*UPDATE, "--max-new-tokens", "32"),
            "and with 32 new ones over the model's window of 32; sh",
        ),
        ((*UPDATE, "--template", "chat"), "no chat template"),
    ):
        assert kl(*more, out="refused") == 2, more
        assert said in " ".join(capsys.readouterr().err.split())
        assert not (desk / "refused.part").exists()  # seen before any work
