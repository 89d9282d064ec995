"""Families whose parts are unlike a Llama's: what is taken, what is left out, and whether the
predictions hold; what is tried before a run; weights that the retain set does not reach."""

from __future__ import annotations

import math

import pytest
import torch
import zoo
from helpers import NoFit, flat, relative_error, same_bits, tiny_llama
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig
from zoo.unusual import built

from kfade import EKFAC, Damping, InputError, make_batches, margin, unlearn
from kfade.curvature.block import EigenBlock
from kfade.curvature.capture import capture
from kfade.curvature.curvature import Curvature
from kfade.curvature.jacobian import differences, tangents, tangents_of
from kfade.curvature.product import gauss_newton_product, quadratic_form
from kfade.method.gradient import forget_gradient
from kfade.method.preflight import preflight
from kfade.method.step import gauss_newton_step
from kfade.models.layers import choose_targets, find_targets
from kfade.models.load import frozen

FAMILIES = {  # name -> KL of a step, the maps of a block, what is left out
    "opt": (1e-5, {"fc1", "fc2"}, None),
    "bloom": (1e-5, {"mlp.dense_h_to_4h", "mlp.dense_4h_to_h"}, None),
    "falcon": (1e-5, {"mlp.dense_h_to_4h", "mlp.dense_4h_to_h"}, None),
    "mpt": (1e-5, {"ffn.up_proj", "ffn.down_proj"}, None),
    "mamba": (
        1e-5,
        {f"mixer.{name}" for name in ("in_proj", "x_proj", "out_proj")},
        "2 convolutions (backbone.layers.0.mixer.conv1d.weight, ...)",
    ),
    "recurrent_gemma": (
        1e-6,
        {
            *(f"mlp_block.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
            *(f"temporal_block.{name}" for name in ("linear_x", "linear_y", "linear_out")),
        },
        "convolutions (model.layers.0.temporal_block.conv_1d.weight, ...)",
    ),
    "qwen3_moe": (
        1e-7,  # a larger step changes which experts run
        {f"mlp.experts.{name}[{e}]" for name in ("gate_up_proj", "down_proj") for e in range(4)},
        None,
    ),
}
every_family = pytest.mark.parametrize("family", FAMILIES)


def data() -> dict:
    return {
        "forget": zoo.sequences((9, 6), seed=1),
        "retain": zoo.sequences((12, 9, 11, 7), seed=2),
        "held_out": zoo.sequences((10, 8), seed=3),
    }


# --- what is taken, and what becomes of it ----------------------------------------------------


@every_family
def test_the_default_takes_what_it_can_change_and_says_what_it_cannot(family):
    chosen = choose_targets(built(family))
    _, maps, left_out = FAMILIES[family]
    found = {t.name.split(f".{t.block}.", 1)[1].removesuffix(".weight") for t in chosen.targets}
    assert found == maps
    if left_out is None:
        assert chosen.summary is None
    else:
        assert chosen.summary.startswith("left out, since kfade cannot change them: ")
        assert left_out in chosen.summary


@every_family
def test_a_small_step_does_what_is_predicted(family):
    model = built(family)
    update = unlearn(model, **data(), **flat(kl=FAMILIES[family][0]))
    [step] = update.provenance["steps"]
    assert step["measured_kl"] == pytest.approx(step["exact_kl"], rel=0.05)
    change = step["measured_objective_change"]
    assert change > 0
    assert change == pytest.approx(step["predicted_objective_change"], rel=0.05)


@every_family
def test_gradients_are_those_of_plain_autograd(family):
    # A batch of sequences of two lengths: rows of padding in a list must not be mistaken.
    model = built(family)
    targets, sequences = find_targets(model), data()["forget"]
    ours = forget_gradient(model, make_batches(sequences), targets, margin)
    values = []
    for sequence in sequences:
        logits = model(input_ids=torch.tensor([sequence.tokens]), use_cache=False).logits[0]
        values.append(margin(logits[:-1], torch.tensor(sequence.tokens[1:])))
    mean = torch.cat(values).mean()
    parameters = dict(model.named_parameters())
    whole = {target.name: target.name.partition("[")[0] for target in targets}  # of an expert
    names = sorted(set(whole.values()))
    theirs = dict(
        zip(names, torch.autograd.grad(mean, [parameters[n] for n in names]), strict=True)
    )
    for target in targets:
        gradient = theirs[whole[target.name]]
        own = gradient[target.module.expert] if target.is_routed else gradient
        expected = target.from_parameters({target.name: own})
        assert relative_error(ours[target.name], expected) < 1e-3


def test_attention_of_a_mixture_by_a_glob():
    model = built("qwen3_moe")
    targets = find_targets(model, pattern="*self_attn*")
    assert len(targets) == 8
    update = unlearn(model, **data(), **flat(targets=targets, kl=1e-7, refine=1))
    assert set(update.deltas) == {target.name for target in targets}


# --- exact forms without forward mode ---------------------------------------------------------


def directions(targets, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        t.name: torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.weight.dtype)
        for t in targets
    }


@pytest.mark.parametrize(
    ("dtype", "limit"),
    # eps^(2/3) of the size of J δ, and what rounding gathers in two blocks.
    [(torch.float64, 1e-9), (torch.float32, 1e-3), (torch.bfloat16, 0.2)],
)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])  # δ has any length
def test_differences_are_the_tangents_of_forward_mode(dtype, limit, scale):
    model = tiny_llama(dtype)
    targets = find_targets(model)
    delta = {name: scale * matrix for name, matrix in directions(targets).items()}
    [batch] = make_batches(data_of_17())
    with frozen(model):
        hidden_ND, tangent_ND = tangents(model, batch, targets, delta)
        again_ND, difference_ND = differences(model, batch, targets, delta)
    assert relative_error(again_ND.double(), hidden_ND.double()) < 0.02
    assert relative_error(difference_ND.double(), tangent_ND.double()) < limit


def data_of_17():
    return [
        type(s)(tuple(t % 17 for t in s.tokens), s.scored) for s in zoo.sequences((9, 7), seed=5)
    ]


class Square(torch.autograd.Function):
    """x·|x|, without a forward mode."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x.abs()

    @staticmethod
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0].abs() * gradient


class Custom(nn.Module):
    def forward(self, x):
        return Square.apply(x)


class Plain(nn.Module):
    def forward(self, x):
        return x * x.abs()


def test_products_through_an_operation_without_forward_mode():
    found = []
    for activation in (Plain(), Custom()):
        model = tiny_llama()
        for layer in model.model.layers:
            layer.mlp.act_fn = activation
        targets, batches = find_targets(model), make_batches(data_of_17())
        with frozen(model):
            way = tangents_of(model, targets)
        assert way is (tangents if isinstance(activation, Plain) else differences)
        delta = directions(targets)
        product = gauss_newton_product(model, batches, targets, delta)
        found.append((quadratic_form(model, batches, targets, delta), product))
    (form, product), (other_form, other_product) = found
    assert other_form == pytest.approx(form, rel=1e-8)
    for name in product:
        assert relative_error(other_product[name], product[name]) < 1e-8


# --- what is tried before a run ---------------------------------------------------------------


def looks_ahead():
    config = Gemma3TextConfig(**zoo.GROUPED, head_dim=8, use_bidirectional_attention=True)
    return Gemma3ForCausalLM(config).eval()


def test_a_model_that_looks_ahead_is_refused_before_any_fit():
    message = "Gemma3ForCausalLM looks ahead: changing the last 24 of 32 tokens moves the"
    with pytest.raises(InputError, match=message):
        find_targets(looks_ahead())
    causal = zoo.tiny("gemma3", torch.float32)
    targets = find_targets(causal)  # of the same shape: only attention differs
    with pytest.raises(InputError, match=message):
        unlearn(looks_ahead(), **data(), fit=NoFit(), **flat(targets=targets, kl=1e-3))
    with pytest.raises(AssertionError, match="fitted"):
        unlearn(causal, **data(), fit=NoFit(), **flat(targets=targets, kl=1e-3))


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise NotImplementedError("no gradient kernel here")


class Stop(nn.Module):
    def __init__(self, stop):
        super().__init__()
        self.stop = stop

    def forward(self, x):
        return self.stop(x)


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        (NoBackward.apply, r"cannot be differentiated \(NotImplementedError: no gradient kernel"),
        (lambda x: x.detach(), r"no gradient comes back to model\.layers\.1\.mlp\.gate_proj\.wei"),
    ],
)
def test_what_a_run_needs_is_tried_first(stop, message):
    model = tiny_llama()
    preflight(model, find_targets(model))
    model.model.layers[1].mlp.act_fn = Stop(stop)
    with pytest.raises(InputError, match=message):
        preflight(model, find_targets(model))


# --- weights that the retain set does not reach -----------------------------------------------


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("refine", [0, 2])
def test_a_layer_behind_a_zero_weight_does_not_change_and_the_others_do_as_without_it(
    relative, refine
):
    model = tiny_llama()
    mlp = model.model.layers[1].mlp
    with torch.no_grad():
        mlp.down_proj.weight.zero_()
        mlp.up_proj.weight.zero_()
    sets = {name: list(data_of_17()) for name in ("forget", "retain", "held_out")}
    options = {"damping": 0.1 if relative else 1e-3, "relative": relative, "refine": refine}
    whole = unlearn(model, **sets, **flat(kl=1e-3, **options))
    kept = find_targets(model, layers="0")
    without = unlearn(model, **sets, **flat(targets=kept, kl=1e-3, **options))
    for name, delta in whole.deltas.items():
        if name in without.deltas:
            assert relative_error(delta, without.deltas[name]) < 1e-6
        else:
            assert torch.equal(delta, torch.zeros_like(delta))
    [step] = whole.provenance["steps"]
    assert all(math.isfinite(value) for value in step["relative_change"].values())


def test_no_change_where_there_is_neither_curvature_nor_damping():
    block = EigenBlock(None, None, torch.tensor([[2.0, 0.0], [0.0, 0.0]]))
    x = torch.tensor([[4.0, 1.0], [0.0, 3.0]])
    assert block.solve(x, 0.0).tolist() == [[2.0, 0.0], [0.0, 0.0]]
    assert block.solve(x, 2.0).tolist() == [[1.0, 0.5], [0.0, 1.5]]


def test_a_gradient_where_there_is_no_curvature_at_all():
    flat = EigenBlock(None, None, torch.zeros(2, 2))
    curved = EigenBlock(None, None, torch.ones(2, 2))
    blocks = {"flat": flat, "curved": curved}
    gradient = {"flat": torch.ones(2, 2), "curved": torch.ones(2, 2)}
    step = gauss_newton_step(Curvature(blocks), gradient, damping=Damping())
    assert not step.direction["flat"].any()
    assert step.direction["curved"].square().sum().item() == pytest.approx(1.0)
    with pytest.raises(InputError, match="no curvature where the forget gradient lies"):
        gauss_newton_step(Curvature({"flat": flat}), gradient, damping=Damping())
    nothing = {name: torch.zeros(2, 2) for name in blocks}
    with pytest.raises(InputError, match="the forget gradient is zero in all targeted"):
        gauss_newton_step(Curvature(blocks), nothing, damping=Damping())


# --- positions in one list --------------------------------------------------------------------


def test_rows_of_a_list_are_those_of_sequences_in_their_order():
    model = built("opt")
    targets, [batch] = find_targets(model), make_batches(data()["retain"])
    inputs: dict[str, torch.Tensor] = {}
    with frozen(model), capture(targets, on_input=lambda t, a, _: inputs.update({t.name: a})):
        model(input_ids=batch.input_BT, use_cache=False)
        whole = dict(inputs)
        for b, tokens_T in enumerate(batch.input_BT):
            model(input_ids=tokens_T[None], use_cache=False)
            for name, rows in inputs.items():
                length = len(tokens_T)
                assert relative_error(whole[name][b * length :][:length], rows) < 1e-5


def test_a_fit_on_lists_is_that_on_sequences():
    fits = []
    for listed in (False, True):
        model = tiny_llama()
        for layer in model.model.layers:
            if listed:
                layer.mlp = Listed(layer.mlp)
        found = EKFAC().fit(model, make_batches(data_of_17()), find_targets(model))
        fits.append([block.eigenvalues for block in found.blocks.values()])
    assert all(same_bits(*pair) or torch.allclose(*pair) for pair in zip(*fits, strict=True))


class Listed(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x_BTD):
        return self.inner(x_BTD.flatten(0, 1)).view_as(x_BTD)
