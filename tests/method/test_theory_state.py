"""What computing must leave as it was (the model), and what files must bring back (the numbers)."""

from __future__ import annotations

import json
import re

import pytest
import torch
from helpers import Snapshot, Tripwire, flat, random_sequences, same_bits, tiny_llama
from safetensors import safe_open

import kfade
from kfade import (
    EKFAC,
    KFAC,
    Curvature,
    Damping,
    Diagonal,
    Identity,
    InputError,
    Update,
    cross_entropy,
    find_targets,
    margin,
    sampled_labels,
)
from kfade.curvature.block import EigenBlock
from kfade.curvature.product import gauss_newton_product, quadratic_form
from kfade.method.gauge import parameter_changes
from kfade.method.gradient import forget_gradient
from kfade.method.measure import hidden_reference

# --- 9. The model is bit-identical afterwards ---------------------------------------------------


def directions(targets) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {t.name: torch.randn(t.shape, dtype=torch.float64, generator=generator) for t in targets}


def run(model, batches, targets, **options):
    data = {"retain": random_sequences(3), "held_out": random_sequences(2, seed=1)}
    options = {"batch_tokens": 10, "targets": targets, **options}
    options = {"alpha": 0.1, "steps": 2, "refine": 1, **options}
    return kfade.unlearn(model, forget=random_sequences(2, seed=2), **data, **flat(**options))


COMPUTATIONS = {
    "identity": Identity().fit,
    "diagonal": Diagonal().fit,
    "K-FAC": KFAC().fit,
    "EK-FAC": EKFAC().fit,
    "gradient of margin": lambda m, b, t: forget_gradient(m, b, t, margin),
    "gradient of cross_entropy": lambda m, b, t: forget_gradient(m, b, t, cross_entropy),
    "quadratic_form": lambda m, b, t: quadratic_form(m, b, t, directions(t)),
    "gauss_newton_product": lambda m, b, t: gauss_newton_product(m, b, t, directions(t)),
    "hidden_reference": lambda m, b, t: hidden_reference(m, b, "reference"),
    "find_targets": lambda m, b, t: find_targets(m),
    "unlearn": run,
}
GRADIENT_FREE = ("identity", "quadratic_form", "hidden_reference", "find_targets")


@pytest.fixture
def used_model():
    """A model in a state that no computation would choose: training in part, frozen in part, and
    with a hook of its user's."""
    model = tiny_llama()
    model.train()
    model.model.layers[0].mlp.eval()
    model.model.layers[1].self_attn.requires_grad_(False)
    model.lm_head.register_forward_pre_hook(lambda module, args: None)
    return model


def test_a_snapshot_sees_every_kind_of_change():
    def change_a_bit(m):
        weight = m.lm_head.weight.data
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0).double())

    def negate_a_zero(m):
        m.lm_head.weight.data[0, 1] *= -1

    def replace_a_parameter(m):
        m.lm_head.weight = torch.nn.Parameter(m.lm_head.weight.detach().clone())

    def leave_a_gradient(m):
        m.lm_head.weight.grad = torch.zeros_like(m.lm_head.weight)

    changes = {
        "bits of lm_head.weight": (change_a_bit, negate_a_zero),
        "identities": (replace_a_parameter,),
        "flags": (lambda m: m.lm_head.requires_grad_(False),),
        "modes": (lambda m: m.model.norm.train(),),
        "hooks": (lambda m: m.model.norm.register_forward_hook(print),),
        "grad of lm_head.weight": (leave_a_gradient,),
    }
    for expected, ways in changes.items():
        for change in ways:
            model = tiny_llama()
            model.lm_head.weight.data[0, 1] = 0.0
            before = Snapshot.of(model)
            assert before.differences(model) == []
            change(model)
            assert before.differences(model) == [expected]


@pytest.mark.parametrize("compute", COMPUTATIONS.values(), ids=COMPUTATIONS)
def test_computing_leaves_the_model_as_it_was(used_model, batches, compute):
    targets = find_targets(used_model)
    before = Snapshot.of(used_model)
    compute(used_model, batches, targets)
    assert before.differences(used_model) == []


def trip(model, batches, compute, **where) -> bool:
    """Run ``compute`` with a tripwire in the last block; whether it went off.

    Either way the model must be as it was before.
    """
    mlp = model.model.layers[1].mlp
    if not isinstance(mlp.act_fn, Tripwire):
        mlp.act_fn = Tripwire(mlp.act_fn).train()
    wire, targets = mlp.act_fn, find_targets(model)
    wire.forwards = wire.backwards = 0
    wire.forward_at, wire.backward_at = where.get("forward", 0), where.get("backward", 0)
    before = Snapshot.of(model)
    message = "none"
    try:
        compute(model, batches, targets)
    except (RuntimeError, InputError) as error:  # where tokens are tried, it is told in a line
        told = re.search(r"tripped in \w+", str(error))
        message = told[0] if told else str(error)
    assert message in ("none", "tripped in forward", "tripped in backward")
    assert before.differences(model) == []
    return message != "none"


@pytest.mark.parametrize("name", [n for n in COMPUTATIONS if n != "identity"])
def test_an_exception_in_any_forward_pass_leaves_the_model_as_it_was(used_model, batches, name):
    compute, count = COMPUTATIONS[name], 0
    stride = 7 if name == "unlearn" else 1  # it has over a hundred
    while trip(used_model, batches, compute, forward=count + 1):
        count += stride
    assert count >= (1 if name == "find_targets" else len(batches))


@pytest.mark.parametrize("name", COMPUTATIONS)
def test_an_exception_in_any_backward_pass_leaves_the_model_as_it_was(used_model, batches, name):
    compute, count = COMPUTATIONS[name], 0
    stride = 3 if name == "unlearn" else 1
    while trip(used_model, batches, compute, backward=count + 1):
        count += stride
    assert count == 0 if name in GRADIENT_FREE else count >= len(batches)


@pytest.mark.parametrize("estimator", [Diagonal, KFAC, EKFAC])
def test_an_exception_in_a_draw_leaves_the_model_as_it_was(used_model, batches, estimator):
    """Between forward and backward, in the second batch."""
    calls = 0

    def failing(p_NV, key_N):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("the draw failed")
        return sampled_labels(p_NV, key_N)

    targets = find_targets(used_model)
    before = Snapshot.of(used_model)
    with pytest.raises(RuntimeError, match="the draw failed"):
        estimator(failing).fit(used_model, batches, targets)
    assert before.differences(used_model) == []


def test_nothing_of_a_failed_computation_stays_behind(used_model, batches):
    """The same numbers come out after a failure as without one."""
    fresh = EKFAC().fit(used_model, batches, find_targets(used_model))
    assert trip(used_model, batches, EKFAC().fit, forward=3)
    assert trip(used_model, batches, EKFAC().fit, backward=2)
    used_model.model.layers[1].mlp.act_fn.backward_at = 0
    again = EKFAC().fit(used_model, batches, find_targets(used_model))
    for name, block in fresh.blocks.items():
        assert same_bits(block.eigenvalues, again.blocks[name].eigenvalues)


def test_a_model_in_training_is_computed_with_in_evaluation_mode(batches):
    """Dropout would make every number random."""
    fits = []
    for training in (False, True):
        model = tiny_llama().train(training)
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.5
        fits.append(EKFAC().fit(model, batches, find_targets(model)))
    for name, block in fits[0].blocks.items():
        assert same_bits(block.eigenvalues, fits[1].blocks[name].eigenvalues)
    tokens = torch.tensor([[1, 2, 3, 4]])
    assert not torch.equal(model(tokens).logits, model(tokens).logits)  # it does have dropout


def test_training_goes_on_as_if_nothing_had_happened(used_model, batches):
    """A graph begun before a fit still gives its gradient; no global random number is used up."""

    def loss():
        tokens = torch.tensor([[1, 2, 3, 4]])
        return used_model(input_ids=tokens, labels=tokens).loss

    targets = find_targets(used_model)
    weights = [p for p in used_model.parameters() if p.requires_grad]
    begun, state = loss(), torch.get_rng_state()
    for fit in (Diagonal, KFAC, EKFAC):
        fit().fit(used_model, batches, targets)
    gradients = (torch.autograd.grad(x, weights) for x in (begun, loss()))
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.equal(ours, theirs)
    run(used_model, batches, targets)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    assert not torch.equal(torch.get_rng_state(), state)


@pytest.fixture
def update(model, targets) -> Update:
    """Of a size at which W + ΔW − ΔW is not W to the last bit."""
    return Update({}).plus(parameter_changes(targets, directions(targets)), 1e-3)


def test_applied_to_restores_bit_for_bit(model, update):
    before = Snapshot.of(model)
    with update.applied_to(model) as edited:
        assert edited is model
        assert before.differences(model) == [f"bits of {name}" for name in before.weights
                                             if name in update.deltas]  # fmt: skip
    assert before.differences(model) == []
    # Adding and subtracting would not: floating point does not undo itself.
    update.apply(model)
    update.revert(model)
    assert before.differences(model) != []


def test_applied_to_restores_after_an_exception(model, update):
    before = Snapshot.of(model)

    def fail_inside():
        with update.applied_to(model), (-update + update).applied_to(model):
            assert before.differences(model) != []
            raise KeyError("cut in")

    with pytest.raises(KeyError, match="cut in"):
        fail_inside()
    assert before.differences(model) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_applied_to_restores_lower_precisions(dtype):
    model = tiny_llama(dtype)
    targets = find_targets(model)
    matrices = {name: x.float() for name, x in directions(targets).items()}
    update = Update(parameter_changes(targets, matrices))
    before = Snapshot.of(model)
    with update.applied_to(model):
        assert before.differences(model) != []
    assert before.differences(model) == []


def test_an_update_of_another_shape_changes_nothing(model, update):
    before = Snapshot.of(model)
    last = list(update.deltas)[-1]
    for name, delta, message in (
        ("model.layers.9.mlp.up_proj.weight", update.deltas[last], "does not have"),
        (last, update.deltas[last][:1], "the model has"),
    ):
        wrong = Update({**update.deltas, name: delta})
        with pytest.raises(kfade.InputError, match=message):
            wrong.apply(model)
        with pytest.raises(kfade.InputError, match=message), wrong.applied_to(model):
            pass
        assert before.differences(model) == []


# --- 10. Files bring back every bit -------------------------------------------------------------


def keys_of(path) -> set[str]:
    with safe_open(path, "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("fit", [Identity, Diagonal, KFAC, EKFAC])
def test_curvature_comes_back_exactly(model, batches, targets, fit, tmp_path):
    curvature = fit().fit(model, batches, targets)
    curvature.save(tmp_path / "c.safetensors")
    loaded = Curvature.load(tmp_path / "c.safetensors")
    assert loaded.provenance == curvature.provenance
    assert list(loaded.blocks) == list(curvature.blocks)
    for name, block in curvature.blocks.items():
        for part in ("q_out", "q_in", "eigenvalues"):
            ours, theirs = getattr(block, part), getattr(loaded.blocks[name], part)
            assert (ours is None) == (theirs is None)
            assert ours is None or same_bits(ours, theirs)
    x = directions(targets)
    solved = (c.solve(x, damping=Damping()) for c in (curvature, loaded))
    for ours, theirs in zip(*(s.values() for s in solved), strict=True):
        assert torch.equal(ours, theirs)
    other = fit().fit(model, batches, targets, seed=1)
    if fit is not Identity:
        assert not any(
            same_bits(block.eigenvalues, loaded.blocks[name].eigenvalues)
            for name, block in other.blocks.items()
        )


def test_shared_bases_are_stored_once_and_read_by_all(model, batches, targets, tmp_path):
    curvature = EKFAC().fit(model, batches, targets)
    # In each of 2 blocks: 3 grids, 3 q_out, and 2 q_in, gate and up having one.
    curvature.save(tmp_path / "shared.safetensors")
    assert len(keys_of(tmp_path / "shared.safetensors")) == 2 * (3 + 3 + 2)
    copies = {
        name: EigenBlock(b.q_out, b.q_in.clone(), b.eigenvalues)
        for name, b in curvature.blocks.items()
    }
    Curvature(copies).save(tmp_path / "copies.safetensors")
    assert len(keys_of(tmp_path / "copies.safetensors")) == 2 * (3 + 3 + 3)
    shared = Curvature.load(tmp_path / "shared.safetensors")
    for t in targets:
        assert same_bits(shared.blocks[t.name].q_in, curvature.blocks[t.input_of].q_in)


def test_update_comes_back_exactly(model, batches, targets, tmp_path):
    update = run(model, batches, targets)
    update.save(tmp_path / "update.safetensors")
    assert keys_of(tmp_path / "update.safetensors") == {t.name for t in targets}
    for loaded in (Update.load(tmp_path), Update.load(tmp_path / "update.safetensors")):
        assert loaded.provenance == update.provenance
        assert loaded.deltas.keys() == update.deltas.keys()
        assert all(same_bits(d, loaded.deltas[name]) for name, d in update.deltas.items())
        assert loaded.fits_base(model)
        with update.applied_to(model):
            edited = Snapshot.of(model)
            assert not loaded.fits_base(model)
        with loaded.applied_to(model):
            assert edited.differences(model) == []
    assert edited.differences(model) != []
    # Every number of the record survives as JSON.
    assert json.loads(json.dumps(update.provenance)) == update.provenance


def test_files_of_another_kind_are_refused(model, batches, targets, update, tmp_path):
    Identity().fit(model, batches, targets).save(tmp_path / "curvature.safetensors")
    update.save(tmp_path / "update.safetensors")
    half = (tmp_path / "update.safetensors").read_bytes()[:100]
    (tmp_path / "half.safetensors").write_bytes(half)
    for load, wrong in ((Update.load, "curvature"), (Curvature.load, "update")):
        with pytest.raises(kfade.InputError, match=r"not an? \w+ file of this version"):
            load(tmp_path / f"{wrong}.safetensors")
        with pytest.raises(kfade.InputError, match="not a whole safetensors file"):
            load(tmp_path / "half.safetensors")
        with pytest.raises(kfade.InputError, match="no such"):
            load(tmp_path / "nothing.safetensors")
