"""Models that a run would compute wrong numbers with are refused before it, in one line each."""

from __future__ import annotations

import logging

import pytest
import torch
import zoo
from helpers import flat, random_sequences, tiny_llama
from torch import nn
from transformers import (
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    MambaConfig,
    MambaForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
)

import kfade
import kfade.models.head as head_module
from kfade import EKFAC, InputError, find_targets, make_batches, margin
from kfade.baselines.weights import Dense
from kfade.curvature.product import quadratic_form
from kfade.evaluate.quantisation import linear_weights
from kfade.method.gradient import forget_gradient
from kfade.method.preflight import preflight
from kfade.models.head import hidden_states, read_head
from kfade.models.load import frozen


def built(make) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


def forbidden(*args, **kwargs):
    raise AssertionError("fitted")


def run(model, **options):
    sets = {
        "forget": random_sequences(2),
        "retain": random_sequences(3, seed=1),
        "held_out": random_sequences(2, seed=2),
    }
    return kfade.unlearn(model, **sets, **flat(**{"kl": 1e-3, "fit": forbidden, **options}))


# --- recomputing --------------------------------------------------------------------------------


def gemma3n(shared: int, dtype=torch.float32) -> nn.Module:
    """Four blocks; the last ``shared`` take the keys and values of blocks before them."""
    config = Gemma3nTextConfig(
        **{**zoo.GROUPED, "num_hidden_layers": 4, "intermediate_size": [24] * 4},
        head_dim=8,
        vocab_size_per_layer_input=zoo.VOCABULARY,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=shared,
        laurel_rank=4,
        altup_num_inputs=2,
        activation_sparsity_pattern=[0.0] * 4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=4,
    )
    return built(lambda: Gemma3nForCausalLM(config)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputing_that_loses_gradients_is_refused_everywhere(dtype):
    message = r"--recompute: it changes the gradient at model\.layers\..* by .* leave it out"
    model = gemma3n(2, dtype)
    targets, batches = find_targets(model), make_batches(random_sequences(2))
    preflight(model, targets)
    for compute in (
        lambda: preflight(model, targets, recompute=True),
        lambda: run(model, targets=targets, recompute=True),
        lambda: EKFAC().fit(model, batches, targets, recompute=True),
        lambda: forget_gradient(model, batches, targets, margin, recompute=True),
    ):
        with pytest.raises(InputError, match=message):
            compute()
    alone = gemma3n(0, dtype)
    preflight(alone, find_targets(alone), recompute=True)


def test_blocks_that_cannot_run_twice_are_told_from_a_model_that_cannot_be_differentiated():
    config = OpenAIGPTConfig(
        vocab_size=zoo.VOCABULARY, n_embd=16, n_head=2, n_layer=2, n_positions=32
    )
    model = built(lambda: OpenAIGPTLMHeadModel(config))
    targets = find_targets(model)
    preflight(model, targets)
    with pytest.raises(InputError, match=r"--recompute: .* cannot run twice .*; leave it out"):
        preflight(model, targets, recompute=True)


# --- compiled modules ---------------------------------------------------------------------------


def test_compiled_modules_are_refused():
    torch._logging.set_logs(dynamo=logging.ERROR)
    plain = tiny_llama()
    targets = find_targets(plain)
    plain.model.layers[0].compile(backend="eager")
    for refused in (lambda: find_targets(plain), lambda: run(plain, targets=targets)):
        with pytest.raises(InputError, match=r"model\.layers\.0 is compiled .* after unlearning"):
            refused()
    whole = torch.compile(tiny_llama(), backend="eager")
    with pytest.raises(InputError, match=r"give the model within, model\._orig_mod"):
        find_targets(whole)
    find_targets(whole._orig_mod)
    wrapped = tiny_llama()
    wrapped.model.layers[1] = torch.compile(wrapped.model.layers[1], backend="eager")
    with pytest.raises(InputError, match=r"model\.layers\.1 is compiled"):
        find_targets(wrapped)


def test_targets_that_do_not_run_are_refused_in_forward_mode_and_backward():
    targets = find_targets(tiny_llama())
    model, batches = tiny_llama(), make_batches(random_sequences(2))
    along = {target.name: torch.ones(target.shape, dtype=torch.float64) for target in targets}
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.gate_proj\.weight did not run"):
        quadratic_form(model, batches, targets, along)
    with pytest.raises(InputError, match="no gradient comes back to any target"):
        forget_gradient(model, batches, targets, margin)


def test_a_target_without_a_gradient_is_refused_in_any_pass():
    model, batches = tiny_llama(), make_batches(random_sequences(2))
    targets = find_targets(model)
    model.model.layers[1].mlp.act_fn = Cut()
    with pytest.raises(InputError, match=r"no gradient comes back to model\.layers\.1\.mlp\.gate"):
        forget_gradient(model, batches, targets, margin)


class Cut(nn.Module):
    def forward(self, x):
        return x.detach()


# --- the head -----------------------------------------------------------------------------------


def suppressing(model: nn.Module, scale: float = 1.0, places: tuple[int, ...] = (7,)) -> nn.Module:
    """Some tokens never come; other logits are ``scale`` times those of the head."""
    own = model.forward

    def forward(**options):
        output = own(**options)
        output.logits = scale * output.logits
        output.logits[..., list(places)] = -torch.inf
        return output

    model.forward = forward
    return model


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_logit_that_is_not_finite_does_not_hide_another_head(scale):
    with pytest.raises(InputError, match="in a way that kfade does not know"):
        read_head(suppressing(tiny_llama(), scale))


def test_the_finite_logits_of_a_broken_head_are_compared():
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    read_head(model)  # the weight is named where it is used
    with pytest.raises(InputError, match="in a way that kfade does not know"):
        read_head(suppressing(model, 2.0, places=()))


def test_a_head_that_changes_after_eight_positions_is_refused():
    model = tiny_llama()
    own = model.forward

    def forward(**options):
        output = own(**options)
        output.logits[:, 9:] *= 1.01
        return output

    model.forward = forward
    with pytest.raises(InputError, match="in a way that kfade does not know"):
        read_head(model)


def test_logits_in_a_coarser_dtype_than_the_weights_are_compared_in_theirs():
    config = MambaConfig(
        vocab_size=zoo.VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4,
        time_step_rank=4, initializer_range=0.3,
    )  # fmt: skip
    model = built(lambda: MambaForCausalLM(config)).double()
    assert model(torch.tensor([[1, 2]])).logits.dtype == torch.float32
    assert read_head(model).linear is model.lm_head
    preflight(model, find_targets(model))


# --- looking ahead, chance, memory --------------------------------------------------------------


class Around(nn.Module):
    """A block's feed-forward part with something added to what it says."""

    def __init__(self, inner: nn.Module, more) -> None:
        super().__init__()
        self.inner, self.more = inner, more

    def forward(self, x_BTD):
        return self.inner(x_BTD) + self.more(x_BTD)


def with_more(more) -> nn.Module:
    model = tiny_llama()
    model.model.layers[0].mlp = Around(model.model.layers[0].mlp, more)
    return model


def mean_of_long(x_BTD):
    return x_BTD.mean(dim=1, keepdim=True) * (x_BTD.shape[1] > 8)


def of_the_twentieth_after(x_BTD):
    return torch.cat([x_BTD[:, 20:], torch.zeros_like(x_BTD[:, :20])], 1)


def of_the_first_twelve(x_BTD):
    places = torch.arange(x_BTD.shape[1])[:, None] < 12
    return x_BTD[:, :12].mean(dim=1, keepdim=True) * places


@pytest.mark.parametrize("more", [mean_of_long, of_the_twentieth_after, of_the_first_twelve])
def test_looking_ahead_is_seen_at_any_distance_and_place(more):
    model = with_more(more)
    message = "looks ahead: changing the last 56 of 64 tokens moves the hidden states before them"
    for refused in (find_targets, read_head):
        with pytest.raises(InputError, match=message):
            refused(model)


def test_the_last_token_alone_is_seen():
    model = with_more(lambda x: torch.where(
        torch.arange(x.shape[1])[:, None] == 40, x[:, -1:], torch.zeros_like(x)
    ))  # fmt: skip
    with pytest.raises(InputError, match="looks ahead: changing the last of 64 tokens"):
        read_head(model)


def test_small_windows_are_not_left():
    model = tiny_llama()
    model.config.max_position_embeddings = 6
    seen = []
    model.model.layers[0].register_forward_pre_hook(
        lambda module, args: seen.append(args[0].shape[1])
    )
    read_head(model)
    assert set(seen) == {6}


def test_chance_and_memory_are_called_by_their_names():
    state = torch.zeros(8, dtype=torch.float64)

    def remembers(x_BTD):
        before = state.clone()
        state.add_(x_BTD.mean((0, 1)))
        return before

    with torch.random.fork_rng():
        for more in (lambda x: 0.1 * torch.randn_like(x), nn.functional.dropout, remembers):
            with pytest.raises(InputError, match="gives other outputs for the same tokens"):
                find_targets(with_more(more))


# --- one memory, two names ----------------------------------------------------------------------


@pytest.mark.parametrize("view", [lambda w: w.data, lambda w: w.data[:]], ids=["data", "view"])
def test_parameters_on_one_storage_are_tied(view):
    model = tiny_llama()
    first, second = (layer.mlp for layer in model.model.layers)
    second.up_proj.weight = nn.Parameter(view(first.up_proj.weight))
    names = [target.name for target in find_targets(model)]
    assert len(names) == 4
    assert not any("up_proj" in name for name in names)
    with pytest.raises(InputError, match=r"0\.mlp\.up_proj\.weight is tied to model\.layers\.1"):
        find_targets(model, pattern="*up_proj.weight")
    model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.data)
    assert not any("lm_head" in name for name in linear_weights(model))
    with pytest.raises(InputError, match="are two parameters on one memory"):
        Dense(model, ["model.layers.0.mlp.up_proj.weight"])


# --- autocast -----------------------------------------------------------------------------------


def test_autocast_is_refused():
    model = tiny_llama(torch.float32)
    targets, batches = find_targets(model), make_batches(random_sequences(2))
    with torch.autocast("cpu", torch.bfloat16):
        for compute in (
            lambda: find_targets(model),
            lambda: run(model, targets=targets),
            lambda: EKFAC().fit(model, batches, targets),
            lambda: forget_gradient(model, batches, targets, margin),
        ):
            with pytest.raises(InputError, match="autocast is on for cpu"):
                compute()
    with frozen(model):
        hidden_states(model, batches[0].input_BT)


# --- no gradient at all -------------------------------------------------------------------------


def test_where_no_gradient_reaches_the_targets_it_is_said_why():
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
    dead = find_targets(model, pattern="*layers.1.mlp.*_proj.weight")[:2]
    message = r"zero in all targeted weights \(model\.layers\.1\.mlp\.gate_proj\.weight and 1 more"
    with pytest.raises(InputError, match=message):
        run(model, targets=dead)
    preflight(model, find_targets(model))  # some are reached
    with torch.no_grad():
        model.lm_head.weight.zero_()
    with pytest.raises(InputError, match=r"the vocabulary head of .* passes no gradient back"):
        run(model)


# --- how often ----------------------------------------------------------------------------------


def test_the_head_is_tried_once_a_run(monkeypatch):
    tried = []
    own = head_module.refuse_looking_ahead
    monkeypatch.setattr(
        head_module, "refuse_looking_ahead", lambda model: tried.append(model) or own(model)
    )
    model = tiny_llama()
    targets = find_targets(model)
    tried.clear()
    run(model, fit=EKFAC(), targets=targets, steps=2, refine=2)
    assert len(tried) == 1
    budget = EKFAC().peak_bytes(targets[:2])
    EKFAC().fit(model, make_batches(random_sequences(3)), targets, memory=budget)
    assert len(tried) == 2
