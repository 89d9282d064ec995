"""`kfade plan`: sizes worked out by hand, and predictions held beside real tiny fits."""

from __future__ import annotations

import contextlib
import json
import weakref
from dataclasses import replace

import pytest
import torch
import zoo
from helpers import random_sequences, tiny_llama
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import (
    FlopCounterMode,
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MixtralConfig,
    PhiConfig,
)

import kfade.planning.cost
from kfade.cli import main
from kfade.cli.plan_page import duration, size
from kfade.curvature.capture import capture
from kfade.curvature.draws import square_root_draw
from kfade.curvature.eigh import PROBES, workspace_bytes
from kfade.curvature.estimators import EKFAC, KFAC, Diagonal, Identity
from kfade.curvature.factors import factor_bytes, widths
from kfade.curvature.groups import group_by_input, group_targets
from kfade.curvature.owners import Owners
from kfade.curvature.recompute import recomputing
from kfade.curvature.store import Store
from kfade.curvature.sums import Covariances, Eigenvalues
from kfade.data.batches import make_batches
from kfade.data.sequences import TokenSequence
from kfade.errors import InputError
from kfade.models.head import hidden_states, read_head
from kfade.models.layers import find_targets
from kfade.models.load import frozen, load_skeleton
from kfade.planning.cost import EIGH_FLOPS, Speed, flops, lambda_flops, measure_speed, seconds
from kfade.planning.cost import symmetric_flops as symmetric
from kfade.planning.memory import (
    RUNTIME_BYTES,
    Work,
    curvature_budget,
    examine,
    fit_overhead,
    model_bytes,
    peaks,
)
from kfade.planning.trace import trace_pass
from kfade.runtime.distributed import assign_by_cost

CPU = torch.device("cpu")

LLAMA_7B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    vocab_size=32000,
    dtype="bfloat16",
)
LLAMA_70B = LlamaConfig(
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    vocab_size=32000,
    dtype="bfloat16",
)
ZEPHYR = MistralConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=32000,
    dtype="bfloat16",
)
PHI = PhiConfig(
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=24,
    num_attention_heads=32,
    vocab_size=51200,
    dtype="float32",
)
SMALL = LlamaConfig(  # wide enough that products are cut into panels and headers are small
    hidden_size=64,
    intermediate_size=224,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=50,
    max_position_embeddings=64,
    initializer_range=0.3,
)


def saved(config, folder) -> str:
    config.save_pretrained(folder)
    return str(folder)


def small(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(SMALL).to(dtype).eval()


def packed(count: int, length: int) -> list[TokenSequence]:
    """Sequences of one length, every token scored."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 50, (count, length), generator=generator).tolist()
    return [TokenSequence(tuple(row), (False, *[True] * (length - 1))) for row in tokens]


# What is held and counted depends on the kernel: up to torch 2.8 the CPU's fused attention
# knows no grouped queries, so that keys are repeated or scores are kept.
grouped = pytest.mark.skipif(
    TorchVersion(torch.__version__) < "2.10", reason="torch has no fused grouped queries on the CPU"
)


def heads_of(query, shapes):
    """Shapes [B, heads, positions, width] with the query's heads, which kernels repeat keys to."""
    return [(shape[0], query[1], *shape[2:]) for shape in shapes]


class Counter(TorchDispatchMode):
    """Flops of products, by shapes; attention as torch counts it on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name, shapes = func.__name__.split(".")[0], [getattr(a, "shape", a) for a in args]
        if name == "mm":
            self.flops += flop_registry[torch.ops.aten.mm](*args, out_val=result)
        elif name == "addmm_":
            self.flops += flop_registry[torch.ops.aten.addmm](*args, out_val=result)
        elif name == "bmm":
            self.flops += flop_registry[torch.ops.aten.bmm](*args, out_val=result)
        elif name == "_scaled_dot_product_flash_attention_for_cpu":
            self.flops += sdpa_flop_count(*heads_of(shapes[0], shapes[:3]))
        elif name == "_scaled_dot_product_flash_attention_for_cpu_backward":
            self.flops += sdpa_backward_flop_count(*heads_of(shapes[1], shapes[:4]))
        else:
            assert name not in ("addmm", "baddbmm", "convolution"), name
        return result


# --- bytes by hand -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "layers", "widths_of_a_block", "blocks", "gigabytes"),
    [
        # A of gate and up, A of down, S of gate, of up and of down.
        (LLAMA_7B, None, [4096, 11008, 11008, 11008, 4096], 32, 50.8),
        (ZEPHYR, "3-6", [4096, 14336, 14336, 14336, 4096], 4, 10.4),
        (PHI, None, [2048, 8192, 8192, 2048], 24, 13.7),
    ],
    ids=["llama-2-7b", "zephyr-7b", "phi-1.5"],
)
def test_factors_of_known_models(tmp_path, config, layers, widths_of_a_block, blocks, gigabytes):
    targets = find_targets(load_skeleton(saved(config, tmp_path)), layers=layers)
    by_hand = blocks * 4 * sum(width**2 for width in widths_of_a_block)
    assert factor_bytes(targets) == by_hand
    assert by_hand / 1e9 == pytest.approx(gigabytes, abs=0.05)


def test_a_block_of_llama_2_7b_shares_a(tmp_path):
    targets = find_targets(load_skeleton(saved(LLAMA_7B, tmp_path)), layers="0")
    assert factor_bytes(targets) / 1e9 == pytest.approx(1.59, abs=0.005)
    # Negative control: without sharing, one more A of 4096².
    alone = sum(4 * (t.shape[0] ** 2 + t.shape[1] ** 2) for t in targets)
    assert alone - factor_bytes(targets) == 4 * 4096**2


def test_bytes_of_a_fit_by_hand():
    targets = find_targets(small(torch.bfloat16))
    factors = 3 * 4 * (64**2 + 3 * 224**2 + 64**2)
    grids, largest = 3 * 3 * 4 * 64 * 224, 4 * 64 * 224
    assert EKFAC().fit_bytes(targets) == {
        "covariance": factors,
        "eigh": factors + workspace_bytes(224, 4, CPU),
        "lambda": factors + factors // 2 + grids + 2 * largest,  # a copy of the bases in bfloat16
    }
    assert EKFAC().fit_bytes(find_targets(small()))["lambda"] == factors + grids + 2 * largest
    assert Diagonal().fit_bytes(targets) == {"lambda": grids + 2 * largest}
    assert Identity().fit_bytes(targets) == {}
    assert KFAC().stored_bytes(targets) == factors + grids


def test_bytes_of_sums_are_those_of_a_fit():
    model = small(torch.bfloat16)
    targets = find_targets(model)
    owners = Owners(targets, EKFAC().peak_bytes, spread=False)
    sums = Covariances(owners).tensors()
    assert sum(t.numel() * t.element_size() for t in sums.values()) == factor_bytes(targets)
    bases = {t.name: (torch.eye(t.shape[0]), torch.eye(t.shape[1])) for t in targets}
    grids = Eigenvalues(owners, bases).tensors()
    assert (
        sum(t.numel() * t.element_size() for t in grids.values())
        == EKFAC().stored_bytes(targets) - factor_bytes(targets)
        == Diagonal().stored_bytes(targets)
    )


@pytest.mark.parametrize("kind", [KFAC, EKFAC, Diagonal])
def test_bytes_of_curvature_files(tmp_path, kind):
    model = small()
    targets = find_targets(model)
    kind().fit(model, make_batches(packed(4, 17)), targets).save(tmp_path / "curvature.safetensors")
    written = (tmp_path / "curvature.safetensors").stat().st_size
    assert kind().stored_bytes(targets) == pytest.approx(written, rel=0.03)


def test_an_identity_is_a_number_a_layer():
    targets = find_targets(small())
    curvature = Identity().fit(small(), [], targets)
    held = sum(b.eigenvalues.numel() * 4 for b in curvature.blocks.values())
    assert Identity().stored_bytes(targets) == held == 36


# --- groups ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [KFAC, EKFAC, Diagonal])
def test_more_memory_never_needs_more_groups(tmp_path, kind):
    targets = find_targets(load_skeleton(saved(SMALL, tmp_path)))
    units = group_by_input(targets)
    least = max(kind().peak_bytes(unit) for unit in units)
    most = kind().peak_bytes(targets)
    counts = []
    for step in range(41):
        budget = least + (most - least) * step // 40
        groups = group_targets(targets, kind().peak_bytes, budget)
        assert [t for group in groups for t in group] == targets
        assert all(kind().peak_bytes(group) <= budget for group in groups)
        counts.append(len(groups))
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == 1 < counts[0]
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp.* raise it"):
        group_targets(targets, kind().peak_bytes, least - 1)


def test_fewer_groups_hold_more_and_pass_less(tmp_path):
    model = load_skeleton(saved(SMALL, tmp_path))
    subject = examine(model, find_targets(model), Work(sequence_length=33, batch_tokens=64))
    work = Work(retain_tokens=330, sequence_length=33)
    one, many = [list(subject.targets)], group_by_input(subject.targets)
    assert len(many) == 6
    at_once, in_turn = (peaks(subject, groups, EKFAC()) for groups in (one, many))
    assert all(in_turn[stage] <= at_once[stage] for stage in at_once)
    assert in_turn["lambda"] < at_once["lambda"]
    few, more = (flops(subject, groups, work) for groups in (one, many))
    assert more["covariance"]["forward"] == pytest.approx(6 * few["covariance"]["forward"])
    # The highest group's backward is short, the lowest group's is the whole.
    backward = more["covariance"]["backward"] / few["covariance"]["backward"]
    assert 1 < backward < 6
    # Products and decompositions are shared out, not repeated.
    assert more["covariance"]["products"] == pytest.approx(few["covariance"]["products"])
    assert more["eigh"] == few["eigh"]


def test_peaks_by_hand(tmp_path):
    model = load_skeleton(saved(SMALL, tmp_path))
    targets = find_targets(model)
    subject = examine(model, targets, Work(sequence_length=33, batch_tokens=64))
    assert subject.cost.shape == (2, 32)
    factors, grids, largest = factor_bytes(targets), 3 * 3 * 4 * 64 * 224, 4 * 64 * 224
    parameters = 2 * 50 * 64 + 3 * (64 * 64 * 3 + 3 * 64 * 224 + 2 * 64) + 64
    fixed = RUNTIME_BYTES + 4 * parameters + 4 * 16  # and the rotary frequencies, twice 8
    assert model_bytes(model) == fixed - RUNTIME_BYTES
    held, surplus = subject.cost.held_bytes[targets[0].input_of], subject.cost.surplus_bytes
    inputs, chunk = 64 * 4 * 3 * (64 + 224), 64 * 50 * 4  # fewer positions than a whole chunk
    assert 4 * chunk < surplus  # here backward is what needs most
    found = peaks(subject, [targets], EKFAC())
    assert found["load"] == fixed
    assert found["covariance"] == fixed + factors + held + surplus
    assert found["eigh"] == fixed + factors + workspace_bytes(224, 4, CPU)
    lambda_ = fixed + factors + grids + 2 * largest + held + surplus + inputs
    assert found["lambda"] == lambda_
    assert fit_overhead(subject, EKFAC()) == lambda_ - factors - grids - 2 * largest
    assert found["gradient"] == fixed + held + surplus + inputs + grids + largest
    forward = subject.cost.forward_bytes
    layer = 4 * (64**2 + 224**2) + largest
    solve, exact = layer + 3 * grids + 4 * largest, 2 * grids + 2 * forward + 6 * chunk
    assert found["step"] == fixed + max(solve, exact)
    assert found["check"] == fixed + 4 * grids + 2 * largest + forward + 8 * chunk


def test_a_group_is_gone_when_the_next_is_fitted(tmp_path):
    model = small()
    targets = find_targets(model)
    finished: list[weakref.ref] = []
    alive: list[int] = []

    class Watched(Store):
        def finish(self, number, blocks, *rest):
            super().finish(number, blocks, *rest)
            finished.extend(weakref.ref(block.eigenvalues) for block in blocks.values())
            assert all(reference() is not None for reference in finished[-len(blocks) :])

    def draw(p_NV, key_N):
        alive.append(sum(reference() is not None for reference in finished))
        return square_root_draw(p_NV, key_N)

    largest = max(EKFAC().peak_bytes(unit) for unit in group_by_input(targets))
    batches = make_batches(packed(4, 17))
    EKFAC(draw).fit(model, batches, targets, memory=largest, store=Watched(tmp_path))
    assert len(finished) == 9
    assert len(alive) > 6
    assert not any(alive)


# --- one traced pass ---------------------------------------------------------------------------


@grouped
def test_held_bytes_by_architecture_and_by_saved_tensors():
    """What autograd keeps of a Llama for a token: per block two residual streams with a norm's
    scale each, q, k and v after the rotation, attention's output and logsumexp, and gate, its
    activation and up; per pass the last norm's input and scale, and the output."""
    model = small()
    heads, kv, d, hidden, inner, (b, t) = 4, 2, 16, 64, 224, (3, 32)
    attention = (heads + kv + kv + heads) * d + heads
    norm, mlp = hidden + 1, 3 * inner
    block = 2 * norm + attention + mlp
    targets = find_targets(model)
    cost = trace_pass(model, targets, (b, t))
    # Of the lowest block nothing is kept below gate and up.
    floats = b * t * (2 * block + mlp + norm + hidden)
    assert cost.held_bytes[targets[0].name] == 4 * floats
    # From the middle block's down projection up: all of the block above, and what follows it.
    down = "model.layers.1.mlp.down_proj.weight"
    assert cost.held_bytes[down] == 4 * b * t * (block + norm + hidden)

    kept, alive = {}, []  # nothing is freed, so that no address is used twice

    def pack(x):
        alive.append(x)
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
    seeing = capture(targets, on_gradient=lambda *seen: None)
    with frozen(model), hooks, seeing, torch.enable_grad():
        hidden_states(model, torch.zeros(b, t, dtype=torch.long))
    for parameter in model.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    # No node keeps the last output; cos and sin were there before the first target.
    assert sum(kept.values()) == 4 * (floats - b * t * hidden + 2 * t * d)


def test_a_trace_of_a_real_model_is_that_of_its_skeleton(tmp_path):
    model, skeleton = small(), load_skeleton(saved(SMALL, tmp_path))
    before = {name: p.clone() for name, p in model.state_dict().items()}
    real = trace_pass(model, find_targets(model), (2, 9))
    assert real == trace_pass(skeleton, find_targets(skeleton), (2, 9))
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("family", sorted(zoo.FAMILIES))
def test_forward_flops_are_those_of_a_real_pass(tmp_path, family):
    model = zoo.tiny(family, torch.float32)
    skeleton = load_skeleton(saved(model.config, tmp_path))
    targets = find_targets(skeleton)
    assert [t.name for t in targets] == zoo.FAMILIES[family].weights
    cost = trace_pass(skeleton, targets, (2, 11))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        hidden_states(model, torch.zeros(2, 11, dtype=torch.long))
    counted = counter.get_total_flops()
    # The CPU's fused attention, of two blocks, one or none, is not counted by torch: q·k and p·v of
    # 2 heads of width 8.
    attention = 2 * 2 * (2 * 11 * 11 * 2 * 8)
    assert cost.forward_flops - counted in (0, attention, 2 * attention)


@grouped
def test_backward_flops_stop_at_the_lowest_target():
    model = small()
    cost = trace_pass(model, find_targets(model), (1, 16))
    maps = [2 * 16 * 64 * 224] * 3
    attention = 2 * 16 * 64 * (64 + 32 + 32 + 64)
    scores = 5 * 2 * 4 * 16 * 16 * 16  # five products of [16, 16] and [16, 16] in 4 heads
    block = sum(maps) + attention + scores
    down, gate = "model.layers.{}.mlp.down_proj.weight", "model.layers.{}.mlp.gate_proj.weight"
    assert cost.backward_flops[down.format(2)] == 0
    assert cost.backward_flops[gate.format(2)] == maps[0]
    assert cost.backward_flops[down.format(1)] == block
    assert cost.backward_flops[gate.format(0)] == 2 * block + maps[0]


def test_blocks_that_run_again_keep_their_inputs(tmp_path):
    """Of a pass down to block b: the inputs of the blocks from b on, what the last norm reads,
    its scale and the output; the forward pass of those blocks once more; the same way back."""
    model, skeleton = small(), load_skeleton(saved(SMALL, tmp_path))
    targets, (b, t), hidden = find_targets(model), (3, 32), 64
    plain = trace_pass(model, targets, (b, t))
    cost = trace_pass(model, targets, (b, t), recompute=True)
    assert cost == trace_pass(skeleton, find_targets(skeleton), (b, t), recompute=True)
    assert cost.forward_flops == plain.forward_flops
    assert cost.backward_flops == plain.backward_flops
    assert set(plain.repeated_flops.values()) == {0.0}
    for target in targets:
        blocks = 3 - target.block
        assert cost.held_bytes[target.input_of] == 4 * b * t * ((blocks + 2) * hidden + 1)
        # The angles of rotary embeddings, made once a pass, are a product up to transformers 5.18.
        share = cost.forward_flops * blocks / 3
        assert cost.repeated_flops[target.input_of] == pytest.approx(share, rel=3e-5)
    # What one block makes is held beside them while it runs again.
    above, down = targets[3].name, targets[0].name
    block = plain.held_bytes[down] - plain.held_bytes[above]
    assert cost.surplus_bytes == pytest.approx(plain.surplus_bytes + block, rel=0.05)
    lowest = plain.held_bytes[down] + plain.surplus_bytes
    assert cost.held_bytes[down] + cost.surplus_bytes < 0.7 * lowest
    with torch.no_grad(), FlopCounterMode(display=False) as forward, frozen(model):
        hidden_states(model, torch.zeros(b, t, dtype=torch.long))
    seeing = capture(targets, on_gradient=lambda *seen: None)
    counted = []
    for recompute in (False, True):
        recomputed = recomputing(model, targets, recompute)
        with frozen(model), recomputed, seeing, FlopCounterMode(display=False) as counter:
            hidden_BTD = hidden_states(model, torch.zeros(b, t, dtype=torch.long))
            hidden_BTD.backward(hidden_BTD.detach())
        counted.append(counter.get_total_flops())
        seeing = capture(targets, on_gradient=lambda *seen: None)
    again = counted[1] - counted[0]
    assert again == pytest.approx(forward.get_total_flops(), rel=3e-5)


def test_plan_of_blocks_that_run_again():
    model = small()
    targets, work = find_targets(model), Work(batch_tokens=64, sequence_length=33)
    plain, ours = (examine(model, targets, replace(work, recompute=r)) for r in (False, True))
    assert plain.input_bytes(targets) == 3 * ours.input_bytes(targets) == 64 * 4 * 3 * (64 + 224)
    assert ours.input_bytes(targets[4:]) == 64 * 4 * (64 + 224)  # up and down of one block
    fixed = RUNTIME_BYTES + model_bytes(model)
    held, surplus = ours.cost.held_bytes[targets[0].name], ours.cost.surplus_bytes
    grids = 9 * 4 * 64 * 224
    found, kept = (peaks(s, [targets], EKFAC(), refine=True) for s in (ours, plain))
    assert found["covariance"] == fixed + held + surplus + factor_bytes(targets)
    inputs = ours.input_bytes(targets)
    assert found["gradient"] == fixed + held + surplus + inputs + grids + 4 * 64 * 224
    assert fit_overhead(ours, EKFAC()) == fixed + held + surplus + inputs
    for stage in ("load", "eigh", "step", "check"):
        assert found[stage] == kept[stage]
    kept, again = (
        curvature_budget(10**9, model, targets, replace(work, recompute=r)) for r in (False, True)
    )
    assert again - kept == fit_overhead(plain, EKFAC()) - fit_overhead(ours, EKFAC())
    # Every pass with gradients runs its blocks forward once more, and nothing else does.
    work = replace(work, refine=1)
    less, more = (flops(s, [targets], work) for s in (plain, ours))
    for stage in less:
        once = {"covariance": 2, "lambda": 2, "gradient": 2, "refine": 5 / 4}.get(stage, 1)
        expected = {k: v * once if k == "forward" else v for k, v in less[stage].items()}
        assert more[stage] == pytest.approx(expected, rel=3e-5)  # rotary angles, as above


class Live(TorchDispatchMode):
    """Bytes of the tensors that are alive, and their peak; those of ``apart`` do not count."""

    def __init__(self, apart) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.apart = [tensor.untyped_storage() for tensor in apart]
        self.known = {id(storage) for storage in self.apart}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                key, taken = id(storage), storage.nbytes()
                if key not in self.known:
                    self.known.add(key)
                    self.now += taken
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.drop, key, taken)
        return result

    def drop(self, key: int, taken: int) -> None:
        self.known.discard(key)
        self.now -= taken


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("kind", [KFAC, EKFAC, Diagonal])
def test_peaks_are_those_of_a_real_fit(monkeypatch, dtype, kind, recompute):
    model = small(dtype)
    targets = find_targets(model)
    work = Work(kind(), 8 * 33, 33, sequence_length=33, batch_tokens=128, recompute=recompute)
    subject = examine(model, targets, work)
    batches = make_batches(packed(8, 33), budget=work.batch_tokens)
    live = Live([*model.parameters(), *model.buffers()])
    found = {}

    @contextlib.contextmanager
    def stage(name):
        live.peak = live.now
        yield
        found[name] = live.peak

    monkeypatch.setattr("kfade.curvature.fit.stage", stage)
    with live:
        kind().fit(model, batches, targets, recompute=recompute)
    fixed = RUNTIME_BYTES + subject.model_bytes
    predicted = peaks(subject, [targets], kind())
    # Where blocks run again some inputs of the one at hand are gone when most is held.
    within = 0.15 if recompute else 0.1
    for name, peak in found.items():
        # LAPACK's own work, three matrices with a copy, goes unseen here.
        unseen = 3 * 4 * 224**2 if name == "eigh" else 0
        assert peak == pytest.approx(predicted[name] - fixed - unseen, rel=within), name
    assert set(found) == set(predicted) - {"load", "gradient", "step", "check"}


# --- flops of a whole fit ----------------------------------------------------------------------


@pytest.mark.parametrize("length", [33, 9], ids=["long", "short"])
def test_flops_of_a_real_fit(length):
    # In bfloat16 every product is made by itself, so the counter sees them all.
    model = small(torch.bfloat16)
    targets = find_targets(model)
    sequences = packed(6, length)
    work = Work(EKFAC(), 6 * length, 6 * length, length, batch_tokens=2 * (length - 1))
    subject = examine(model, targets, work)
    batches = make_batches(sequences, budget=work.batch_tokens)
    assert tuple(batches[0].input_BT.shape) == work.shape == subject.cost.shape
    with Counter() as counter:
        EKFAC(square_root_draw).fit(model, batches, targets)
    with Counter() as extra, frozen(model):  # the head is checked before each pass
        read_head(model)
    # Each decomposition is checked on a few columns: M(QX) and Q(ΛX).
    residuals = sum(3 * 2 * PROBES * d**2 for d in widths(targets))
    counted = counter.flops - 2 * extra.flops - residuals
    plan = flops(subject, [targets], work)
    predicted = sum(
        amount
        for stage in ("covariance", "lambda")
        for kind, amount in plan[stage].items()
        if kind != "squares"
    )
    assert predicted == pytest.approx(counted, rel=1e-6)
    assert plan["eigh"]["decompositions"] == EIGH_FLOPS * sum(d**3 for d in widths(targets))


def test_symmetric_products_by_hand():
    assert symmetric(100) == 2 * 100 * 100  # one panel: the whole
    assert symmetric(192 + 8) == 2 * (200 * 192 + 8 * 8)
    assert symmetric(1536) / (2 * 1536**2) == pytest.approx(9 / 16)


def test_lambda_turns_the_cheaper_side():
    targets = find_targets(small(), layers="0")
    gate_up = targets[:2]
    short, long = Work(sequence_length=61, retain_tokens=61), Work(EKFAC(), 601, 1, 601)
    o, i = 224, 64
    # 60 rows: the input once for both, 2·60·64²; each gradient 2·60·224²; each product 2·60·o·i.
    rows = 2 * 60 * i * i + 2 * (2 * 60 * o * o + 2 * 60 * o * i)
    assert lambda_flops(gate_up, short) == (rows, 2 * 2 * o * i)
    # 600 rows: more than 2·224 and than 64, so each product of a sequence is turned on both sides.
    products = 2 * (2 * o * i * i + 2 * o * o * i + 2 * 600 * o * i)
    assert lambda_flops(gate_up, long) == (products, 2 * 2 * o * i)
    diagonal = Work(Diagonal(), 61, 1, 61)
    assert lambda_flops(gate_up, diagonal) == (2 * 2 * 60 * o * i, 2 * 2 * o * i)


# --- seconds -----------------------------------------------------------------------------------


def test_seconds_follow_speed_and_devices(tmp_path):
    model = load_skeleton(saved(SMALL, tmp_path))
    work = Work(retain_tokens=3300, sequence_length=33, batch_tokens=64)
    subject = examine(model, find_targets(model), work)
    groups = [list(subject.targets)]
    one = seconds(subject, groups, work, Speed(1e9, 1e9))
    twice = seconds(subject, groups, work, Speed(2e9, 2e9))
    assert {stage: 2 * taken for stage, taken in twice.items()} == pytest.approx(one)
    three = seconds(subject, groups, work, Speed(1e9, 1e9), devices=3)
    for stage in ("covariance", "lambda", "gradient"):
        assert three[stage] == pytest.approx(one[stage] / 3)
    # Each computes the direction, 4·o·i·(o + i) a weight, and only the measuring is shared.
    direction = 9 * 4 * 64 * 224 * (64 + 224) / (0.93 * 1e9)
    assert three["step"] - direction == pytest.approx((one["step"] - direction) / 3)
    assert three["check"] == pytest.approx(one["check"] / 3)
    # Nine of width 224 and six of 64 on three devices: three of the large and two of the small.
    assert three["eigh"] == pytest.approx(EIGH_FLOPS * (3 * 224**3 + 2 * 64**3) / 1e9)
    vectors = 4 * 9 * 64 * 224
    assert three["exchange"] == (2 * factor_bytes(subject.targets) + 4 * vectors) / 10e9
    assert "exchange" not in one
    # A decomposition gains nothing from a GPU that is fast at products.
    fast, faster = (seconds(subject, groups, work, Speed(s, s)) for s in (2e12, 2e14))
    assert fast["eigh"] == faster["eigh"]
    slow = seconds(subject, groups, work, Speed(1e9, 1e9, bandwidth=1e6))
    squares = flops(subject, groups, work)["lambda"]["squares"]
    assert slow["lambda"] - one["lambda"] == pytest.approx(6 * squares / 1e6)


def test_assigned_among_more_processes_than_there_are():
    assert assign_by_cost([1.0, 5.0, 3.0], among=2) == [1, 0, 1]
    assert assign_by_cost([1.0, 5.0, 3.0]) == [0, 0, 0]


def test_measured_speed_is_what_the_clock_says(monkeypatch):
    def typical(work, device):
        work()
        return 0.1

    monkeypatch.setattr(kfade.planning.cost, "_typical", typical)
    speed = measure_speed(torch.device("cpu"), torch.bfloat16)
    assert speed.products == speed.float32 == 2 * 1024**3 / 0.1
    assert speed.bandwidth == 12 * 2**25 / 0.1


# --- the budget of fits ------------------------------------------------------------------------


def test_curvature_budget_leaves_room_for_model_and_pass():
    model = small()
    targets = find_targets(model)
    subject = examine(model, targets, Work(batch_tokens=64, sequence_length=33))
    least = fit_overhead(subject, EKFAC())
    work = Work(batch_tokens=64, sequence_length=33)
    assert curvature_budget(10**9, model, targets, work) == 10**9 - least
    held = curvature_budget(10**9, model, targets, work, vectors=3)
    assert held == 10**9 - least - 3 * 4 * 9 * 64 * 224
    kfac = curvature_budget(10**9, model, targets, replace(work, estimator=KFAC()))
    assert kfac - (10**9 - least) == subject.input_bytes(targets)
    # Twice the positions, nearly twice the activations.
    wide = examine(model, targets, Work(batch_tokens=128, sequence_length=33))
    ratio = wide.cost.held_bytes[targets[0].name] / subject.cost.held_bytes[targets[0].name]
    assert ratio == pytest.approx(2, rel=0.02)


def test_shards_of_a_model(tmp_path):
    model = small()
    block = 4 * (3 * 64 * 64 + 3 * 64 * 224 + 2 * 64)
    outside = 4 * (2 * 50 * 64 + 64 + 16)
    assert model_bytes(model) == outside + 3 * block
    assert model_bytes(model, 6) == outside + 3 * block // 6 + 2 * block
    targets = find_targets(model)
    work = Work(batch_tokens=64)
    whole, spread = (curvature_budget(10**9, model, targets, work, shards=n) for n in (1, 6))
    assert spread - whole == 3 * block - (3 * block // 6 + 2 * block)


def test_the_helpers_of_other_tests_can_be_planned():
    model = tiny_llama(torch.float32)
    targets = find_targets(model)
    batches = make_batches(random_sequences(4))
    shape = tuple(batches[0].input_BT.shape)
    assert trace_pass(model, targets, shape).positions == batches[0].positions


# --- the command -------------------------------------------------------------------------------


@pytest.fixture
def traced_once(monkeypatch):
    """Plans of one model for other devices trace its pass once: it takes many seconds."""
    traces: dict = {}

    def trace(model, targets, shape, *, recompute):
        names = tuple(target.name for target in targets)
        key = (model.config.to_json_string(), names, shape, recompute)
        if key not in traces:
            traces[key] = trace_pass(model, targets, shape, recompute=recompute)
        return traces[key]

    monkeypatch.setattr("kfade.planning.memory.trace_pass", trace)


def planned(capsys, *arguments: str) -> dict:
    assert main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.usefixtures("traced_once")
@grouped
def test_command_on_a_large_model(tmp_path, capsys):
    arguments = ["--speed", "400", "--float32-speed", "60", "--bandwidth", "3000"]
    folder = saved(LLAMA_70B, tmp_path)
    found = planned(capsys, folder, *arguments, "--memory", "80GB", "--devices", "8")
    assert found["parameters"]["all"] / 1e9 == pytest.approx(69.0, abs=0.05)
    assert found["bytes"]["model"] == pytest.approx(2 * found["parameters"]["all"], rel=1e-6)
    # Per block: 8192² + 28672² of A, 2·28672² + 8192² of S.
    assert found["bytes"]["factors"] == 80 * 4 * (2 * 8192**2 + 3 * 28672**2)
    assert found["groups"] is None
    assert "lower --batch-tokens" in found["problem"]
    one, eight = found["seconds"]["1"], found["seconds"]["8"]
    # Twice the parameters a token and direction, and attention, at 400 TFLOP/s.
    tokens = 4000 * 511
    least = 4 * 68.4e9 * tokens / 400e12
    assert least < one["covariance"] < 4 * least
    assert one["covariance"] == pytest.approx(8 * eight["covariance"])
    assert eight["total"] < one["total"] / 4
    few = ["--layers", "3-6", "--batch-tokens", "1024", "--memory", "80GB", "--devices", "8"]
    assert planned(capsys, folder, *few)["problem"] is not None
    spread = planned(capsys, folder, *few, "--shard")
    assert spread["problem"] is None
    assert spread["over_memory"] == []
    assert spread["groups"] == 1  # 10.4 GB of factors a block, of which each process keeps a part
    factors = spread["bytes"]["factors"]
    covariance = spread["peak_bytes"]["planned"]["covariance"]
    assert factors / 8 < covariance - spread["bytes"]["model"] < factors
    assert spread["bytes"]["model"] < found["bytes"]["model"] / 6


def test_command_plans_refinements(tmp_path, capsys):
    """Each iteration costs a product and the measuring of one more direction."""
    arguments = ["--speed", "400", "--sequence-length", "64"]
    folder = saved(SMALL, tmp_path)
    plain, one, three = (
        planned(capsys, folder, *arguments, *more)
        for more in ([], ["--refine", "1"], ["--refine", "3"])
    )
    assert "refine" not in plain["flops"]
    # Two products, not one, and four: the first serves the K-FADE direction itself.
    assert three["flops"]["refine"]["forward"] == pytest.approx(
        2 * one["flops"]["refine"]["forward"]
    )
    # Per position of the product, four forward passes where a trial makes one.
    trial = plain["flops"]["gradient"]["forward"] / (2500 * 512 * 63 / 64)
    assert one["flops"]["refine"]["forward"] == pytest.approx(2 * 4 * trial * 64 * 63)
    small = planned(capsys, folder, *arguments, "--refine", "1", "--refine-sequences", "16")
    assert small["flops"]["refine"]["head"] == pytest.approx(one["flops"]["refine"]["head"] / 4)
    for stage in ("step", "check"):
        first, second, fourth = (p["flops"][stage]["forward"] for p in (plain, one, three))
        assert fourth - first == pytest.approx(3 * (second - first))
        assert second > first
    vector = plain["bytes"]["vector"]
    peaks = [p["peak_bytes"]["planned"] for p in (plain, one)]
    assert peaks[1]["check"] - peaks[0]["check"] == 5 * vector
    assert peaks[1]["refine"] > peaks[1]["gradient"] + 6 * vector
    assert one["seconds"]["1"]["total"] > plain["seconds"]["1"]["total"]


def test_command_plans_blocks_that_run_again(tmp_path, capsys):
    four = LlamaConfig(**{**LLAMA_7B.to_dict(), "num_hidden_layers": 4})
    folder = saved(four, tmp_path)
    arguments = [folder, "--speed", "400", "--batch-tokens", "8192"]
    plain, ours = (planned(capsys, *arguments, *more) for more in ([], ["--recompute"]))
    assert (plain["work"]["recompute"], ours["work"]["recompute"]) == (False, True)
    positions = 16 * 511
    # The inputs of four blocks, the last norm's in float32 and its scale, and the output.
    kept = positions * (5 * 4096 * 2 + 4096 * 4 + 4)
    assert ours["bytes"]["activations"] == kept
    assert plain["bytes"]["activations"] > 5 * kept
    assert plain["bytes"]["inputs"] == 4 * ours["bytes"]["inputs"]
    for stage in ("covariance", "lambda", "gradient"):
        assert ours["peak_bytes"]["planned"][stage] < plain["peak_bytes"]["planned"][stage]
        assert ours["seconds"]["1"][stage] > plain["seconds"]["1"][stage]
        forward = ours["flops"][stage]["forward"]
        assert forward == pytest.approx(2 * plain["flops"][stage]["forward"])
    assert main(["plan", folder, "--recompute", "--layers", "3"]) == 0
    assert "blocks run again in backward passes" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
@pytest.mark.usefixtures("traced_once")
def test_command_finds_groups_for_a_device(tmp_path, capsys):
    folder = saved(LLAMA_7B, tmp_path)
    arguments = [folder, "--batch-tokens", "2048", "--estimator", "ekfac"]
    free = planned(capsys, *arguments)
    assert free["groups"] == 1
    assert free["passes"] == 2
    assert free["seconds"] == {}
    assert free["memory"] is None
    big = planned(capsys, *arguments, "--memory", "80GB,48GB")
    assert (big["memory"], big["devices"]) == (48 * 10**9, 2)
    assert big["groups"] > planned(capsys, *arguments, "--memory", "80GB")["groups"] > 1
    assert big["passes"] == 2 * big["groups"]
    stages = ("covariance", "eigh", "lambda")
    assert all(big["peak_bytes"]["planned"][stage] <= 48 * 10**9 for stage in stages)
    assert any(big["peak_bytes"]["one_group"][stage] > 48 * 10**9 for stage in stages)
    assert big["over_memory"] == ["step", "check"]


def test_command_reads_gguf_and_dtypes(tmp_path, capsys):
    model = zoo.tiny("llama", torch.float32)
    zoo.write_gguf(model, tmp_path / "m.gguf")
    found = planned(capsys, str(tmp_path / "m.gguf"))
    assert found["dtype"] == "float32"
    assert found["weights"] == 6
    folder = saved(model.config, tmp_path / "m")
    half = planned(capsys, folder, "--dtype", "bfloat16", "--target", "*down_proj.weight")
    assert half["weights"] == 2
    frequencies = 2 * 4 * 4  # of the rotations: float32 in both
    assert 2 * (half["bytes"]["model"] - frequencies) == found["bytes"]["model"] - frequencies
    assert half["bytes"]["vector"] == 2 * 4 * zoo.WIDTH * zoo.INNER


def test_command_shows_a_page(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(kfade.planning.cost, "_typical", lambda work, device: 0.1)
    folder = saved(SMALL, tmp_path)
    arguments = ["plan", folder, "--measure", "--memory", "454MB", "--batch-tokens", "64"]
    assert main([*arguments, "--sequence-length", "33", "--devices", "2"]) == 0
    output = capsys.readouterr()
    assert output.out == ""
    for text in ("9 weights targeted", "covariance", "exchange", "2 devices", "total", "groups"):
        assert text in output.err
    assert main(["plan", folder, "--memory", "1GB"]) == 0
    assert "fits 1.00 GB, the layers in 1 group" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--speed", "1", "--measure"], "not both"),
        (["--float32-speed", "1", "--measure"], "not both"),
        (["--bandwidth", "1"], "without --speed"),
        (["--speed", "0"], "positive"),
        (["--memory", "lots"], "20GB"),
        (["--memory", "1GB,2GB", "--devices", "3"], "one for each device"),
        (["--devices", "0"], "1 or more"),
        (["--tokens", "0"], "--tokens"),
        (["--refine", "-1"], "--refine must be 0 or more"),
        (["--refine-sequences", "0"], "--refine-sequences 1 or more"),
        (["--sequence-length", "1"], "2 or more"),
        (["--estimator", "best"], "ekfac, kfac"),
        (["--layers", "9"], "blocks 0 to 2"),
        (["--dtype", "float8"], "--dtype"),
    ],
)
def test_command_refuses(tmp_path, capsys, arguments, message):
    assert main(["plan", saved(SMALL, tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_routed_experts_are_refused(tmp_path, capsys):
    config = MixtralConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=37,
        num_local_experts=4,
    )
    folder = saved(config, tmp_path)
    assert main(["plan", folder]) == 2
    assert "cannot be planned" in capsys.readouterr().err
    assert main(["plan", folder, "--target", "*experts*"]) == 2
    assert "mixture-of-experts" in capsys.readouterr().err


def test_sizes_and_durations_for_a_person():
    assert [size(n) for n in (12, 3456, 1.234e7, 5.08e10, 1.06e12)] == [
        "12 B",
        "3.46 kB",
        "12.3 MB",
        "50.8 GB",
        "1.06 TB",
    ]
    assert [duration(s) for s in (0.5, 119, 600, 9000)] == ["0.5 s", "119 s", "10 min", "2.5 h"]


def test_skeletons_hold_no_numbers(tmp_path):
    with FakeTensorMode():
        kind = type(torch.empty(1))
    skeleton = load_skeleton(saved(LLAMA_70B, tmp_path))
    assert all(isinstance(p, kind) for p in skeleton.parameters())
