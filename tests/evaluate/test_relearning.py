"""Relearning: the training loop against plain PyTorch, what is measured, and models left alone."""

from __future__ import annotations

import copy
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
import zoo
from helpers import Snapshot, Tripwire, command_line, flat, random_sequences, tiny_llama
from zoo.rows import FORGET, RETAIN

from kfade.cli import main
from kfade.data.batches import draw_without_replacement
from kfade.errors import InputError
from kfade.evaluate.log import read_log
from kfade.evaluate.questions import Question
from kfade.evaluate.relearning import (
    AT,
    Examination,
    Figures,
    Tuning,
    attack,
    fine_tune,
)
from kfade.method.unlearn import unlearn
from kfade.method.update import Update
from kfade.models.masters import restored


def kept(model):
    """All weights as they were on leaving."""
    return restored(dict(model.named_parameters()))


def slow_loss(model, sequences):
    """Mean cross-entropy over all scored tokens, one whole sequence at a time."""
    total, count = 0.0, 0
    for sequence in sequences:
        logits = model(input_ids=torch.tensor([sequence.tokens])).logits[0].log_softmax(-1)
        for t, scored in enumerate(sequence.scored):
            if scored:
                total, count = total - logits[t - 1, sequence.tokens[t]], count + 1
    return total / count


@pytest.mark.parametrize("batch_tokens", [1, 10**6])
@pytest.mark.parametrize("warmup", [0, 3])
def test_fine_tuning_is_plain_adamw(batch_tokens, warmup):
    sequences = random_sequences(7)
    tuning = Tuning(5, 1e-2, 3, warmup, 0.1, batch_tokens, seed=4)
    model, plain = tiny_llama(), tiny_llama()
    seen = []
    fine_tune(model, sequences, tuning, seen.append)
    assert seen == [0, 1, 2, 3, 4, 5]
    optimizer = torch.optim.AdamW(plain.parameters(), weight_decay=0.1)
    for step in range(5):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (min(1, (step + 1) / 3) if warmup else 1)
        drawn = draw_without_replacement(7, 3, step, 4)
        optimizer.zero_grad()
        slow_loss(plain, [sequences[i] for i in drawn]).backward()
        optimizer.step()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-11), name
        assert ours.grad is None
        assert ours.requires_grad


def test_an_optimiser_step_is_one_pass_over_the_weights():
    """Not one for each of its operations, which took most of an attack's time on a CPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        fine_tune(tiny_llama(), random_sequences(2), Tuning(3, batch=2))
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["aten::_fused_adamw_"] == 3


def test_masters_keep_what_bfloat16_would_round_away():
    """20 steps of 1e-4 on weights of about 0.5: none is half a bfloat16's last place."""
    sequences = random_sequences(4)
    tuning = Tuning(20, 1e-4, 4, weight_decay=0.0)
    model, plain = tiny_llama(torch.bfloat16), tiny_llama(torch.bfloat16)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    name = "model.layers.0.mlp.up_proj.weight"
    large = base[name].abs() > 0.25  # 20 steps reach 2e-3, half a unit from 0.25 on is 5e-4
    fine_tune(model, sequences, tuning)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-4, weight_decay=0.0)
    for _ in range(20):
        optimizer.zero_grad()
        slow_loss(plain, sequences).backward()
        optimizer.step()
    naive = dict(plain.named_parameters())[name]
    ours = dict(model.named_parameters())[name]
    assert ours.dtype == torch.bfloat16
    assert torch.equal(naive[large], base[name][large])  # the trap is there
    assert (ours[large] != base[name][large]).float().mean() > 0.5


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"steps": 0}, "--steps 0: give 1 or more"),
        ({"batch": 0}, "--batch 0: give 1 or more"),
        ({"learning_rate": 0.0}, "--lr 0.0: give a positive"),
        ({"learning_rate": math.inf}, "--lr inf: give a positive"),
    ],
)
def test_settings_that_are_none(more, message):
    with pytest.raises(InputError, match=message):
        Tuning(**more)


def test_a_broken_loss_is_told(model):
    with torch.no_grad():
        model.lm_head.weight[3] = math.inf
    before = Snapshot.of(model)
    with pytest.raises(InputError, match="not finite at step 0 of fine-tuning"), kept(model):
        fine_tune(model, random_sequences(2), Tuning(2))
    assert before.differences(model) == []
    with pytest.raises(InputError, match="nothing to fine-tune on"):
        fine_tune(model, [], Tuning(2))


@pytest.fixture
def update(model, targets):
    return unlearn(
        model,
        forget=random_sequences(5, seed=1),
        held_out=random_sequences(3, seed=2),
        retain=random_sequences(6),
        **flat(targets=targets, kl=0.05),
    )


def test_an_attack_step_by_step(model, update):
    """Every figure against the same computed on copies; the model as it was, to the bit."""
    forget, held_out = random_sequences(5, seed=1), random_sequences(3, seed=2)
    data = random_sequences(6, seed=3)
    tuning = Tuning(4, 1e-2, 3, batch_tokens=10, seed=1)
    before = Snapshot.of(model)
    examine = Examination(model, forget=forget, held_out=held_out)
    found = attack(model, update, data, examine, tuning=tuning, at=[0, 2, 4])
    assert before.differences(model) == []
    assert [(m.state, m.step) for m in found] == [
        ("attacked", 0), ("attacked", 2), ("reapplied", 2), ("attacked", 4), ("reapplied", 4)
    ]  # fmt: skip

    def slow_figures(edited) -> dict[str, float]:
        kl, tokens, probabilities = 0.0, 0, []
        with torch.no_grad():
            for sequence in held_out:
                ids = torch.tensor([sequence.tokens])
                p, q = (m(input_ids=ids).logits[0].log_softmax(-1) for m in (model, edited))
                kept = [t - 1 for t, scored in enumerate(sequence.scored) if scored]
                kl += (p.exp() * (p - q)).sum(-1)[kept].sum().item()
                tokens += len(kept)
            probabilities = [math.exp(-slow_loss(edited, [s]).item()) for s in forget]
            loss = slow_loss(edited, forget).item()
            rights = [predicted(edited, s) for s in forget]
        return {
            "forget_loss": loss,
            "forget_probability": sum(probabilities) / len(forget),
            "exact_memorisation": sum(sum(r) / len(r) for r in rights) / len(forget),
            # The share after the last token that is not predicted.
            "extraction_strength": sum(
                len(list(itertools.takewhile(bool, reversed(r)))) / len(r) for r in rights
            )
            / len(forget),
            "retain_kl": kl / tokens,
        }

    def predicted(edited, sequence) -> list[bool]:
        best = edited(input_ids=torch.tensor([sequence.tokens])).logits[0].argmax(-1).tolist()
        kept = [t for t, scored in enumerate(sequence.scored) if scored]
        return [best[t - 1] == sequence.tokens[t] for t in kept]

    expected = []
    tuned = copy.deepcopy(model)
    update.apply(tuned)

    def on_step(step: int) -> None:
        if step in (0, 2, 4):
            expected.append(slow_figures(tuned))
            if step:
                again = copy.deepcopy(tuned)
                update.apply(again)
                expected.append(slow_figures(again))

    fine_tune(tuned, data, tuning, on_step)
    for measured, wanted in zip(found, expected, strict=True):
        assert measured.figures.values == pytest.approx(wanted, rel=1e-6)
        for name, (low, high) in measured.figures.intervals.items():
            assert low <= wanted[name] <= high
    # The head was trained too, and KL is from the base model's own.
    assert not torch.equal(tuned.lm_head.weight, model.lm_head.weight)


def test_the_edited_model_is_what_step_0_measures(model, update):
    examine = Examination(model, forget=random_sequences(5, seed=1), held_out=random_sequences(3))
    (first,) = attack(model, update, random_sequences(3), examine, at=[0], tuning=Tuning(1))
    with update.applied_to(model):
        assert first.figures == examine(model)
    assert first.figures.values != examine(model).values
    assert examine(model).values["retain_kl"] == 0


def test_the_control_has_no_update_to_reapply(model):
    examine = Examination(model, forget=random_sequences(5, seed=1))
    found = attack(
        model, Update({}), random_sequences(4), examine, at=[0, 1], tuning=Tuning(1, 1e-3)
    )
    assert [(m.state, m.step) for m in found] == [("attacked", 0), ("attacked", 1)]
    assert found[0].figures == examine(model)
    assert set(found[0].figures.values) == {
        "forget_loss", "forget_probability", "exact_memorisation", "extraction_strength"
    }  # fmt: skip


def test_fine_tuning_on_the_forgotten_brings_it_back(model, targets):
    """A model that knows its text forgets it, relearns it from the text, and not from another."""
    text, other, retain = (random_sequences(4, seed=s, longest=12) for s in (1, 5, 0))
    fine_tune(model, text + retain, Tuning(80, 1e-2))
    known = slow_loss(model, text).item()
    assert known < 0.5
    update = unlearn(
        model,
        forget=text,
        retain=retain[1:],
        held_out=retain[:1],
        **flat(targets=targets, until=known + 3.0),
    )
    examine = Examination(model, forget=text)
    tuning = Tuning(25, 2e-3)
    on = {
        name: attack(model, update, data, examine, at=[0, 25], tuning=tuning)
        for name, data in {"forget": text, "benign": other}.items()
    }
    loss = {
        name: {(m.state, m.step): m.figures.values["forget_loss"] for m in found}
        for name, found in on.items()
    }
    forgotten = loss["forget"]["attacked", 0]
    assert forgotten > known + 2.5  # there is something to bring back
    assert loss["forget"]["attacked", 25] < known + 1.0
    assert loss["benign"]["attacked", 25] > known + 2.0  # the control: other data do not
    assert loss["forget"]["reapplied", 25] > loss["forget"]["attacked", 25] + 0.3


def test_accuracy_by_hand(model):
    """A tokenizer of the zoo, a model of its vocabulary, questions whose answers it prefers."""
    model, tokenizer = zoo.tiny("llama"), zoo.tokenizer()
    questions = [Question("a b c", ("d", "e", "f g"), i % 3) for i in range(6)]
    examine = Examination(
        model, forget=zoo.sequences((5,)), questions=questions, tokenizer=tokenizer
    )
    figures = examine(model)
    start = tokenizer("Question: a b c Answer:").input_ids

    def per_token(choice: str) -> float:
        tokens = tokenizer(choice).input_ids
        ids = torch.tensor([start + tokens])
        with torch.no_grad():
            log_p = model(input_ids=ids).logits[0].log_softmax(-1)
        return sum(log_p[len(start) + i - 1, t].item() for i, t in enumerate(tokens)) / len(tokens)

    best = max(range(3), key=lambda i: per_token(questions[0].choices[i]))
    assert best in (0, 1, 2)
    # The same question six times with each answer right twice: any choice is right in a third.
    assert figures.values["forget_accuracy"] == pytest.approx(1 / 3)
    assert figures.values["forget_accuracy_letters"] == pytest.approx(1 / 3)
    right = [Question("a b c", ("d", "e", "f g"), best)]
    examine = Examination(model, forget=zoo.sequences((5,)), questions=right, tokenizer=tokenizer)
    assert examine(model).values["forget_accuracy"] == 1
    low, high = figures.intervals["forget_accuracy"]
    assert 0 <= low < 1 / 3 < high <= 1


def test_restored_when_training_trips(model):
    before = Snapshot.of(model)
    block = model.model.layers[1].mlp
    plain = block.act_fn
    block.act_fn = Tripwire(plain, backward_at=2)
    with pytest.raises(RuntimeError, match="tripped in backward"), kept(model):
        fine_tune(model, random_sequences(4), Tuning(3, 1e-2))
    block.act_fn = plain
    assert before.differences(model) == []


def test_steps_that_are_not_reached(model):
    with pytest.raises(InputError, match="--at 0,9: give steps from 0 to 4"):
        attack(model, Update({}), random_sequences(2), lambda m: Figures({}, {}),
               tuning=Tuning(4), at=[0, 9])  # fmt: skip


def test_the_papers_settings_are_the_defaults():
    assert (Tuning().steps, Tuning().learning_rate, Tuning().batch) == (200, 1e-5, 8)
    assert AT == (0, 25, 50, 100, 200)


# The command line

QUESTIONS = [{"question": "a b f", "choices": ["d e", "k l"], "answer": 0}]


def write_lines(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def files(tmp_path) -> dict[str, str]:
    model = str(tmp_path / "model")
    zoo.save(model)
    made = {
        "model": model,
        "forget": write_lines(tmp_path / "forget.jsonl", FORGET),
        "retain": write_lines(tmp_path / "retain.jsonl", RETAIN),
        "questions": write_lines(tmp_path / "questions.jsonl", QUESTIONS),
        "update": str(tmp_path / "run"),
    }
    arguments = [
        *("unlearn", model, "--forget", made["forget"], "--retain", made["retain"]),
        *("--out", made["update"], "--sequence-length", "8", "--kl", "0.05"),
    ]
    assert main(arguments) == 0
    return made


def command(files: dict[str, str], out: Path, *more: str) -> list[str]:
    given = [
        *("attack", files["model"], "--update", files["update"], "--forget", files["forget"]),
        *("--retain", files["retain"], "--questions", files["questions"], "--out", str(out)),
        *("--sequence-length", "8", "--steps", "4", "--lr", "1e-2", "--at", "0,2,4"),
    ]
    return command_line(given, more)


def both(files: dict[str, str]) -> list[str]:
    return ["--data", files["retain"], "--kind", "benign", "--data", files["forget"],
            "--kind", "forget"]  # fmt: skip


def test_an_attack_from_files(files, tmp_path, capsys):
    out = tmp_path / "attack"
    weights = (Path(files["model"]) / "model.safetensors").read_bytes()
    assert main(command(files, out, *both(files), "--json")) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (Path(files["model"]) / "model.safetensors").read_bytes() == weights
    assert {p.name for p in out.iterdir()} == {"attack.jsonl", "manifest.json", "metrics.json"}
    log = read_log(out / "attack.jsonl")
    assert log.header["benchmark"] == "attack"
    metrics = {"forget_loss", "forget_probability", "exact_memorisation", "extraction_strength",
               "retain_kl", "forget_accuracy", "forget_accuracy_letters"}  # fmt: skip
    assert set(log.header["base"]) == metrics
    assert log.header["base"]["retain_kl"] == 0
    rows = list(log.items.values())
    assert [(r["data"], r["state"], r["step"]) for r in rows] == [
        (kind, state, step)
        for kind in ("benign", "forget")
        for state, step in [
            ("attacked", 0), ("attacked", 2), ("reapplied", 2), ("attacked", 4), ("reapplied", 4)
        ]
    ]  # fmt: skip
    for row in rows:
        assert set(row["values"]) == set(row["intervals"]) == metrics
    # Step 0 is the edited model, whose figures the run has told.
    told = json.loads((Path(files["update"]) / "metrics.json").read_text())
    for start in (rows[0], rows[5]):
        assert start["values"]["forget_loss"] == pytest.approx(told["forget_loss"]["after"], 1e-5)
        assert start["values"]["retain_kl"] == pytest.approx(told["retain_kl"], rel=1e-4)
    assert log.header["base"]["forget_loss"] == pytest.approx(told["forget_loss"]["before"], 1e-5)
    assert printed["last"]["forget"]["attacked"] == rows[8]["values"]
    last = printed["last"]["forget"]["attacked"]["forget_loss"]
    assert last < rows[5]["values"]["forget_loss"]


def test_an_interrupted_attack_goes_on_after_its_finished_kinds(
    files, tmp_path, monkeypatch, capsys
):
    import kfade.runs.attacking as module

    assert main(command(files, tmp_path / "whole", *both(files))) == 0
    whole = read_log(tmp_path / "whole" / "attack.jsonl")
    real, calls = module.attack_model, []

    def tripped(*arguments, **named):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **named)

    out = tmp_path / "cut"
    monkeypatch.setattr(module, "attack_model", tripped)
    assert main(command(files, out, *both(files))) == 130
    assert not out.exists()
    path = Path(files["update"]) / "update.safetensors"
    kept = path.read_bytes()
    (-Update.load(path)).save(path)
    capsys.readouterr()
    assert main(command(files, out, *both(files), "--resume")) == 2
    assert "interrupted: the weights with --update; restore" in capsys.readouterr().err
    path.write_bytes(kept)
    assert main(command(files, out, *both(files), "--resume")) == 0
    assert len(calls) == 3
    resumed = read_log(out / "attack.jsonl")
    assert resumed.items == whole.items
    assert resumed.header == whole.header
    assert resumed.aggregate == whole.aggregate


def test_a_control_without_an_update(files, tmp_path):
    out = tmp_path / "control"
    arguments = [
        *("attack", files["model"], "--data", files["forget"], "--kind", "related"),
        *("--forget", files["forget"], "--steps", "2", "--at", "0,2", "--out", str(out)),
        *("--sequence-length", "8"),
    ]
    assert main(arguments) == 0
    log = read_log(out / "attack.jsonl")
    assert list(log.items) == ["related/attacked/0", "related/attacked/2"]
    assert log.items["related/attacked/0"]["values"] == log.header["base"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--data", "{retain}", "--data", "{forget}"), "give each --data a --kind of its own"),
        (("--data", "{retain}", "--kind", "other"), "--kind other: give benign, related or forget"),
        (("--data", "{retain}", "--at", "0,5"), "--at 0,5: give numbers from 0 to --steps 4"),
        (("--data", "{retain}", "--at", "x"), "--at x: give whole numbers"),
        (("--data", "{retain}", "--lr", "-1"), "--lr -1.0: give a positive"),
        (("--data", "missing.jsonl"), "missing.jsonl: no such file"),
    ],
)
def test_bad_options(files, tmp_path, capsys, more, message):
    capsys.readouterr()
    given = [word.format(**files) for word in more]
    assert main(command(files, tmp_path / "out", *given)) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))
