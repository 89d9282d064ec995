"""Blocks that run again in the backward pass: the same bits from less memory.

The curvature and gradients of a pass with recomputing are compared bit for bit with those without;
test_groups.py shows how fine a sieve that is.
"""

from __future__ import annotations

from collections import Counter
from functools import partial

import pytest
import torch
import zoo
from helpers import Snapshot, Tripwire, flat, random_sequences, same_bits, tiny_llama

import kfade
from kfade import EKFAC, KFAC, Diagonal, find_targets, make_batches, margin
from kfade.curvature.capture import capture
from kfade.curvature.draws import square_root_draw
from kfade.curvature.fit import pseudo_gradients
from kfade.curvature.passes import PendingInputs, run_pass
from kfade.curvature.product import gauss_newton_product
from kfade.curvature.recompute import recomputing
from kfade.method.gradient import forget_gradient
from kfade.models.head import hidden_states
from kfade.models.load import frozen

LENGTHS = (5, 9, 12, 7, 20)  # padded in batches of 30 positions


def bits(curvature) -> dict[str, torch.Tensor]:
    parts = ("q_out", "q_in", "eigenvalues")
    found = {(name, part): getattr(block, part)
             for name, block in curvature.blocks.items() for part in parts}  # fmt: skip
    return {key: tensor for key, tensor in found.items() if tensor is not None}


def all_same(first: dict, second: dict) -> bool:
    return list(first) == list(second) and all(same_bits(first[k], second[k]) for k in first)


# --- The same bits ------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [None, "1"], ids=["all", "upper"])
@pytest.mark.parametrize("family", sorted(zoo.FAMILIES))
def test_every_family_computes_the_same_bits(family, layers):
    model = zoo.tiny(family, torch.float32)
    targets = find_targets(model, layers=layers, joint_bias=zoo.FAMILIES[family].biases)
    batches = make_batches(zoo.sequences(LENGTHS), budget=30)
    assert not all(batch.full for batch in batches)
    before = Snapshot.of(model)
    plain, ours = (bits(EKFAC().fit(model, batches, targets, recompute=r)) for r in (False, True))
    assert all_same(plain, ours)
    plain, ours = (forget_gradient(model, batches, targets, margin, recompute=r)
                   for r in (False, True))  # fmt: skip
    assert all_same(plain, ours)
    assert before.differences(model) == []


@pytest.mark.parametrize("fit", [Diagonal, KFAC, EKFAC])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_every_fit_computes_the_same_bits_in_groups_too(fit, dtype):
    model = tiny_llama(dtype, layers=3)
    targets, batches = find_targets(model), make_batches(random_sequences(8), budget=20)
    memory = fit().peak_bytes(targets[:2])
    plain = fit().fit(model, batches, targets)
    for options in ({}, {"memory": memory}):
        ours = fit().fit(model, batches, targets, recompute=True, **options)
        assert all_same(bits(plain), bits(ours))
        assert ours.provenance == plain.provenance


def test_attention_can_be_targeted(model):
    targets = find_targets(model, pattern="*proj.weight")
    assert len(targets) > len(find_targets(model))
    batches = make_batches(random_sequences(4), budget=20)
    plain, ours = (bits(EKFAC().fit(model, batches, targets, recompute=r)) for r in (False, True))
    assert all_same(plain, ours)


def test_exact_products_and_whole_runs_are_the_same(model, targets):
    batches = make_batches(random_sequences(4), budget=20)
    delta = {target.name: torch.ones(target.shape, dtype=torch.float64) for target in targets}
    plain, ours = (gauss_newton_product(model, batches, targets, delta, recompute=r)
                   for r in (False, True))  # fmt: skip
    assert all_same(plain, ours)
    sets = {"forget": random_sequences(3, seed=2), "held_out": random_sequences(3, seed=1)}
    run = partial(kfade.unlearn, model, retain=random_sequences(6), **sets)
    options = {"kl": 0.02, "steps": 2, "refine": 1, "refine_sequences": 4, "batch_tokens": 20}
    first, second = (run(**flat(recompute=r, **options)) for r in (False, True))
    assert all_same(first.deltas, second.deltas)


# --- What runs, and when ------------------------------------------------------------------------


class Seen:
    """Sums that note what they are given, and in which order."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def begin(self, batch, together) -> None:
        self.events.append("batch")

    def on_input(self, target, a_BTI) -> None:
        self.events.append(f"input {target.name}")

    def on_gradient(self, target, g_BTO) -> None:
        self.events.append(f"gradient {target.name}")

    def tensors(self):
        return {}


def test_each_input_comes_once_right_before_the_gradients_of_its_block():
    model = tiny_llama(layers=4)
    targets = find_targets(model, layers="1-3")
    batches = make_batches(random_sequences(4), budget=20)
    pseudo = pseudo_gradients(square_root_draw, 0, 0)
    runs: Counter[tuple[int, bool]] = Counter()
    for index, block in enumerate(model.model.layers):
        block.self_attn.register_forward_hook(
            lambda *_, index=index: runs.update([(index, torch.is_grad_enabled())])
        )
    found, count = {}, len(batches)
    for recompute in (False, True):
        seen = Seen()
        with recomputing(model, targets, recompute):
            runs.clear()
            run_pass(model, batches, targets, seen, pseudo, "test")
        found[recompute] = seen.events
        assert [runs[index, True] for index in range(4)] == [count] * 4
        # Passes that look at the head and at causality run the lowest block, below every target,
        # as often as the others; a block that runs again has its first runs on top.
        first = [0, count, count, count] if recompute else [0] * 4
        assert [runs[index, False] - runs[0, False] for index in range(4)] == first
    gate, up, down = (
        f"model.layers.{{}}.mlp.{name}_proj.weight" for name in ("gate", "up", "down")
    )
    inputs = [f"input {name.format(i)}" for i in (1, 2, 3) for name in (gate, down)]
    gradients = [f"gradient {name.format(i)}" for i in (3, 2, 1) for name in (down, up, gate)]
    assert found[False] == ["batch", *inputs, *gradients] * len(batches)
    blocks = [[*inputs[2 * i : 2 * i + 2], *gradients[6 - 3 * i : 9 - 3 * i]] for i in (2, 1, 0)]
    assert found[True] == ["batch", *blocks[0], *blocks[1], *blocks[2]] * len(batches)


def test_an_input_waits_until_all_its_readers_have_it(targets):
    waiting: PendingInputs[str] = PendingInputs(targets)
    gate, up, down = targets[:3]
    assert (gate.input_of, waiting.readers[gate.input_of]) == (up.input_of, 2)
    waiting.put(gate, "of both")
    waiting.put(down, "of one")
    assert [waiting.take(target) for target in (down, up, gate)] == ["of one", "of both", "of both"]
    with pytest.raises(KeyError):
        waiting.take(up)


def test_a_pass_without_gradients_on_the_way_is_not_seen(model, targets):
    """An exact product runs the model forward once more before it goes back."""
    batches = make_batches(random_sequences(2), budget=100)
    pseudo, plain, seen = pseudo_gradients(square_root_draw, 0, 0), Seen(), Seen()

    def looking(head, batch, hidden_ND):
        with torch.no_grad():
            hidden_states(model, batch.input_BT)
        return pseudo(head, batch, hidden_ND)

    run_pass(model, batches, targets, plain, pseudo, "test")
    run_pass(model, batches, targets, seen, looking, "test")
    assert seen.events == plain.events


# --- Memory -------------------------------------------------------------------------------------


def kept_bytes(model, targets, shape: tuple[int, int], recompute: bool) -> int:
    """What autograd holds at the end of a forward pass: each storage once, and no parameter."""
    kept: dict[int, int] = {}
    alive = []  # nothing is freed, so that no address is used twice

    def pack(x):
        alive.append(x)
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
    seeing = capture(targets, on_gradient=lambda *seen: None)
    with frozen(model), recomputing(model, targets, recompute), hooks, seeing, torch.enable_grad():
        hidden_states(model, torch.zeros(shape, dtype=torch.long))
    for parameter in model.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(kept.values())


def test_autograd_keeps_a_hidden_state_a_block():
    model = tiny_llama(layers=6)
    b, t, hidden, size = 2, 30, 8, 8
    for layers, blocks in ((None, 6), ("2-5", 4)):
        targets = find_targets(model, layers=layers)
        plain, ours = (kept_bytes(model, targets, (b, t), recompute) for recompute in (False, True))
        # The input of each block and of the last norm, with its scale.
        assert ours == size * b * t * ((blocks + 1) * hidden + 1)
        assert plain > 5 * ours


# --- What goes wrong ----------------------------------------------------------------------------


# Three runs and two backward passes try recomputing, six runs look at the head and at causality;
# the eleventh is the second run of the first batch.
@pytest.mark.parametrize(
    ("where", "number"), [("forward_at", 10), ("forward_at", 11), ("backward_at", 3)]
)
def test_a_model_is_as_it_was_after_an_exception(model, targets, where, number):
    batches = make_batches(random_sequences(4), budget=20)
    mlp = model.model.layers[1].mlp
    mlp.act_fn = Tripwire(mlp.act_fn, **{where: number})
    before, attributes = Snapshot.of(model), [set(vars(b)) for b in model.model.layers]
    with pytest.raises(RuntimeError, match=f"tripped in {where.removesuffix('_at')}"):
        KFAC().fit(model, batches, targets, recompute=True)
    assert before.differences(model) == []
    assert [set(vars(b)) for b in model.model.layers] == attributes


def test_a_wrapper_of_a_blocks_forward_stays(model, targets):
    block, calls = model.model.layers[0], []
    own = block.forward

    def wrapper(*args, **kwargs):
        calls.append(torch.is_grad_enabled())
        return own(*args, **kwargs)

    block.forward = wrapper
    batches = make_batches(random_sequences(2), budget=100)
    Diagonal().fit(model, batches, targets, recompute=True)
    assert block.forward is wrapper
    assert calls[-2:] == [False, True]


def test_gradients_past_a_blocks_input_are_refused(model, targets):
    """A block that reads what an earlier one has made, by another way than its input."""
    first, second = model.model.layers
    own, made = second.forward, []
    first.register_forward_hook(lambda module, args, output: made.append(output))

    def reads(hidden_states, earlier, **options):
        return own(hidden_states + 0 * earlier, **options)

    second.forward = reads
    second.register_forward_pre_hook(lambda module, args: (*args, made[-1]))
    batches = make_batches(random_sequences(2), budget=100)
    Diagonal().fit(model, batches, targets)
    with pytest.raises(kfade.InputError, match="more than the first argument carries gradients"):
        Diagonal().fit(model, batches, targets, recompute=True)
    upper = [target for target in targets if target.block == 1]  # nothing is sent past it
    Diagonal().fit(model, batches, upper, recompute=True)
