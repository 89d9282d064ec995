"""The share of positions that an edit sends to other experts, counted by hand on tiny models."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch
import zoo
from zoo.rows import FORGET, RETAIN
from zoo.unusual import built

import kfade
from kfade import Update
from kfade.cli import main
from kfade.data.batches import make_batches
from kfade.evaluate.routing import LARGE, rerouted_share, routing_line
from kfade.models.experts import is_expert_layer

SEQUENCES = zoo.sequences((12, 7, 9, 3))


def chosen_by_hand(model, sequence) -> list[list[set[int]]]:
    """The experts of each live position of each layer, from the routers' logits."""
    tokens_BT = torch.tensor([sequence.tokens[: sequence.live]])
    with torch.no_grad():
        logits = model(tokens_BT, output_router_logits=True).router_logits
    return [[set(row.topk(2).indices.tolist()) for row in layer_TE] for layer_TE in logits]


def share_by_hand(model, update: Update) -> float:
    before = [chosen_by_hand(model, sequence) for sequence in SEQUENCES]
    with update.applied_to(model):
        after = [chosen_by_hand(model, sequence) for sequence in SEQUENCES]
    pairs = [
        one != other
        for ours, theirs in zip(before, after, strict=True)
        for layer, edited in zip(ours, theirs, strict=True)
        for one, other in zip(layer, edited, strict=True)
    ]
    assert len(pairs) == 2 * sum(sequence.live for sequence in SEQUENCES)
    return sum(pairs) / len(pairs)


def random_update(model, size: float, layers: str) -> Update:
    torch.manual_seed(0)
    targets = kfade.find_targets(model, layers=layers)
    return Update({t.name: size * torch.randn_like(t.weight) for t in targets})


@pytest.mark.parametrize("budget", [1, 24, 10**6])
def test_the_share_is_that_counted_by_hand(budget):
    model = built("qwen3_moe")
    batches = make_batches(SEQUENCES, budget=budget)
    small, large = (random_update(model, size, "0") for size in (0.01, 1.0))
    shares = []
    for update in (Update({}), small, large):
        share = rerouted_share(model, batches, lambda update=update: update.applied_to(model))
        assert share == pytest.approx(share_by_hand(model, update), abs=1e-12)
        shares.append(share)
    none, few, many = shares
    assert none == 0
    assert 0 < few < many <= 0.5  # the first layer's router lies before the changed experts


def test_the_last_block_reaches_no_router():
    model = built("qwen3_moe")
    batches = make_batches(SEQUENCES)
    last = random_update(model, 1.0, "1")
    assert rerouted_share(model, batches, lambda: last.applied_to(model)) == 0


def test_the_order_of_the_experts_does_not_count():
    """The same two experts in another order are the same choice; another expert is not."""
    model = built("qwen3_moe")
    layer = [module for module in model.modules() if is_expert_layer(module)][-1]
    batches = make_batches(SEQUENCES)

    def edited_by(change):
        @contextlib.contextmanager
        def edited():
            handle = layer.register_forward_pre_hook(
                lambda module, args: (args[0], change(args[1]), args[2])
            )
            yield model
            handle.remove()

        return edited

    assert rerouted_share(model, batches, edited_by(lambda chosen: chosen.flip(1))) == 0
    assert rerouted_share(model, batches, edited_by(lambda chosen: (chosen + 1) % 4)) == 0.5


def test_a_dense_model_has_no_share():
    model = zoo.tiny("llama")
    assert (
        rerouted_share(model, make_batches(SEQUENCES), lambda: contextlib.nullcontext(model))
        is None
    )


def test_a_run_reports_it_for_mixtures_alone(tmp_path, model_dir):
    sets = {"--forget": FORGET, "--retain": RETAIN}
    for name, rows in sets.items():
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    zoo.save(tmp_path / "mixture", built("qwen3_moe"))
    found = {}
    for kind, folder in (("mixture", tmp_path / "mixture"), ("dense", model_dir)):
        given = [str(word) for name in sets for word in (name, tmp_path / name)]
        out = tmp_path / f"out-{kind}"
        size = ("--sequence-length", "8", "--holdout", "1", "--alpha", "0.05", "--out", str(out))
        assert main(["unlearn", str(folder), *given, *size]) == 0
        found[kind] = json.loads((out / "metrics.json").read_text())
    assert "rerouted" not in found["dense"]
    assert set(found["mixture"]["rerouted"]) == {"held_out", "forget"}
    assert all(0 <= share <= 1 for share in found["mixture"]["rerouted"].values())


def test_a_large_share_comes_with_advice():
    assert "--experts" not in routing_line(LARGE / 2, LARGE / 2)
    assert "--experts" in routing_line(0.0, LARGE)
