"""RepSelect: which components are collapsed, by how much, and what the update keeps of G."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import zoo
from baselines_worker import FORGET, SETS, dense, difference, method_of, run, settings
from helpers import Snapshot, relative_error, tiny_llama
from zoo.unusual import built

from kfade.baselines import methods, repselect
from kfade.baselines.loop import train
from kfade.baselines.repselect import collapsed
from kfade.baselines.settings import Selection
from kfade.baselines.training import _draw
from kfade.data.batches import make_batches
from kfade.errors import InputError

K = 3
PLAIN = {
    **{"accumulate": 1, "warm_up": 0, "decay": False, "weight_decay": 0.0},
    "optimizer": torch.optim.SGD,
}


def drawn(outputs: int, inputs: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(outputs, inputs, dtype=torch.float64, generator=generator, device="cpu")


def slowly(gradient: torch.Tensor, components: int, *sides: str, lowest: bool = False):
    """Inputs, then output gradients, one component and one row or column at a time."""
    u, s, vh = torch.linalg.svd(gradient, full_matrices=False)
    chosen = range(len(s) - components, len(s)) if lowest else range(components)
    least = min(s[i].item() for i in chosen)
    found = gradient.clone()
    if "inputs" in sides:
        for row in found:
            for i in chosen:
                row -= (row @ vh[i]) * (1 - least / s[i]) * vh[i]
    if "outputs" in sides:
        for column in found.T:
            for i in chosen:
                column -= (column @ u[:, i]) * (1 - least / s[i]) * u[:, i]
    return found


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (6, 6)])
def test_components_against_loops(shape):
    gradient = drawn(*shape)
    ours = collapsed(gradient, K, "w")
    assert torch.allclose(ours, slowly(gradient, K, "inputs", "outputs"), rtol=0, atol=1e-12)
    # Negative controls: nothing, one side only, the other end of the spectrum, another number.
    others = [
        gradient,
        slowly(gradient, K, "inputs"),
        slowly(gradient, K, "outputs"),
        slowly(gradient, K, "inputs", "outputs", lowest=True),
        slowly(gradient, K + 1, "inputs", "outputs"),
    ]
    for other in others:
        assert relative_error(ours, other) > 0.05


def test_the_spectrum_is_that_of_the_formula():
    gradient = drawn(6, 9)
    before, after = (torch.linalg.svdvals(g) for g in (gradient, collapsed(gradient, K, "w")))
    wanted = torch.cat([before[K - 1] ** 2 / before[:K], before[K:]])
    assert torch.allclose(after, wanted.sort(descending=True).values, rtol=1e-9)


def test_a_gradient_of_low_rank_has_no_more_components_than_its_rank():
    gradient = drawn(8, 2) @ drawn(2, 9)
    assert torch.allclose(
        collapsed(gradient, 5, "w"), slowly(gradient, 2, "inputs", "outputs"), rtol=0, atol=1e-10
    )
    nothing = torch.zeros(4, 6, dtype=torch.float64)
    assert torch.equal(collapsed(nothing, K, "w"), nothing)


def test_a_float32_gradient_is_decomposed_in_float64():
    # Singular values from 1 to 1e-6: in float32 λ = σ² would span more than its 7 digits.
    u, v = (torch.linalg.qr(drawn(8, 8))[0] for _ in range(2))
    gradient = (u * 10.0 ** -torch.arange(8, dtype=torch.float64).clamp(max=6)) @ v.T
    ours = collapsed(gradient.float(), 5, "w")
    wanted = slowly(gradient.float().double(), 5, "inputs", "outputs")
    assert ours.dtype == torch.float32
    assert relative_error(ours.double(), wanted) < 1e-5


def direction_of(model, *, adapter_lr: float, components: int, batch: int) -> dict:
    """G' by plain autograd on a model with A and B as tensors of their own."""
    names = repselect.trained_weights(model)
    own = {name: model.get_parameter(name) for name in names}
    start = {name: weight.detach().clone() for name, weight in own.items()}
    adapter = repselect.adapter_of(model, names, seed=0)
    factors = {name: tensor.detach().clone() for name, tensor in adapter.tensors.items()}

    def loss(numbers) -> torch.Tensor:
        (tokens,) = make_batches([FORGET[i] for i in numbers], budget=10**6)
        logits = model(input_ids=tokens.input_BT, use_cache=False).logits
        log_p = logits.log_softmax(-1).gather(2, tokens.target_BT[..., None])[..., 0]
        return -tokens.at_loss(log_p).mean()

    def gradients(numbers) -> dict[str, torch.Tensor]:
        """Of −CE at W + BA (α/R is 1)."""
        with torch.no_grad():
            for name, weight in own.items():
                weight.copy_(start[name] + factors[f"{name}.B"] @ factors[f"{name}.A"])
        found = torch.autograd.grad(-loss(numbers), list(own.values()))
        return dict(zip(own, found, strict=True))

    steps = len(FORGET) // batch
    plain = settings(batch=batch, accumulate=1)
    batches = [_draw(SETS, plain, step)[0]["forget"] for step in range(steps)]
    for numbers in batches:
        for name, g in gradients(numbers).items():
            a, b = factors[f"{name}.A"], factors[f"{name}.B"]
            # CE descends: its gradient is −g; of A it is Bᵀ(−g), of B (−g)Aᵀ.
            factors[f"{name}.A"], factors[f"{name}.B"] = (
                a + adapter_lr * b.T @ g,
                b + adapter_lr * g @ a.T,
            )
    total = [gradients(numbers) for numbers in batches]
    with torch.no_grad():
        for name, weight in own.items():
            weight.copy_(start[name])
    return {
        name: slowly(sum(g[name] for g in total), components, "inputs", "outputs") for name in names
    }


def two_steps(model, *, components: int, adapter_lr: float):
    """An update of −0.5 G' in two steps of rate 0.25."""
    method = methods.repselect(model, components=components, adapter_lr=adapter_lr)
    own = settings(**PLAIN, lr=0.25, steps=2, batch=3, selection=method.defaults.selection)
    return train(model, method.terms, dense(model, method.trains), SETS, own)


def test_the_direction_against_plain_autograd():
    model = tiny_llama()
    expected = direction_of(model, adapter_lr=0.5, components=4, batch=3)
    update = two_steps(model, adapter_lr=0.5, components=4)
    assert set(update.deltas) == set(expected)
    for name, wanted in expected.items():
        assert relative_error(update.deltas[name], -0.5 * wanted) < 1e-8, name
    # Negative controls: without the adapter's lesson, and with other components.
    for other in ({"adapter_lr": 0.0, "components": 4}, {"adapter_lr": 0.5, "components": 3}):
        assert difference(two_steps(model, **other), update) > 0.02


def test_a_run_lowers_the_probability_of_forget_text():
    model = tiny_llama(layers=3)
    still, moved = (
        run("repselect", model, settings=settings(**PLAIN, lr=lr, steps=4)).provenance["curve"]
        for lr in (0.0, 0.5)
    )
    assert still[-1]["forget_loss"] == still[0]["forget_loss"]
    assert moved[-1]["forget_loss"] > moved[0]["forget_loss"] + 0.1


def test_the_adapter_is_gone_and_the_model_as_before():
    model = tiny_llama()
    before = Snapshot.of(model)
    two_steps(model, adapter_lr=0.5, components=4)
    assert not before.differences(model)
    assert not model.model.layers[0].mlp.up_proj._forward_hooks


def test_what_relearning_would_recover_is_not_in_the_update():
    """An attacker's first step follows −∇CE_f, whose top components hold nearly all of it."""
    model = tiny_llama(layers=3)
    names = repselect.trained_weights(model)
    plain = settings(**PLAIN, lr=1.0, steps=1, batch=7)

    def moved(method) -> dict[str, torch.Tensor]:
        own = replace(plain, selection=method.defaults.selection)
        return dict(train(model, method.terms, dense(model, names), SETS, own).deltas)

    ascent = moved(methods.gradient_ascent())  # the opposite of relearning's direction
    ours = moved(methods.repselect(model, components=6, adapter_lr=0.0))

    def shares(deltas) -> tuple[float, float]:
        """(share of a delta's square in relearning's top two components, cosine), means."""
        inside, cosines = [], []
        for name in names:
            u, _, _ = torch.linalg.svd(ascent[name])
            top = u[:, :2].T @ deltas[name]
            inside.append((top.square().sum() / deltas[name].square().sum()).item())
            cosine = torch.nn.functional.cosine_similarity
            cosines.append(cosine(deltas[name].flatten(), ascent[name].flatten(), dim=0).item())
        return sum(inside) / len(names), sum(cosines) / len(names)

    assert shares(ascent)[0] > 0.7  # the effect is there to remove
    assert shares(ascent)[1] == pytest.approx(1)
    share, cosine = shares(ours)
    assert share < 0.2
    assert cosine < 0.5


def test_accumulated_batches_are_the_mean_of_a_step():
    # One pass either way, without an adapter: the sum over steps of the mean over their batches.
    model = tiny_llama()
    method = method_of("repselect", model)
    still = Selection(components=4, adapter_lr=0.0)
    plain = settings(**PLAIN, lr=1.0, steps=1, batch=2)
    # Six of seven sequences, three batches of two, the same in both.
    one, three = (
        run("repselect", model, settings=plain, accumulate=n, selection=still) for n in (1, 3)
    )
    for name in method.trains:
        assert torch.allclose(3 * three.deltas[name], one.deltas[name], rtol=1e-8, atol=1e-12)


def test_small_steps_of_a_bfloat16_model_add_up():
    model = tiny_llama(torch.bfloat16)
    name = "model.layers.0.mlp.up_proj.weight"
    one, four = (
        run("repselect", model, dense(model, [name]), settings=settings(**PLAIN, lr=1e-4, steps=n))
        for n in (1, 4)
    )
    delta = four.deltas[name]
    assert delta.dtype == torch.float32
    assert relative_error(delta, 4 * one.deltas[name]) < 1e-3
    # None of it would have been there in bfloat16: a step is under half a unit in the last place.
    weight = model.get_parameter(name).detach()
    rounded = (weight.float() + one.deltas[name]).bfloat16()
    assert (delta != 0).float().mean() > 0.9
    assert (rounded == weight).float().mean() > 0.5


def test_default_components():
    weight = torch.empty
    assert Selection().components_of("w", weight(4096, 14336)) == 512
    assert Selection().components_of("w", weight(9216, 8192)) == 512
    assert Selection().components_of("w", weight(64, 256)) == 8
    assert Selection().components_of("w", weight(8, 12)) == 2
    assert Selection(7).components_of("w", weight(8, 12)) == 7
    with pytest.raises(InputError, match="--components 8: w has 8 in all; give fewer"):
        Selection(8).components_of("w", weight(8, 12))


def test_what_is_refused(monkeypatch):
    model = tiny_llama()
    norm = "model.layers.0.input_layernorm.weight"
    for name in ("lm_head.weight", norm):
        with pytest.raises(InputError, match=f"linear maps only: leave {name} out"):
            repselect.adapter_of(model, [name], seed=0)
    with pytest.raises(InputError, match="does not change the experts of a mixture"):
        methods.repselect(built("qwen3_moe"))
    monkeypatch.setattr("kfade.runtime.distributed.is_sharded", lambda model: True)
    with pytest.raises(InputError, match="leave --shard out"):
        repselect.adapter_of(model, repselect.trained_weights(model), seed=0)


def test_weights_that_are_stored_transposed():
    model = zoo.tiny("gpt2")  # [I, O]
    names = repselect.trained_weights(model)
    update = run("repselect", model, dense(model, names), settings=settings(**PLAIN, lr=0.1))
    assert set(update.deltas) == set(names)
    curve = update.provenance["curve"]
    assert curve[-1]["forget_loss"] > curve[0]["forget_loss"]
