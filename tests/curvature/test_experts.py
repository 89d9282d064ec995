"""Experts of a mixture: gradients, curvature and updates, in float64, against slow oracles."""

from __future__ import annotations

import pytest
import torch
import zoo
from helpers import (
    VOCABULARY,
    Counted,
    flat,
    one_of_all_draws,
    random_sequences,
    relative_error,
    same_bits,
)
from oracles import loops
from oracles.dense import flatten, gauss_newton_matrix
from torch import Tensor
from zoo.mixtures import mixture

import kfade
from kfade import EKFAC, KFAC, InputError, Update, find_targets, make_batches, margin
from kfade.curvature.curvature import Curvature
from kfade.curvature.draws import square_root_draw
from kfade.curvature.fit import COVARIANCE_STREAM, EIGENVALUE_STREAM
from kfade.curvature.groups import group_by_input, group_targets
from kfade.curvature.product import gauss_newton_product, quadratic_form
from kfade.curvature.store import Store
from kfade.data.sequences import TokenSequence
from kfade.method.gradient import forget_gradient
from kfade.models.experts import ExpertLayer, is_expert_layer, routed
from kfade.models.weights import Weights

SEQUENCES = random_sequences(60)
# As in test_theory.py: float64 in another order, and the least that a wrong formula is off.
EXACT, PLAIN = 1e-11, 1e-2
# The models themselves compute rotary angles, the norms and the softmax of routers in float32.
SINGLE = 1e-6


@pytest.fixture(params=["mixtral", "gpt_oss", "qwen3_moe"])
def model(request):
    return mixture(request.param)


@pytest.fixture(params=[False, True], ids=["weights", "joint bias"])
def biased(request):
    """gpt-oss stores matrices as [I, O], with biases."""
    model = mixture("gpt_oss")
    return model, find_targets(model, joint_bias=request.param)


def slices(whole: dict[str, Tensor], targets) -> dict[str, Tensor]:
    """Matrices of targets, from changes or gradients of whole parameters."""
    found = {}
    for target in targets:
        parts = {}
        for name in (target.name, target.bias):
            if name is not None:
                base, _, number = name.removesuffix("]").partition("[")
                parts[name] = whole[base][int(number)]
        found[target.name] = target.from_parameters(parts)
    return found


# --- the layers run as maps -----------------------------------------------------------------------


def test_a_layer_through_its_maps_is_the_layer(model):
    tokens_BT = torch.arange(21).reshape(3, 7) % VOCABULARY
    layers = [ExpertLayer(m) for m in model.modules() if is_expert_layer(m)]
    assert len(layers) == 2
    before = model(tokens_BT).logits
    ran = []
    for map_ in layers[0].maps:
        map_.register_forward_hook(lambda module, args, out: ran.append(len(args[0])))
    with routed(layers):
        through = model(tokens_BT).logits
    assert relative_error(through, before) < EXACT
    assert sum(ran) == 2 * 2 * tokens_BT.numel()  # two maps, two experts for each position
    assert same_bits(model(tokens_BT).logits, before)
    assert len(ran) == 8
    assert not any("_kfade" in name for m in model.modules() for name in vars(m))


def test_all_experts_are_targets(model):
    targets = find_targets(model)
    assert len(targets) == 16
    assert all(target.is_routed for target in targets)
    assert [t.name for t in find_targets(model, experts="1,3", layers="0")] == [
        f"model.layers.0.mlp.experts.{kind}_proj[{e}]"
        for kind in ("gate_up", "down")
        for e in (1, 3)
    ]
    assert [t.name for t in find_targets(model, experts="2", pattern="*.1.*experts.down_proj")] == [
        "model.layers.1.mlp.experts.down_proj[2]"
    ]
    some = find_targets(model, experts="none")
    assert not any(target.is_routed for target in some)
    with pytest.raises(InputError, match=r"--experts 4: .*mlp\.experts has experts 0 to 3"):
        find_targets(model, experts="4")
    with pytest.raises(InputError, match="--experts top: write expert numbers as 3-6"):
        find_targets(model, experts="top")


# --- gradients and products -----------------------------------------------------------------------


def test_gradient_equals_autograd(model):
    targets, batches = find_targets(model), make_batches(SEQUENCES[:20], budget=40)
    gradient = forget_gradient(model, batches, targets, margin)
    own = dict(model.named_parameters())
    for parameter in own.values():
        parameter.requires_grad_()
    loops.mean_objective(model, SEQUENCES[:20], margin).backward()
    expected = slices({name: p.grad for name, p in own.items()}, targets)
    for target in targets:
        assert relative_error(gradient[target.name], expected[target.name]) < 1e-10
    assert relative_error(gradient[targets[0].name], expected[targets[1].name]) > PLAIN


def test_products_equal_the_dense_matrix(biased):
    model, every = biased
    batches = make_batches(SEQUENCES[:12], budget=40)
    targets = [t for t in every if t.module.expert in (0, 2)]
    torch.manual_seed(1)
    delta = {t.name: torch.randn(t.shape, dtype=torch.float64) for t in targets}
    g = gauss_newton_matrix(model, batches, targets)
    flat_delta = flatten(delta, targets)
    form = quadratic_form(model, batches, targets, delta)
    assert form == pytest.approx((flat_delta @ g @ flat_delta).item(), rel=SINGLE)
    product = gauss_newton_product(model, batches, targets, delta)
    assert relative_error(flatten(product, targets), g @ flat_delta) < SINGLE
    alone = sum(quadratic_form(model, batches, [t], {t.name: delta[t.name]}) for t in targets)
    assert abs(alone / form - 1) > PLAIN  # experts act on one another


# --- fits -----------------------------------------------------------------------------------------


def looped_factors(model, targets, stream) -> dict[str, tuple[Tensor, Tensor, int]]:
    """{target: (Σ g gᵀ, Σ a aᵀ, rows)}, one row at a time, with the library's own layers."""
    layers = {id(t.module.layer): t.module.layer for t in targets}
    by_map = {(id(t.module.layer), t.module.parameter, t.module.expert): t for t in targets}
    found = {}
    for t in targets:
        s_sum, a_sum = (torch.zeros(width, width).double() for width in t.shape)
        found[t.name] = [s_sum, a_sum, 0]
    seen = {}

    def note(layer):
        return lambda module, args, out: seen.update({id(layer): (args, out)})

    for index, sequence in enumerate(SEQUENCES):
        handles = [layer.module.register_forward_hook(note(layer)) for layer in layers.values()]
        logits = loops.sequence_logits(model, sequence)
        for handle in handles:
            handle.remove()
        scalar = loops.pseudo_log_likelihood(logits, sequence, index, square_root_draw, 3, stream)
        outs = torch.autograd.grad(scalar, [seen[key][1] for key in layers])
        live = max(loops.loss_positions(sequence)) + 1
        for (key, layer), g_TD in zip(layers.items(), outs, strict=True):
            (hidden_TD, chosen_TK, weights_TK), _ = seen[key]
            for t in range(live):
                for e, w in zip(chosen_TK[t].tolist(), weights_TK[t].tolist(), strict=True):
                    a = hidden_TD[t].detach()
                    first, second = layer.first[e], layer.second[e]
                    x = (first(a[None])[0]).detach().requires_grad_()
                    inner = layer.module._apply_gate(x[None])[0]
                    g = w * g_TD.reshape(-1, a.numel())[t]
                    [g_x] = torch.autograd.grad((second(inner[None])[0] * g).sum(), x)
                    for map_, rows, grad in ((first, a, g_x), (second, inner.detach(), g)):
                        target = by_map.get((key, map_.parameter, e))
                        if target is None:
                            continue
                        rows = target.inputs(rows)
                        sums = found[target.name]
                        sums[0] += torch.outer(grad, grad)
                        sums[1] += torch.outer(rows, rows)
                        sums[2] += 1
    return found


def fitted_and_looped(model, targets):
    """(K-FAC's fit, what :func:`looped_factors` sums, loss tokens, live positions)."""
    curvature = KFAC().fit(model, make_batches(SEQUENCES, budget=60), targets, seed=3)
    for parameter in model.parameters():
        parameter.requires_grad_()
    looped = looped_factors(model, targets, COVARIANCE_STREAM)
    loss_tokens = sum(s.loss_tokens for s in SEQUENCES)
    return curvature, looped, loss_tokens, sum(s.live for s in SEQUENCES)


def test_factors_equal_a_loop_over_rows(biased):
    """S over all loss tokens, A over the rows of the expert."""
    model, targets = biased
    curvature, looped, loss_tokens, positions = fitted_and_looped(model, targets)
    for t in targets:
        s_sum, a_sum, rows = looped[t.name]
        assert 0 < rows < positions
        ours = loops.block_matrix(curvature.blocks[t.name], t.shape)
        assert relative_error(ours, torch.kron(s_sum / loss_tokens, a_sum / rows)) < 1e-9
        # Not over all positions, and not the gradient's sum over the rows.
        for wrong in (
            torch.kron(s_sum / loss_tokens, a_sum / positions),
            torch.kron(s_sum / rows, a_sum / rows),
        ):
            assert relative_error(ours, wrong) > PLAIN


def weight_gradients(model, targets, stream) -> list[dict[str, Tensor]]:
    own = dict(model.named_parameters())
    names = {target.name.partition("[")[0] for target in targets}
    names |= {t.bias.partition("[")[0] for t in targets if t.bias is not None}
    found = []
    for index, sequence in enumerate(SEQUENCES):
        logits = loops.sequence_logits(model, sequence)
        scalar = loops.pseudo_log_likelihood(logits, sequence, index, square_root_draw, 3, stream)
        gradients = torch.autograd.grad(scalar, [own[name] for name in names])
        found.append(slices(dict(zip(names, gradients, strict=True)), targets))
    return found


def test_eigenvalues_equal_a_loop_over_sequences(biased):
    model, targets = biased
    curvature = EKFAC().fit(model, make_batches(SEQUENCES, budget=60), targets, seed=3)
    loss_tokens = sum(s.loss_tokens for s in SEQUENCES)
    for parameter in model.parameters():
        parameter.requires_grad_()
    gradients = weight_gradients(model, targets, EIGENVALUE_STREAM)
    for t in targets:
        block = curvature.blocks[t.name]
        looped = loops.eigenvalues(gradients, loss_tokens, t.name, block)
        assert relative_error(block.eigenvalues, looped) < 1e-9
        summed = [{t.name: sum(gradient[t.name] for gradient in gradients)}]
        wrong = loops.eigenvalues(summed, loss_tokens, t.name, block)
        assert relative_error(block.eigenvalues, wrong) > PLAIN


def test_kfac_is_exact_where_each_expert_sees_one_input():
    """One position a sequence, each token always by the same expert: a is constant for each, so S
    and A factorise. They do so only with A over the rows of the expert."""
    model = mixture("mixtral", experts=3, each=1)
    targets = find_targets(model, layers="0")
    layer = targets[0].module.layer
    chosen = {}
    handle = layer.module.register_forward_hook(
        lambda m, args, out: chosen.update(experts=args[1].flatten().tolist())
    )
    model(torch.arange(VOCABULARY)[:, None])
    handle.remove()
    tokens = {expert: token for token, expert in enumerate(chosen["experts"])}
    assert len(tokens) > 1
    sequences = [
        TokenSequence((token, 1), (False, True))
        for number, token in enumerate(tokens.values())
        for _ in range(2 + number)
    ]
    targets = [t for t in targets if t.module.expert in tokens]
    batches = make_batches(sequences)
    totals = {t.name: 0.0 for t in targets}
    for k in range(VOCABULARY):
        curvature = KFAC(one_of_all_draws(k)).fit(model, batches, targets)
        for t in targets:
            totals[t.name] += loops.block_matrix(curvature.blocks[t.name], t.shape)
    for t in targets:
        exact = gauss_newton_matrix(model, batches, [t])
        assert relative_error(totals[t.name], exact) < SINGLE
        rows = sum(s.tokens[0] == tokens[t.module.expert] for s in sequences)
        over_all = totals[t.name] * rows / len(sequences)  # A over all positions
        assert relative_error(over_all, exact) > PLAIN


# --- one input factor for the experts of a layer --------------------------------------------------


def test_shared_inputs_equal_a_loop_over_rows(biased):
    """A over the rows of all experts: a position counts once for each of its two experts."""
    model, own = biased
    targets = find_targets(model, joint_bias=own[0].bias is not None, shared_inputs=True)
    curvature, looped, loss_tokens, positions = fitted_and_looped(model, targets)
    units = group_by_input(targets)
    assert [len(unit) for unit in units] == [4] * 4
    for unit in units:
        a_sum = sum(looped[t.name][1] for t in unit)
        rows = sum(looped[t.name][2] for t in unit)
        assert rows == 2 * positions
        each = [looped[t.name][1] / looped[t.name][2] for t in unit]
        for t, own_a in zip(unit, each, strict=True):
            s = looped[t.name][0] / loss_tokens
            ours = loops.block_matrix(curvature.blocks[t.name], t.shape)
            assert relative_error(ours, torch.kron(s, a_sum / rows)) < 1e-9
            # Not over positions or loss tokens, not the mean over experts, not the expert's own.
            for wrong in (a_sum / positions, a_sum / loss_tokens, sum(each) / len(unit), own_a):
                assert relative_error(ours, torch.kron(s, wrong)) > PLAIN
            assert curvature.blocks[t.name].q_in is curvature.blocks[unit[0].name].q_in


def test_eigenvalues_of_shared_inputs_are_those_of_each_expert(model):
    targets = find_targets(model, layers="1", shared_inputs=True)
    curvature = EKFAC().fit(model, make_batches(SEQUENCES, budget=60), targets, seed=3)
    loss_tokens = sum(s.loss_tokens for s in SEQUENCES)
    for parameter in model.parameters():
        parameter.requires_grad_()
    gradients = weight_gradients(model, targets, EIGENVALUE_STREAM)
    for t, other in zip(targets, [*targets[1:], targets[0]], strict=True):
        block = curvature.blocks[t.name]
        looped = loops.eigenvalues(gradients, loss_tokens, t.name, block)
        assert relative_error(block.eigenvalues, looped) < 1e-9
        if other.shape == t.shape:
            wrong = loops.eigenvalues(gradients, loss_tokens, other.name, block)
            assert relative_error(block.eigenvalues, wrong) > PLAIN


def test_shared_inputs_keep_the_trace_where_inputs_are_of_one_length():
    """tr(S ⊗ A) = tr(S) tr(A), and tr(A) is the mean of |a|². Where all rows have the same |a|, as
    after a norm, and each sequence one row, it is the exact trace (1/N) Σ |g|² |a|² for every
    expert: the predicted KL, in nats per loss token, is right on average over directions."""
    model = mixture("mixtral")
    norm = model.model.layers[0].post_attention_layernorm
    torch.nn.init.ones_(norm.weight)
    norm.variance_epsilon = 0.0
    sequences = [TokenSequence((token, 1), (False, True)) for token in range(8)]
    batches = make_batches(sequences)
    targets = find_targets(model, pattern="*.0.*.gate_up_proj", shared_inputs=True)
    traces = dict.fromkeys([t.name for t in targets], 0.0)
    for k in range(VOCABULARY):
        curvature = KFAC(one_of_all_draws(k)).fit(model, batches, targets)
        for t in targets:
            traces[t.name] += curvature.blocks[t.name].eigenvalues.sum().item()
    for t in targets:
        exact = gauss_newton_matrix(model, batches, [t]).trace().item()
        assert traces[t.name] == pytest.approx(exact, rel=SINGLE)
        over_positions = 2 * traces[t.name]  # each position goes to two experts
        assert abs(over_positions / exact - 1) > PLAIN


@pytest.mark.parametrize("fit", [KFAC, EKFAC])
def test_experts_with_the_same_rows_have_the_curvature_of_their_own(fit):
    """Two experts, and every position goes to both."""
    model, batches = mixture("mixtral", experts=2), make_batches(SEQUENCES, budget=60)

    def errors():
        own, shared = find_targets(model), find_targets(model, shared_inputs=True)
        one, other = (fit().fit(model, batches, targets).blocks for targets in (own, shared))
        found = {"gate_up": [], "down": []}
        for t in own:
            pair = (loops.block_matrix(blocks[t.name], t.shape) for blocks in (one, other))
            found["down" if "down" in t.name else "gate_up"].append(relative_error(*pair))
        return found

    before = errors()
    assert max(before["gate_up"]) < 1e-8  # eigenvectors
    assert min(before["down"]) > PLAIN  # their inner activations differ
    for layer in model.model.layers:
        layer.mlp.experts.gate_up_proj.data[1] = layer.mlp.experts.gate_up_proj.data[0]
    after = errors()
    assert max(*after["gate_up"], *after["down"]) < 1e-8


@pytest.mark.parametrize(
    ("fit", "shared"), [(KFAC, False), (EKFAC, False), (EKFAC, True), (kfade.Diagonal, False)]
)
def test_fit_does_not_depend_on_batches_and_padding(model, fit, shared):
    targets = find_targets(model, shared_inputs=shared)
    one, other = (
        fit().fit(model, make_batches(SEQUENCES, budget=budget), targets) for budget in (9, 90)
    )
    for t in targets:
        ours, theirs = (loops.block_matrix(c.blocks[t.name], t.shape) for c in (one, other))
        assert relative_error(ours, theirs) < 1e-8  # eigenvectors


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_an_expert_without_rows_is_refused(shared):
    model = mixture("mixtral", experts=8, each=1)
    targets = find_targets(model, shared_inputs=shared)
    with pytest.raises(InputError, match=r"no retain text reaches .*experts.*\[\d\]"):
        EKFAC().fit(model, make_batches(SEQUENCES[:1]), targets)


# --- updates --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kl", [1e-9, 1e-8])
def test_a_step_changes_what_it_predicts(model, kl):
    targets = find_targets(model)
    update = kfade.unlearn(
        model,
        forget=SEQUENCES[:5],
        retain=SEQUENCES[5:],
        held_out=SEQUENCES[5:30],
        **flat(targets=targets, kl=kl, batch_tokens=60),
    )
    [step] = update.provenance["steps"]
    assert step["exact_kl"] == pytest.approx(step["measured_kl"], rel=0.02)
    assert step["measured_objective_change"] == pytest.approx(
        step["predicted_objective_change"], rel=0.02
    )


def test_an_update_changes_the_chosen_experts_alone(model, tmp_path):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    targets = find_targets(model, experts="1")
    update = kfade.unlearn(
        model,
        forget=SEQUENCES[:5],
        retain=SEQUENCES[5:],
        held_out=SEQUENCES[5:30],
        **flat(targets=targets, alpha=0.01, batch_tokens=60),
    )
    assert all(same_bits(before[name], p.detach()) for name, p in model.named_parameters())
    assert list(update.deltas) == [target.name for target in targets]
    assert all(update.deltas[t.name].shape == t.weight.shape for t in targets)
    update.save(tmp_path / "update.safetensors")
    loaded = Update.load(tmp_path / "update.safetensors")
    assert loaded.compare_base(model) == "same"
    with loaded.applied_to(model):
        pass
    assert all(same_bits(before[name], p.detach()) for name, p in model.named_parameters())
    loaded.apply(model)
    for name, parameter in model.named_parameters():
        moved = (
            (parameter.detach() != before[name]).flatten(1).any(1)
            if parameter.ndim > 2
            else (parameter.detach() != before[name])
        )
        expected = [False, True, False, False] if parameter.ndim > 2 else False
        assert moved.tolist() == expected if parameter.ndim > 2 else not moved.any()
    assert loaded.is_in(model) is None  # its digest of edited weights is added by a run
    loaded.revert(model)
    for name, parameter in model.named_parameters():
        assert relative_error(parameter.detach(), before[name]) < 1e-14
    with pytest.raises(InputError, match=r"experts.gate_up_proj\[1\], which LlamaForCausalLM does"):
        loaded.apply(zoo.tiny("llama"))
    assert "model.layers.0.mlp.experts.gate_up_proj[9]" not in Weights(model)


def test_a_step_may_take_the_experts_that_carry_most(model):
    """gᵀ(G̃ + λI)⁻¹g over both matrices of an expert, layer by layer."""
    targets = [*find_targets(model), *find_targets(model, pattern="*.o_proj.weight")]
    options = flat(fit=EKFAC(), targets=targets, alpha=0.01, batch_tokens=60, exact_norm=False)
    sets = {"forget": SEQUENCES[:5], "retain": SEQUENCES[5:], "held_out": SEQUENCES[5:30]}
    curvature = EKFAC().fit(model, make_batches(SEQUENCES[5:], budget=60), targets)
    gradient = forget_gradient(model, make_batches(SEQUENCES[:5]), targets, margin)
    # Relative damping would differ below, where fewer experts are fitted.
    damping = kfade.Damping(0.1 * curvature.ridge(targets[0].name, kfade.Damping(1.0)), False)
    solved = curvature.solve(gradient, damping)
    best = set()
    for block in (0, 1):
        carried = {}
        for target in targets:
            if target.is_routed and target.block == block:
                share = (gradient[target.name] * solved[target.name]).sum().item()
                expert = target.module.expert
                carried[expert] = carried.get(expert, 0.0) + share
        best |= {(block, e) for e in sorted(carried, key=carried.get)[-2:]}
    direction = kfade.Direction(damping=damping, top_experts=2)
    update = kfade.unlearn(model, **sets, **{**options, "direction": direction})
    chosen = [t for t in targets if not t.is_routed or (t.block, t.module.expert) in best]
    assert set(update.deltas) == {target.name for target in chosen}
    assert len(update.deltas) == 2 * 4 + 2
    # The step is that of the chosen weights: the curvature is block-diagonal.
    own = flat(targets=chosen, alpha=0.01, batch_tokens=60, damping=damping)
    alone = kfade.unlearn(model, **sets, **{**options, **own})
    for name, delta in alone.deltas.items():
        assert relative_error(update.deltas[name], delta) < 1e-6
    with pytest.raises(InputError, match="--experts top:N does not work with --refine"):
        kfade.Direction(top_experts=2, refine=1)


def test_experts_of_a_parameter_have_one_damping(model, tmp_path):
    """A multiple of the mean eigenvalue over all of them; in memory and from files."""
    targets = [*find_targets(model), *find_targets(model, pattern="*.o_proj.weight")]
    store = Store(tmp_path)
    batches = make_batches(SEQUENCES, budget=60)
    fitted = EKFAC().fit(model, batches, targets)
    on_disk = EKFAC().fit(model, batches, targets, store=store, memory=20_000)
    assert len(list(tmp_path.glob("curvature-*"))) > 1  # groups divide a parameter's experts
    means: dict[str, list[float]] = {}
    for target in targets:
        mean = fitted.blocks[target.name].eigenvalues.mean().item()
        means.setdefault(target.name.partition("[")[0], []).append(mean)
    for target in targets:
        own = means[target.name.partition("[")[0]]
        right = 0.3 * sum(own) / len(own)
        for curvature in (fitted, on_disk, Curvature.load(tmp_path)):
            ridge = curvature.ridge(target.name, kfade.Damping(0.3))
            assert ridge == pytest.approx(right, rel=1e-6)  # sums over groups in another order
            assert curvature.ridge(target.name, kfade.Damping(0.3, relative=False)) == 0.3
        if target.is_routed:
            alone = fitted.only([target.name], "cpu").ridge(target.name, kfade.Damping(0.3))
            assert alone != pytest.approx(right, rel=1e-3)


@pytest.mark.parametrize(
    ("model", "shared"),
    [("mixtral", False), ("gpt_oss", False), ("qwen3_moe", False), ("mixtral", True)],
    indirect=["model"],
)
def test_blocks_that_run_again_and_groups_of_layers_give_the_same(model, shared):
    targets = find_targets(model, shared_inputs=shared)
    batches = make_batches(SEQUENCES, budget=60)
    plain, again = (
        forget_gradient(model, batches, targets, margin, recompute=twice) for twice in (False, True)
    )
    assert all(same_bits(plain[name], again[name]) for name in plain)
    whole = KFAC().fit(model, batches, targets)
    memory = max(KFAC().peak_bytes(unit) for unit in group_by_input(targets))
    assert len(group_targets(targets, KFAC().peak_bytes, memory)) > 1
    groups = KFAC().fit(model, batches, targets, memory=memory, recompute=True)
    for name, block in whole.blocks.items():
        assert same_bits(groups.blocks[name].eigenvalues, block.eigenvalues)


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_an_interrupted_fit_of_experts_goes_on(tmp_path, shared):
    """With the numbers of rows that were counted before."""
    model = mixture("mixtral")
    targets = find_targets(model, shared_inputs=shared)
    batches = make_batches(SEQUENCES, budget=60)
    store = Store(tmp_path, seconds=0.0)
    with pytest.raises(RuntimeError):
        KFAC(Counted(fail_at=3)).fit(model, batches, targets, store=store)
    rest = Counted()
    resumed = KFAC(rest).fit(model, batches, targets, store=store)
    assert rest.calls == len(batches) - 2
    whole = KFAC().fit(model, batches, targets)
    for name, block in whole.blocks.items():
        assert same_bits(resumed.blocks[name].eigenvalues, block.eigenvalues)
