"""The training loop: what it leaves alone, what its steps depend on, and how it goes on."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
import zoo
from baselines_worker import (
    FORGET,
    NAMES,
    RETAIN,
    SETS,
    dense,
    difference,
    lora,
    method_of,
    run,
    same,
    settings,
)
from helpers import Snapshot, Tripwire, tiny_llama
from torch.nn.functional import linear

from kfade.baselines import methods, rmu, training
from kfade.baselines.checkpoint import Checkpoint, keep
from kfade.baselines.loop import _net, train
from kfade.baselines.references import References
from kfade.baselines.settings import rate, steps_per_epoch
from kfade.baselines.sophia import Sophia
from kfade.baselines.training import _draw
from kfade.baselines.weights import LowRank
from kfade.data.batches import make_batches
from kfade.errors import InputError
from kfade.method.update import Update
from kfade.models.head import read_head
from kfade.models.layers import find_targets
from kfade.models.weights import digest_weights


@pytest.mark.parametrize("name", NAMES)
def test_a_run_changes_an_update_and_not_the_model(name):
    model = tiny_llama(layers=3)
    before = Snapshot.of(model)
    update = run(name, model, evaluate_every=2)
    assert not before.differences(model)
    assert any(delta.abs().max() > 0 for delta in update.deltas.values())
    curve = update.provenance["curve"]
    assert [row["step"] for row in curve] == [0, 2, 4, 6]
    assert curve[0]["retain_kl"] == 0
    assert curve[-1]["retain_kl"] > 0
    assert update.provenance["kept_step"] == 6
    assert update.fits_base(model)


@pytest.mark.parametrize("name", ["ga", "gd", "kl-min", "npo", "npo-sam", "soul", "elm"])
def test_a_run_lowers_the_probability_of_forget_text(name):
    model = tiny_llama(layers=3)
    still, moved = (
        run(name, model, settings=settings(lr=lr, steps=8, optimizer=optimizer)).provenance["curve"]
        for lr in (0.0, 1e-2)
        for optimizer in (method_of(name, model).defaults.optimizer,)
    )
    assert still[-1]["forget_loss"] == still[0]["forget_loss"]  # nothing changes by itself
    assert still[-1]["retain_kl"] == 0
    assert moved[-1]["forget_loss"] > moved[0]["forget_loss"] + 0.1


@pytest.mark.parametrize("name", ["simnpo", "wga", "satimp", "undial"])
def test_a_run_forgets_what_is_memorised(name):
    # Where answers are unlikely their gradients fade; so first learn them.
    model = tiny_llama(layers=3)
    learn = [methods.likelihood("forget", 1.0)]
    plain = settings(lr=3e-2, steps=60, weight_decay=0.0)
    train(model, learn, dense(model), SETS, plain).apply(model)
    curve = run(name, model, settings=settings(steps=20)).provenance["curve"]
    assert curve[0]["forget_loss"] < 0.5
    assert curve[-1]["forget_loss"] > 2 * curve[0]["forget_loss"]


def test_rmu_steers_and_holds():
    model = tiny_llama(layers=3)
    vector_D = rmu.control_vector(8, 6.5, seed=0)
    block = rmu.find_block(model, 1)
    forget, retain = (make_batches(s, budget=999)[0] for s in (FORGET, RETAIN))
    with torch.no_grad():
        base_PD = rmu.live_output(model, block, retain)

    def distances(update) -> tuple[float, float]:
        """Of forget text to the vector, of retain text to where it was."""
        with torch.no_grad(), update.applied_to(model):
            steered, held = (rmu.live_output(model, block, b) for b in (forget, retain))
        return (steered - vector_D).norm().item(), (held - base_PD).norm().item()

    plain = settings(lr=3e-2, steps=40, warm_up=0, decay=False)
    updates = {}
    for weight in (0.0, 1200.0):
        method = methods.rmu(model, layer=1, retain_weight=weight)
        weights = dense(model, method.trains)
        updates[weight] = train(model, method.terms, weights, SETS, plain)
    assert set(updates[0.0].deltas) == set(method.trains)
    at_start = distances(Update({}))
    assert distances(updates[0.0])[0] < 0.8 * at_start[0]
    assert distances(updates[1200.0])[1] < 0.1 * distances(updates[0.0])[1]


@pytest.mark.parametrize("make", [dense, lora])
@pytest.mark.parametrize(("forward_at", "backward_at"), [(60, 0), (0, 30)])
def test_an_exception_leaves_the_model_as_it_was(make, forward_at, backward_at):
    model = tiny_llama()
    mlp = model.model.layers[0].mlp
    mlp.act_fn = Tripwire(mlp.act_fn, forward_at=forward_at, backward_at=backward_at)
    before = Snapshot.of(model)
    with pytest.raises(RuntimeError, match="tripped"):
        run("kl-min", model, make(model), settings=settings(steps=50))
    assert not before.differences(model)


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(name, tmp_path):
    model, path = tiny_llama(layers=3), tmp_path / "state.safetensors"

    def keep_second(checkpoint, update):
        if checkpoint.curve[-1]["step"] == 4:
            checkpoint.save(path)

    # A KL budget, so that what is kept may lie before the interruption.
    budget = {"evaluate_every": 2, "max_kl": 0.05}
    whole = run(name, model, on_evaluation=keep_second, **budget)
    resumed = run(name, model, start=Checkpoint.load(path), **budget)
    assert same(resumed, whole)
    assert resumed.provenance == whole.provenance
    fresh = run(name, model, seed=1, **budget)  # the comparison can tell runs apart
    assert not same(fresh, whole)


@pytest.mark.parametrize("name", NAMES)
def test_pieces_of_a_batch_do_not_change_its_gradient(name, monkeypatch):
    model = tiny_llama(layers=3)
    own = lora(model, dropout=0.0) if name == "elm" else None
    small_own = lora(model, dropout=0.0) if name == "elm" else None
    # SGD: Adam would blow up rounding where a gradient is nearly zero.
    plain = settings(lr=1e-4, optimizer=torch.optim.SGD, steps=3)
    whole = run(name, model, own, settings=plain)
    # And base outputs computed step by step, each forgotten at once.
    monkeypatch.setattr(training, "References", partial(References, ahead=1, limit=0))
    pieces = run(name, model, small_own, settings=plain, batch_tokens=5)
    assert difference(pieces, whole) < 1e-8
    assert whole.deltas


def test_a_step_is_the_mean_over_its_batches():
    model = tiny_llama()
    forget, retain = FORGET[:4], RETAIN[:4]
    plain = {"lr": 1.0, "steps": 1, "warm_up": 0, "decay": False, "optimizer": torch.optim.SGD}
    sets = {"forget": forget, "retain": retain}
    two = run("npo", model, **sets, settings=settings(batch=2, weight_decay=0.0, **plain))
    halves = [_draw(sets, settings(batch=2, accumulate=2), 0)[i] for i in range(2)]
    assert sorted(halves[0]["forget"] + halves[1]["forget"]) == [0, 1, 2, 3]
    alone = [
        run(
            "npo",
            model,
            forget=[forget[i] for i in half["forget"]],
            retain=[retain[i] for i in half["retain"]],
            settings=settings(batch=2, accumulate=1, weight_decay=0.0, **plain),
        )
        for half in halves
    ]
    for name, delta in two.deltas.items():
        mean = (alone[0].deltas[name] + alone[1].deltas[name]) / 2
        assert torch.allclose(delta, mean, rtol=1e-9, atol=1e-12), name


def test_clipping_bounds_the_gradient():
    model = tiny_llama()
    plain = {"lr": 1.0, "steps": 1, "warm_up": 0, "decay": False, "optimizer": torch.optim.SGD}
    clipped = run("ga", model, settings=settings(clip=0.01, weight_decay=0.0, **plain))
    length = sum(d.square().sum() for d in clipped.deltas.values()).sqrt().item()
    assert length == pytest.approx(0.01, rel=1e-4)


def test_weight_decay_is_for_matrices_only():
    # Gradients of zero, by a term of weight 0: what moves is decayed.
    model = tiny_llama()
    terms = [methods.likelihood("forget", 0.0)]
    plain = settings(lr=0.1, steps=1, warm_up=0, decay=False, weight_decay=0.5)
    update = train(model, terms, dense(model), SETS, plain)
    for name, parameter in model.named_parameters():
        expected = -0.05 * parameter if parameter.ndim > 1 else torch.zeros_like(parameter)
        assert torch.allclose(update.deltas[name], expected, atol=1e-15), name


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, Sophia])
def test_small_steps_of_a_bfloat16_model_add_up(optimizer):
    model = tiny_llama(torch.bfloat16)
    name = "model.layers.0.mlp.up_proj.weight"
    tiny = settings(lr=1e-6, steps=5, warm_up=0, decay=False, optimizer=optimizer)
    update = run("ga", model, dense(model, [name]), settings=tiny)
    delta = update.deltas[name]
    assert delta.dtype == torch.float32
    assert 1e-6 < delta.abs().max() < 1e-5
    # None of it would have been there in bfloat16: one step is under half a unit in the last place.
    weight = model.get_parameter(name).detach()
    large = weight.abs() > 0.1
    assert torch.equal((weight - 1e-6)[large], weight[large])
    assert (delta[large] != 0).any()


def test_a_tied_head_is_measured_by_two_heads():
    model = zoo.tiny("gpt2")  # its head is its embeddings
    names = [name for name, _ in model.named_parameters()]
    assert "lm_head.weight" not in names
    forget, retain = zoo.sequences((6, 5, 4), seed=1), zoo.sequences((7, 6, 3), seed=2)
    held_out = zoo.sequences((6, 4), seed=3)
    with zoo.Double():
        update = train(
            model,
            methods.gradient_difference().terms,
            dense(model),
            {"forget": forget, "retain": retain, "held_out": held_out},
            settings(),
        )
        assert update.deltas["transformer.wte.weight"].abs().max() > 0
        total = tokens = 0
        for sequence in held_out:
            inputs = torch.tensor([sequence.tokens])
            with torch.no_grad():
                log_p = model(input_ids=inputs).logits[0].log_softmax(-1)
                with update.applied_to(model):
                    log_q = model(input_ids=inputs).logits[0].log_softmax(-1)
            kl = (log_p.exp() * (log_p - log_q)).sum(-1)
            total += sum(kl[t - 1].item() for t, flag in enumerate(sequence.scored) if flag)
            tokens += sequence.loss_tokens
    assert update.provenance["curve"][-1]["retain_kl"] == pytest.approx(total / tokens, rel=1e-6)


# Low-rank changes


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi"])
def test_low_rank_changes_are_their_dense_update(family):
    model = zoo.tiny(family)
    change = lora(model)
    inputs = torch.tensor([[3, 9, 4, 7]])
    with torch.no_grad():
        base = model(input_ids=inputs).logits
        for name, tensor in change.tensors.items():
            if name.endswith("B"):
                assert not tensor.any()
                tensor.normal_(generator=torch.Generator().manual_seed(1))
        with change.training():
            hooked = model(input_ids=inputs).logits
            with change.at_base():
                assert torch.equal(model(input_ids=inputs).logits, base)
        update = Update(change.deltas())
        with update.applied_to(model):
            merged = model(input_ids=inputs).logits
    assert (hooked - base).norm() > 0.1 * base.norm()
    assert torch.allclose(hooked, merged, atol=1e-5)  # norms compute in float32
    assert any("attn" in name or "attention" in name for name in update.deltas)


def test_dropout_is_there_in_training_only_and_keyed():
    model = tiny_llama()
    change = lora(model, dropout=0.5)
    inputs = torch.tensor([[3, 9, 4, 7]])
    with torch.no_grad():
        for name, tensor in change.tensors.items():
            if name.endswith("B"):
                tensor.fill_(0.5)
    with change.training():

        def logits(seed: int) -> torch.Tensor:
            change.reseed(seed)
            return model(input_ids=inputs).logits.detach()

        assert torch.equal(logits(1), logits(1))
        assert not torch.equal(logits(1), logits(2))
        with torch.no_grad():
            assert torch.equal(logits(1), logits(2))


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers.*")
def test_low_rank_changes_equal_pefts():
    peft = pytest.importorskip("peft")
    model, wrapped = tiny_llama(torch.float32), tiny_llama(torch.float32)
    target = find_targets(model, pattern="model.layers.1.mlp.down_proj.weight")
    change = LowRank(model, target, rank=3, alpha=6, dropout=0.0, seed=0)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=r".*layers\.1\.mlp\.down_proj")
    theirs = peft.get_peft_model(wrapped, config)
    a, b = change.tensors.values()
    with torch.no_grad():
        b.normal_()
        own = dict(theirs.named_parameters())
        for name, parameter in own.items():
            if "lora_" in name:
                parameter.copy_(a if "lora_A" in name else b)
    inputs = torch.tensor([[3, 9, 4, 7]])
    with change.training():
        ours = model(input_ids=inputs).logits
        ours.square().sum().backward()
    expected = theirs(input_ids=inputs).logits
    expected.square().sum().backward()
    assert torch.allclose(ours, expected, atol=1e-5)
    grads = {n: p.grad for n, p in own.items() if p.grad is not None}
    assert len(grads) == 2
    for name, grad in grads.items():
        assert torch.allclose(a.grad if "lora_A" in name else b.grad, grad, rtol=1e-3, atol=1e-4)
    merged = theirs.merge_and_unload().get_parameter(target[0].name)
    delta = change.deltas()[target[0].name]
    assert torch.allclose(model.get_parameter(target[0].name) + delta, merged, atol=1e-6)


# Base outputs, schedule, what is kept, what is refused


def test_base_outputs_are_the_base_models_in_the_middle_of_training(monkeypatch):
    model, seen = tiny_llama(), []

    class Watched(References):
        def compute(self, coming):
            seen.append(digest_weights(model, [n for n, _ in model.named_parameters()]))
            super().compute(coming)

    monkeypatch.setattr(training, "References", partial(Watched, ahead=1, limit=0))
    base = digest_weights(model, [n for n, _ in model.named_parameters()])
    run("npo", model)
    assert len(seen) >= 6
    assert set(seen) == {base}


def test_base_outputs_are_computed_once():
    model, seen = tiny_llama(), []
    method = methods.npo()
    counted = methods.preference(0.1, 1.0)

    def reference(net, sequence):
        seen.append(sequence.tokens)
        return counted.reference(net, sequence)

    terms = [replace(counted, reference=reference), method.terms[1]]
    train(model, terms, dense(model), SETS, settings(steps=12))
    assert len(seen) == len(set(seen)) == len(FORGET)


def test_the_rate_rises_and_falls():
    made = settings(lr=8.0, steps=6, warm_up=2)
    assert [rate(made, s) for s in range(6)] == [4, 8, 8, 6, 4, 2]
    made = settings(lr=8.0, steps=6, warm_up=2, decay=False)
    assert [rate(made, s) for s in range(6)] == [4, 8, 8, 8, 8, 8]
    assert rate(settings(lr=8.0, steps=3, warm_up=0), 0) == 8
    assert (steps_per_epoch(64, 8, 2), steps_per_epoch(7, 8, 1)) == (4, 1)


def test_what_is_kept():
    rows = [
        {"step": 0, "forget_loss": 9.0, "retain_kl": 0.0},  # before training: never
        {"step": 1, "forget_loss": 2.0, "retain_kl": 0.1},
        {"step": 2, "forget_loss": 4.0, "retain_kl": 0.3},
        {"step": 3, "forget_loss": 3.0, "retain_kl": 0.2},
    ]
    assert keep(rows, None) == 3
    assert keep(rows, 0.2) == 3
    assert keep(rows, 0.15) == 1
    assert keep(rows, 1.0) == 2
    assert keep(rows, 0.01) == 1  # none within: the nearest


def test_a_budget_keeps_an_earlier_update():
    model = tiny_llama()
    updates = {}

    def note(checkpoint, update):
        updates[checkpoint.curve[-1]["step"]] = update

    kept = run("ga", model, evaluate_every=1, max_kl=0.02, on_evaluation=note)
    step = kept.provenance["kept_step"]
    assert 1 <= step < 6
    assert same(kept, updates[step])
    assert updates[6].provenance["curve"][-1]["retain_kl"] > 0.02


def test_a_run_ends_where_its_evaluation_says_so():
    model = tiny_llama(layers=3)
    updates = {}

    def enough(checkpoint, update):
        updates[checkpoint.curve[-1]["step"]] = update
        return checkpoint.curve[-1]["step"] == 4

    stopped = run("gd", model, evaluate_every=2, on_evaluation=enough)
    assert [row["step"] for row in stopped.provenance["curve"]] == [0, 2, 4]
    assert stopped.provenance["kept_step"] == 4
    assert same(stopped, updates[4])
    whole = run("gd", model, evaluate_every=2)
    assert whole.provenance["curve"][:3] == stopped.provenance["curve"]  # the same run, cut short
    assert not same(stopped, whole)


def test_forget_probability_is_a_mean_over_answers():
    model = tiny_llama(layers=3)
    update = run("gd", model)

    def slowly() -> tuple[float, float]:
        """(mean over answers, exp(−mean loss per token)), one sequence at a time."""
        own, tokens = [], []
        for sequence in FORGET:
            (batch,) = make_batches([sequence])
            with torch.no_grad():
                logits = model(input_ids=batch.input_BT, use_cache=False).logits
            log_p = logits.log_softmax(-1).gather(2, batch.target_BT[..., None])[..., 0]
            tokens += batch.at_loss(log_p).tolist()
            own.append(batch.at_loss(log_p).mean().exp().item())
        return sum(own) / len(own), torch.tensor(tokens).mean().exp().item()

    for at, row in ((Update({}), 0), (update, -1)):
        with at.applied_to(model):
            of_answers, of_tokens = slowly()
        told = update.provenance["curve"][row]["forget_probability"]
        assert told == pytest.approx(of_answers, rel=1e-9)
        assert abs(told / of_tokens - 1) > 0.01  # not the probability of the mean token


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"forget": []}, "the forget set is empty"),
        ({"held_out": []}, "the held-out retain set is empty"),
        ({"steps": 0}, "--steps 0: give 1 or more"),
        ({"lr": float("nan")}, "--lr nan: give a finite number"),
        ({"warm_up": -1}, "--warm-up -1: give a finite number, 0 or more"),
        ({"evaluate_every": 0}, "--evaluate-every 0: give 1 or more"),
        ({"max_kl": 0.0}, r"--max-kl 0\.0: give a number above 0"),
        ({"lr": 1e200, "steps": 9}, r"step \d: the loss is not finite; lower --lr"),
    ],
)
def test_what_is_refused(change, message):
    model = tiny_llama()
    before = Snapshot.of(model)
    with pytest.raises(InputError, match=message):
        run("gd", model, **change)
    assert not before.differences(model)


def test_heads_are_copied_only_where_they_change():
    model = tiny_llama()
    head = read_head(model)
    whole = _net(model, dense(model))
    assert whole.base_head.linear is not head.linear
    part = _net(model, dense(model, ["model.layers.0.mlp.up_proj.weight"]))
    assert part.base_head.linear is head.linear
    x = torch.ones(1, 8, dtype=torch.float64)
    assert torch.equal(whole.base_head(x), linear(x, model.lm_head.weight))
