"""Which weights are chosen, and every refusal with its own words."""

from __future__ import annotations

import pytest
import torch
import zoo
from torch import nn
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

from kfade.errors import InputError
from kfade.models.layers import choose_targets, find_targets, parse_layers
from kfade.models.weights import digest_weights, parameter_names


def names(model, **options):
    return [t.name.removeprefix("model.layers.") for t in find_targets(model, **options)]


# --- --layers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (None, set(range(12))),
        ("3", {3}),
        ("3-6", {3, 4, 5, 6}),
        ("0,2,8-11", {0, 2, 8, 9, 10, 11}),
        (" 1 , 3-4 ", {1, 3, 4}),
        ("5-5", {5}),
        ("1-3,2-4", {1, 2, 3, 4}),
    ],
)
def test_parse_layers(layers, expected):
    assert parse_layers(layers, 12) == expected


@pytest.mark.parametrize(
    "layers", ["", ",", "a", "3-", "-3", "6-3", "0,6-3", "1-2-3", "1..3", "1.0", "²", "3 6"]
)
def test_parse_layers_says_how_to_write_them(layers):
    with pytest.raises(InputError, match=r"write block numbers as 3-6 or 0,2,8-11"):
        parse_layers(layers, 12)


@pytest.mark.parametrize("layers", ["12", "0-12", "3,99"])
def test_parse_layers_outside_the_model(layers):
    with pytest.raises(InputError, match=r"--layers .*: this model has blocks 0 to 11"):
        parse_layers(layers, 12)


def test_layers_narrow_the_targets_and_keep_their_numbers():
    targets = find_targets(zoo.tiny("llama"), layers="1")
    assert [t.name for t in targets] == zoo.FAMILIES["llama"].weights[3:]
    assert {t.block for t in targets} == {1}
    assert [t.input_of for t in targets[:2]] == [targets[0].name] * 2


def test_layers_outside_the_model():
    with pytest.raises(InputError, match="--layers 1-2: this model has blocks 0 to 1"):
        find_targets(zoo.tiny("llama"), layers="1-2")


# --- globs -----------------------------------------------------------------------------------


def test_glob_over_parameter_names():
    model = zoo.tiny("llama")
    assert names(model, pattern="*.mlp.down_proj.weight") == [
        "0.mlp.down_proj.weight",
        "1.mlp.down_proj.weight",
    ]
    assert names(model, pattern="*.[01].mlp.up_proj.weight", layers="1") == ["1.mlp.up_proj.weight"]


def test_glob_reaches_attention_in_the_order_of_the_forward_pass():
    targets = find_targets(zoo.tiny("llama"), pattern="model.layers.0.*")
    parts = [t.name.split(".")[-2] for t in targets]
    assert parts == [
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    ]
    readers = [t.input_of.split(".")[-2] for t in targets]
    assert readers == ["q_proj"] * 3 + ["o_proj"] + ["gate_proj"] * 2 + ["down_proj"]


def test_glob_reaches_a_conv1d():
    targets = find_targets(zoo.tiny("gpt2"), pattern="*.attn.c_attn.weight")
    assert [t.shape for t in targets] == [(3 * zoo.WIDTH, zoo.WIDTH)] * 2
    assert all(t.transposed for t in targets)


@pytest.mark.parametrize(
    ("family", "pattern"),
    [
        ("llama", "*.no_such.weight"),
        ("llama", "mlp.down_proj.weight"),  # a glob is over the whole name
        ("phi", "*layernorm.weight"),  # parameters, but no linear maps
    ],
)
def test_glob_that_matches_no_linear_map(family, pattern):
    with pytest.raises(
        InputError, match=r"no weight matches .* give --target a glob .* such as 'model\.layers\.0"
    ):
        find_targets(zoo.tiny(family), pattern=pattern)


def test_glob_outside_the_blocks():
    with pytest.raises(InputError, match=r"matches lm_head\.weight, which is outside the decoder"):
        find_targets(zoo.tiny("llama"), pattern="lm_head.weight")


def test_glob_in_blocks_that_were_ruled_out():
    with pytest.raises(InputError, match=r"no weight matches .* in blocks 1 of LlamaForCausalLM"):
        find_targets(zoo.tiny("llama"), pattern="model.layers.0.*", layers="1")


# --- tied and shared weights -----------------------------------------------------------------


def test_head_tied_to_the_embeddings():
    model = zoo.tiny("gemma2")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with pytest.raises(
        InputError, match=r"lm_head\.weight is tied to model\.embed_tokens\.weight: changing one"
    ):
        find_targets(model, pattern="lm_head.weight")


def test_two_blocks_that_share_one_linear_map():
    model = zoo.tiny("llama")
    model.model.layers[1].mlp.down_proj = model.model.layers[0].mlp.down_proj
    with pytest.raises(
        InputError, match=r"layers\.0\.mlp\.down_proj\.weight is tied to model\.layers\.1\.mlp"
    ):
        find_targets(model, pattern="*.mlp.*")
    rest = [f"{block}.mlp.{name}.weight" for block in (0, 1) for name in ("gate_proj", "up_proj")]
    assert names(model) == rest
    assert "2 tied weights (model.layers.0.mlp.down" in choose_targets(model).summary
    assert names(model, pattern="*.mlp.up_proj.weight") == [
        "0.mlp.up_proj.weight",
        "1.mlp.up_proj.weight",
    ]


def test_two_linear_maps_that_share_one_parameter():
    model = zoo.tiny("llama")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[1].mlp.gate_proj.weight
    with pytest.raises(
        InputError, match=r"1\.mlp\.gate_proj\.weight is tied to model\.layers\.1\.mlp\.up_proj"
    ):
        find_targets(model, pattern="*.mlp.*")
    assert names(model, layers="1") == ["1.mlp.down_proj.weight"]


class Twice(nn.Module):
    """A feed-forward block that goes through one linear map twice."""

    def __init__(self):
        super().__init__()
        self.loop = nn.Linear(zoo.WIDTH, zoo.WIDTH, bias=False)

    def forward(self, x):
        return self.loop(torch.tanh(self.loop(x)))


def test_a_layer_used_twice_in_one_forward_pass():
    model = zoo.tiny("llama", torch.float32)
    model.model.layers[1].mlp = Twice()
    with pytest.raises(InputError, match=r"1\.mlp\.loop\.weight is used more than once"):
        find_targets(model, pattern="*.mlp.*")
    assert names(model) == [
        "0.mlp.gate_proj.weight",
        "0.mlp.up_proj.weight",
        "0.mlp.down_proj.weight",
    ]
    for module in model.modules():  # nothing is left behind by the refused attempt
        assert not module._forward_pre_hooks


# --- quantised weights -----------------------------------------------------------------------


class Int8Linear(nn.Linear):
    """Stands in for bitsandbytes: a subclass of Linear whose weight is int8."""

    def __init__(self):
        super().__init__(zoo.WIDTH, zoo.INNER, bias=False)
        self.weight = nn.Parameter(self.weight.detach().to(torch.int8), requires_grad=False)


class PackedLinear(nn.Module):
    """Stands in for GPTQ and AWQ: packed integers in a buffer called qweight."""

    def __init__(self):
        super().__init__()
        self.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int32))


class Float8Linear(nn.Linear):
    """A floating weight of one byte."""

    def __init__(self):
        super().__init__(zoo.WIDTH, zoo.INNER, bias=False)
        weight = self.weight.detach().to(torch.float8_e4m3fn)
        self.weight = nn.Parameter(weight, requires_grad=False)


@pytest.mark.parametrize(
    ("layer", "dtype"),
    [(Int8Linear, "torch.int8"), (PackedLinear, "torch.int32"), (Float8Linear, "torch.float8_e4")],
)
def test_quantised_weights(layer, dtype):
    model = zoo.tiny("llama")
    model.model.layers[1].mlp.up_proj = layer()
    with pytest.raises(
        InputError, match=rf"1\.mlp\.up_proj\.\w+ is quantised \({dtype}.*\): load the model in"
    ):
        find_targets(model)


# --- mixtures of experts ---------------------------------------------------------------------


def mixtral():
    config = MixtralConfig(**zoo.GROUPED, num_local_experts=2, num_experts_per_tok=1)
    return MixtralForCausalLM(config).eval()


def qwen3_moe():
    """Block 0 is dense, block 1 a mixture."""
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **zoo.GROUPED,
            head_dim=8,
            num_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=8,
            decoder_sparse_step=2,
        )
    ).eval()


class OwnWay(nn.Module):
    """Experts whose class transformers cannot run in another way."""

    def __init__(self, experts):
        super().__init__()
        self.gate_up_proj, self.down_proj = experts.gate_up_proj, experts.down_proj
        self.experts = [experts]  # not a child, so that each weight has one name

    def forward(self, *given):
        return self.experts[0](*given)


def own_way(build):
    model = build()
    for layer in model.model.layers:
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts = OwnWay(layer.mlp.experts)
    return model


@pytest.mark.parametrize(("build", "block"), [(mixtral, 0), (qwen3_moe, 1)])
@pytest.mark.parametrize("pattern", ["*.mlp.*", "*.experts.gate_up_proj"])
def test_fused_experts_that_run_in_one_way_only(build, block, pattern):
    with pytest.raises(
        InputError,
        match=rf"layers\.{block}\.mlp\.experts\.gate_up_proj is a fused mixture-of-experts weight "
        r"of shape \(2, \d+, 16\), and OwnWay is not a layer of experts that transformers can run "
        "in another way",
    ):
        find_targets(own_way(build), pattern=pattern)


ATTENTION = [f"self_attn.{name}_proj.weight" for name in ("q", "k", "v", "o")]
DENSE = [f"0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")]


@pytest.mark.parametrize("build", [mixtral, qwen3_moe])
def test_the_default_leaves_out_fused_experts_that_run_in_one_way_only(build):
    chosen = choose_targets(own_way(build))
    found = [target.name.removeprefix("model.layers.") for target in chosen.targets]
    if build is qwen3_moe:  # what is dense is taken
        assert found == DENSE
    else:  # nothing is: attention
        assert found == [f"{block}.{name}" for block in (0, 1) for name in ATTENTION]
    count = 2 if build is qwen3_moe else 4
    assert f"{count} fused expert weights (model.layers." in chosen.summary


@pytest.mark.parametrize("build", [mixtral, qwen3_moe])
@pytest.mark.parametrize("experts", ["all", "1", "none"])
def test_the_default_takes_the_chosen_experts(build, experts):
    chosen = choose_targets(build(), experts=experts)
    found = [target.name.removeprefix("model.layers.") for target in chosen.targets]
    numbers = {"all": (0, 1), "1": (1,), "none": ()}[experts]
    blocks = (0, 1) if build is mixtral else (1,)
    routed = [
        f"{block}.mlp.experts.{name}_proj[{e}]"
        for block in blocks
        for name in ("gate_up", "down")
        for e in numbers
    ]
    if build is mixtral and not routed:
        routed = [f"{block}.{name}" for block in (0, 1) for name in ATTENTION]
    assert found == (routed if build is mixtral else DENSE + routed)
    assert chosen.summary is None


@pytest.mark.parametrize(("build", "block"), [(mixtral, 0), (qwen3_moe, 1)])
def test_experts_by_a_glob(build, block):
    found = names(build(), pattern="*.experts.gate_up_proj", layers=str(block))
    assert found == [f"{block}.mlp.experts.gate_up_proj[{e}]" for e in (0, 1)]


def test_quantised_experts():
    model = mixtral()
    experts = model.model.layers[1].mlp.experts
    low = experts.down_proj.detach().to(torch.float8_e4m3fn)
    experts.down_proj = nn.Parameter(low, requires_grad=False)
    with pytest.raises(
        InputError, match=r"1\.mlp\.experts\.down_proj is quantised \(torch\.float8"
    ):
        find_targets(model)


def test_what_is_not_fused_in_a_mixture_can_be_targeted():
    assert names(mixtral(), pattern="*.o_proj.weight") == [
        "0.self_attn.o_proj.weight",
        "1.self_attn.o_proj.weight",
    ]
    assert len(names(qwen3_moe(), layers="0")) == 3


class AttentionDecoderLayer(nn.Module):
    """A block whose class is named after its attention, as Jamba's and OLMo hybrid's are."""

    def __init__(self, block):
        super().__init__()
        self.self_attn, self.mlp = block.self_attn, block.mlp
        self.input_layernorm = block.input_layernorm
        self.post_attention_layernorm = block.post_attention_layernorm

    def forward(self, x_BTD, **given):
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), **given)[0]
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


def test_a_block_whose_class_is_named_after_its_attention():
    model = zoo.tiny("llama", torch.float32)
    model.model.layers[1] = AttentionDecoderLayer(model.model.layers[1])
    assert names(model) == [
        f"{block}.mlp.{name}_proj.weight" for block in (0, 1) for name in ("gate", "up", "down")
    ]


class Routed(nn.Module):
    """Experts as a list of linear maps, longer than the list of blocks.

    ``route`` gives, for each position, the number of its expert.
    """

    def __init__(self, route, count=5):
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Linear(zoo.WIDTH, zoo.WIDTH, bias=False) for _ in range(count)
        )
        self.route = route

    def forward(self, x_BTD):
        choice_BT = self.route(x_BTD)
        y_BTD = torch.zeros_like(x_BTD)
        for number in choice_BT.unique().tolist():
            y_BTD[choice_BT == number] = self.experts[number](x_BTD[choice_BT == number])
        return y_BTD


def test_a_list_of_experts_is_not_taken_for_the_blocks():
    model = zoo.tiny("llama", torch.float32)
    model.model.layers[1].mlp = Routed(lambda x: torch.zeros(x.shape[:2], dtype=torch.long))
    assert names(model, layers="0") == [
        "0.mlp.gate_proj.weight",
        "0.mlp.up_proj.weight",
        "0.mlp.down_proj.weight",
    ]
    with pytest.raises(InputError, match="--layers 2: this model has blocks 0 to 1"):
        find_targets(model, layers="2")


def test_experts_that_see_some_positions_only():
    model = zoo.tiny("llama", torch.float32)
    model.model.layers[1].mlp = Routed(lambda x: torch.arange(x.shape[1]).expand(x.shape[:2]) % 2)
    with pytest.raises(
        InputError, match=r"1\.mlp\.experts\.1\.weight does not read one vector for each position"
    ):
        find_targets(model, pattern="model.layers.1.mlp.experts.1.weight")
    assert names(model) == [f"0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")]


def test_experts_that_see_all_positions_in_another_order():
    model = zoo.tiny("llama", torch.float32)
    model.model.layers[1].mlp = Sorted()
    with pytest.raises(
        InputError, match=r"1\.mlp\.linear\.weight does not read one vector for each position"
    ):
        find_targets(model, pattern="*.mlp.*")


class Sorted(nn.Module):
    """Reads all positions as one list, in the order of what is in them."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(zoo.WIDTH, zoo.WIDTH)

    def forward(self, x_BTD):
        x_RD = x_BTD.reshape(-1, zoo.WIDTH)
        order = x_RD[:, 0].argsort()
        return self.linear(x_RD[order])[order.argsort()].view_as(x_BTD)


class Listed(nn.Module):
    """Reads the positions of all sequences as one list, as OPT's feed-forward block does."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x_BTD):
        return self.down(self.up(x_BTD.reshape(-1, 16))).reshape(x_BTD.shape)


def test_positions_in_one_list():
    model = zoo.tiny("llama", torch.float32)
    model.model.layers[1].mlp = Listed()
    assert names(model, layers="1") == ["1.mlp.up.weight", "1.mlp.down.weight"]


def test_a_convolution():
    model = zoo.tiny("llama", torch.float32)
    model.model.layers[1].mlp.conv = nn.Conv1d(16, 16, 4)
    with pytest.raises(InputError, match=r"mlp\.conv\.weight is a convolution's weight of shape"):
        find_targets(model, pattern="*.mlp.*")
    assert len(find_targets(model)) == 6
    assert choose_targets(model).summary == (
        "left out, since kfade cannot change them: 1 convolutions (model.layers.1.mlp.conv.weight)"
    )


def test_a_linear_map_that_takes_no_part():
    model = zoo.tiny("llama", torch.float32)
    model.model.layers[1].mlp.spare = nn.Linear(4, 4)
    with pytest.raises(InputError, match=r"1\.mlp\.spare\.weight takes no part in a forward pass"):
        find_targets(model, pattern="*.mlp.*")
    assert len(find_targets(model)) == 6
    assert "mlp.spare.weight" in choose_targets(model).summary


def rwkv():
    return RwkvForCausalLM(
        RwkvConfig(vocab_size=17, hidden_size=8, attention_hidden_size=8, num_hidden_layers=2)
    )


def recurrent_gemma():
    return RecurrentGemmaForCausalLM(
        RecurrentGemmaConfig(**zoo.SHAPE, lru_width=16, attention_window_size=4)
    )


@pytest.mark.parametrize(
    ("build", "kind", "name"),
    [
        (rwkv, "parameters that no linear map holds", "time_mix_key"),
        (recurrent_gemma, "parameters that no linear map holds", "rg_lru.input_gate_weight"),
        (lambda: own_way(mixtral), "fused expert weights", "mlp.experts.gate_up_proj"),
    ],
)
def test_what_is_left_out_is_called_what_it_is(build, kind, name):
    left_out = {w.name: w for w in choose_targets(build().eval()).left_out}
    of_three = [w for n, w in left_out.items() if n.endswith(name)]
    assert of_three
    assert all(weight.kind == kind for weight in of_three)
    if kind.startswith("parameters"):
        assert not any("expert" in w.kind or "expert" in w.reason for w in of_three)
        assert "is a parameter that no linear map holds, of shape (" in of_three[0].reason


def test_a_model_without_blocks():
    model = zoo.tiny("llama")
    model.model.layers = nn.ModuleList()
    told = "LlamaForCausalLM has no list of decoder blocks: not supported"
    with pytest.raises(InputError, match=told):
        find_targets(model)


# --- names and digests -----------------------------------------------------------------------


def test_parameter_names_and_digest():
    model = zoo.tiny("phi")
    plain, joint = find_targets(model), find_targets(model, joint_bias=True)
    assert parameter_names(plain) == zoo.FAMILIES["phi"].weights
    assert set(parameter_names(joint)) - set(parameter_names(plain)) == {t.bias for t in joint}
    before = digest_weights(model, parameter_names(plain))
    assert digest_weights(model, parameter_names(plain)[::-1]) == before
    assert digest_weights(model, parameter_names(joint)) != before
    with torch.no_grad():
        plain[2].module.bias[0] += 1
        assert digest_weights(model, parameter_names(plain)) == before
        plain[2].module.weight[1, 2] += 1e-12
    assert digest_weights(model, parameter_names(plain)) != before
    assert digest_weights(model.float(), parameter_names(plain)) != before
