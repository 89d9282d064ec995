"""Vectors in weight space: kept anywhere they are the same numbers, and never whole in memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import zoo
from helpers import LiveBytes, flat, same_bits
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import kfade
from kfade import InputError, Update
from kfade.curvature.estimators import EKFAC
from kfade.curvature.jacobian import sum_bytes
from kfade.curvature.store import Store
from kfade.curvature.vectors import (
    FileVector,
    InHostMemory,
    Layerwise,
    OnDevice,
    OnDisk,
    keep,
    plus,
    scaled,
)
from kfade.method.gauge import parameter_changes
from kfade.method.gradient import forget_gradient
from kfade.method.objectives import margin
from kfade.method.step import gauss_newton_step
from kfade.runtime.tensors import write_tensors


@pytest.fixture(params=["device", "host", "disk"])
def storage(request, tmp_path):
    return {"device": OnDevice(), "host": InHostMemory(), "disk": OnDisk(tmp_path)}[request.param]


@pytest.fixture(params=["host", "disk"])
def away(request, tmp_path):
    """Storages outside the device that take the sums of a few layers at a time."""
    memory = 4 * 2 * zoo.WIDTH * zoo.INNER  # gate and up, which read one input
    return InHostMemory(memory) if request.param == "host" else OnDisk(tmp_path, memory)


DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def test_a_storage_gives_back_what_it_got(storage):
    layers = {str(d): torch.randn(3, 5, dtype=torch.float64).to(d) for d in DTYPES}
    layers |= {"turned": torch.randn(4, 6).T, "number": torch.tensor(2.5), "none": torch.ones(0, 3)}
    vector = keep(layers, storage)
    assert list(vector) == list(layers)
    assert len(vector) == len(layers)
    assert "turned" in vector
    assert "other" not in vector
    for name, layer in layers.items():
        found = vector[name]
        assert (found.dtype, found.shape) == (layer.dtype, layer.shape)
        assert torch.equal(found, layer)
    with pytest.raises(KeyError):
        vector["other"]


def test_a_layer_is_replaced(storage):
    vector = storage.vector()
    vector["a"], vector["b"] = torch.zeros(2, 3), torch.ones(4)
    vector["a"] = torch.full((2, 3), 7.0)  # as large as before
    vector["b"] = torch.arange(6.0)  # larger
    assert vector["a"].eq(7).all()
    assert torch.equal(vector["b"], torch.arange(6.0))
    del vector["a"]
    assert list(vector) == ["b"]


def test_a_vector_on_disk_leaves_no_file(tmp_path):
    vector = keep({"a": torch.randn(100)}, OnDisk(tmp_path))
    assert len(vector["a"]) == 100
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="missing"):
        OnDisk(tmp_path / "missing").vector()


def test_sums_are_computed_when_they_are_read():
    read = []

    def layer(name: str) -> torch.Tensor:
        read.append(name)
        return torch.ones(2)

    total = plus(scaled(Layerwise("ab", layer), 3.0), Layerwise("bc", layer), 0.5)
    assert (list(total), "a" in total, read) == (["a", "b", "c"], True, [])
    assert [total[name].tolist() for name in total] == [[3, 3], [3.5, 3.5], [0.5, 0.5]]
    assert read == ["a", "b", "b", "c"] or read == ["a", "a", "b", "b", "c", "c"]


def test_a_file_is_that_of_safetensors(tmp_path):
    """Our writer streams; the library reads what it wrote, and the other way round."""
    tensors = {"é/x": torch.randn(3, 4).bfloat16(), "n": torch.arange(5), "e": torch.ones(0, 2)}
    tensors["f"] = torch.randn(2, dtype=torch.float64)
    small = (torch.int8, torch.int16, torch.float8_e4m3fn, torch.float8_e5m2)
    tensors |= {str(dtype): torch.arange(3).to(dtype) for dtype in small}
    path = tmp_path / "a.safetensors"
    write_tensors(path, Layerwise(tensors, tensors.__getitem__), {"about": "naïve \N{SNOWMAN}"})
    found = load_file(path)
    assert found.keys() == tensors.keys()
    assert all(found[name].dtype == tensors[name].dtype for name in tensors)
    assert all(torch.equal(found[n].double(), tensors[n].double()) for n in tensors)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"about": "naïve \N{SNOWMAN}"}
    vector = FileVector(path)
    assert set(vector) == set(tensors)
    assert torch.equal(vector["n"], tensors["n"])
    path.unlink()
    with pytest.raises(InputError, match="changed while it was in use"):
        vector["n"]


def test_a_file_that_is_replaced_is_not_read_on(tmp_path):
    """An update that is saved over its own file would otherwise be negated twice."""
    path = tmp_path / "u.safetensors"
    Update({"w": torch.ones(2)}).save(path)
    negative = -Update.load(path)
    negative.save(path)
    with pytest.raises(InputError, match="changed while it was in use; load it again"):
        negative.deltas["w"]
    assert torch.equal(Update.load(path).deltas["w"], -torch.ones(2))


def test_a_vector_on_disk_is_read_whatever_the_default_device(tmp_path):
    vector = keep({"a": torch.arange(3.0)}, OnDisk(tmp_path))
    with torch.device("meta"):
        assert torch.equal(vector["a"], torch.arange(3.0, device="cpu"))


def test_weights_with_two_names_are_restored(storage):
    model = zoo.tiny("llama", dtype=torch.float32)
    model.lm_head.weight = model.model.embed_tokens.weight
    weight, change = model.lm_head.weight, torch.ones_like(model.lm_head.weight)
    before = weight.detach().clone()
    names = ("lm_head.weight", "model.embed_tokens.weight")
    with Update(dict.fromkeys(names, change)).applied_to(model, storage):
        assert torch.equal(weight, before + 1 + 1)
    assert same_bits(weight, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("of_change", [torch.bfloat16, torch.float32, torch.int32])
def test_weights_keep_their_precision_whatever_the_dtype_of_a_change(dtype, of_change):
    model = zoo.tiny("llama", dtype=dtype)
    name = "model.layers.0.mlp.up_proj.weight"
    weight = model.get_parameter(name)
    before = weight.detach().clone()
    update = Update({name: torch.ones_like(weight, dtype=of_change)})
    assert update.lost_fraction(model) < torch.finfo(dtype).eps
    update.apply(model)
    assert same_bits(weight, before + 1)


@pytest.fixture(scope="module")
def model():
    return zoo.tiny("llama", dtype=torch.float32)


SETS = {
    "forget": zoo.sequences((6, 5, 7), seed=0),
    "retain": zoo.sequences((6, 5, 7, 9), seed=1),
    "held_out": zoo.sequences((8, 6), seed=2),
}


@pytest.fixture(scope="module")
def expected(model):
    return kfade.unlearn(model, **SETS, **flat(kl=0.01, steps=2, refine=1))


def test_an_update_is_the_same_wherever_vectors_are_kept(model, expected, storage, tmp_path):
    """Two steps with refits and refined directions."""
    passes = []
    options = flat(kl=0.01, steps=2, refine=1)
    least = EKFAC().peak_bytes(kfade.find_targets(model)[:2])  # gate and up read one input
    stores = tmp_path / "fit"
    stores.mkdir()

    def store(*_) -> Store:
        passes.append(1)
        folder = stores / str(len(passes))
        folder.mkdir()
        return Store(folder)

    options["run"] = replace(options["run"], storage=storage, memory=least, store=store)
    found = kfade.unlearn(model, **SETS, **options)
    assert all(same_bits(found.deltas[name], expected.deltas[name]) for name in expected.deltas)
    steps, known = (update.provenance["steps"] for update in (found, expected))
    assert [s["measured_kl"] for s in steps] == [s["measured_kl"] for s in known]


def test_a_gradient_in_several_passes_is_the_same(model, away, monkeypatch):
    import kfade.curvature.jacobian as jacobian

    targets, batches = kfade.find_targets(model), kfade.make_batches(SETS["forget"])
    at_once = forget_gradient(model, batches, targets, margin)
    groups, real = [], jacobian.run_pass

    def counted(model, batches, group, *arguments, **options):
        groups.append(len(group))
        real(model, batches, group, *arguments, **options)

    monkeypatch.setattr(jacobian, "run_pass", counted)
    assert away.memory == sum_bytes(targets[:2])
    found = forget_gradient(model, batches, targets, margin, storage=away)
    assert groups == [2, 1, 2, 1]
    assert all(same_bits(found[name], at_once[name]) for name in at_once)
    less = replace(away, memory=away.memory - 1)
    with pytest.raises(InputError, match="--memory"):
        forget_gradient(model, batches, targets, margin, storage=less)


def wide(layers: int):
    """A llama whose weights are much larger than what a pass over a few tokens needs."""
    torch.manual_seed(0)
    shape = {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "vocab_size": 64,
    }
    return LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=layers)).eval()


def peak_of_step_and_check(layers: int, storage, folder) -> float:
    """Peak bytes of the step and of a look at the edited model, in units of the largest layer."""
    model = wide(layers)
    targets = kfade.find_targets(model)
    batches = kfade.make_batches(SETS["retain"])
    folder.mkdir()
    curvature = EKFAC().fit(model, batches, targets, store=Store(folder))
    gradient = forget_gradient(model, batches, targets, margin, storage=storage)
    with LiveBytes(model.parameters()) as live:
        step = gauss_newton_step(curvature, gradient, kfade.Damping(), storage)
        update = Update(parameter_changes(targets, step.direction))
        with update.applied_to(model, storage):
            pass
    return live.peak / (4 * 64 * 256)


def test_step_and_check_hold_a_few_layers_however_many_there_are(tmp_path):
    """The control keeps vectors in memory, and grows with the model."""
    disk = [peak_of_step_and_check(n, OnDisk(tmp_path), tmp_path / f"{n}") for n in (2, 6)]
    device = [peak_of_step_and_check(n, OnDevice(), tmp_path / f"device{n}") for n in (2, 6)]
    assert disk[1] == pytest.approx(disk[0], rel=0.05)
    assert device[1] > device[0] + 3 * 4  # three matrices in each of four more blocks
