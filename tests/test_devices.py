"""What was read from files lies in the CPU's memory, the model perhaps not: stand-in devices."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import stand_in
import torch
import zoo
from helpers import flat
from processes import start

import kfade
from kfade.baselines.rmu import control_vector
from kfade.baselines.weights import LowRank
from kfade.curvature.curvature import Curvature
from kfade.curvature.eigh import eigendecompose
from kfade.data.batches import draw_without_replacement
from kfade.method.update import Update


def test_an_update_and_a_curvature_move():
    model = zoo.tiny("llama", dtype=torch.float32)
    targets = kfade.find_targets(model)
    batches = kfade.make_batches(zoo.sequences((6, 5, 7)))
    curvature = kfade.EKFAC().fit(model, batches, targets).only([targets[0].name], "meta")
    block = curvature.blocks[targets[0].name]
    assert {block.q_out.device.type, block.q_in.device.type, block.eigenvalues.device.type} == {
        "meta"
    }
    update = Update({"a": torch.ones(2)}, {"b": 1}).to("meta")
    assert (update.deltas["a"].device.type, update.provenance) == ("meta", {"b": 1})


@contextlib.contextmanager
def default_device(name):
    before = torch.get_default_device()
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(before)


def test_draws_come_from_the_cpu_whatever_the_default_device():
    model = zoo.tiny("llama", dtype=torch.float32)
    targets, matrix = kfade.find_targets(model), torch.diag(torch.tensor([1.0, 2.0]))

    def drawn():
        lora = LowRank(model, targets, rank=2, alpha=2.0, dropout=0.0, seed=0)
        return [
            control_vector(4, 1.0, seed=0).tolist(),
            draw_without_replacement(9, 4, step=0, seed=0),
            eigendecompose(matrix, "A")[0].tolist(),
            [tensor.tolist() for tensor in lora.tensors.values()],
        ]

    wanted = drawn()
    with default_device("meta"):
        assert torch.rand(3, generator=torch.Generator()).is_meta  # without numbers
        assert drawn() == wanted


def test_batches_are_on_the_default_device_unless_told():
    sequences = zoo.sequences((6, 5))
    with default_device("meta"):
        assert kfade.make_batches(sequences)[0].input_BT.device.type == "meta"
        told = kfade.make_batches(sequences, device="cpu")[0]
    assert told.input_BT[0].tolist() == list(sequences[0].tokens[:-1])


def test_unlearn_moves_them_to_the_model(monkeypatch):
    """On ``meta`` a step mixes devices and fails, unless everything is moved at the top."""
    model = zoo.tiny("llama", dtype=torch.float32)
    data = {name: zoo.sequences((6, 5, 7), seed=i) for i, name in enumerate(("forget", "retain"))}
    data["held_out"] = zoo.sequences((8,), seed=5)
    targets = kfade.find_targets(model)
    first = kfade.unlearn(model, **data, **flat(kl=0.01))
    fitted = kfade.KFAC().fit(model, kfade.make_batches(data["retain"]), targets)
    options = {"steps": 2, "refit": False, "kl": 0.02}
    expected = kfade.unlearn(model, **data, **flat(**options, start=first, curvature=fitted))
    assert len(expected.provenance["steps"]) == 2
    away = Update({n: d.to("meta") for n, d in first.deltas.items()}, first.provenance)
    with monkeypatch.context() as patch:
        moved = []

        def recorded(self, device):
            moved.append((type(self).__name__, torch.device(device).type))
            return first

        patch.setattr(Update, "to", recorded)
        own = Curvature.only
        patch.setattr(
            Curvature,
            "only",
            lambda self, names, device: (
                moved.append(("Curvature", torch.device(device).type)) or own(self, names, device)
            ),
        )
        found = kfade.unlearn(model, **data, **flat(**options, start=away, curvature=fitted))
    assert moved == [("Update", "cpu"), ("Curvature", "cpu")]
    assert all(torch.equal(found.deltas[n], d) for n, d in expected.deltas.items())
    monkeypatch.setattr(Update, "to", lambda self, device: self)  # without the move it fails
    with pytest.raises((RuntimeError, NotImplementedError)):
        kfade.unlearn(model, **data, **flat(**options, start=away, curvature=fitted))


TESTS = Path(__file__).parent
ON_THE_DEVICE = {
    "cli/test_cli.py": (
        "test_a_run_writes_what_it_promises",
        "test_a_saved_curvature_gives_the_same_update",
        "test_a_killed_run_resumes_to_the_same_update",
        "test_check_passes_on_a_sound_model",
    ),
    "cli/test_baselines_cli.py": tuple(
        f"test_a_run_writes_what_it_promises[{method}]" for method in ("npo", "rmu", "elm", "soul")
    ),
    "method/test_refine.py": ("test_a_refined_run_is_told_and_replayed",),
    "method/test_sweep.py": ("test_an_interrupted_sweep_goes_on_to_the_same_end",),
    "evaluate/test_eval_choice.py": ("test_command",),
    "evaluate/test_eval_kl.py": ("test_command_resumes_to_the_same",),
    "evaluate/test_eval_memorisation.py": ("test_command_resumes",),
    "evaluate/test_eval_quantisation.py": ("test_command",),
    "evaluate/test_relearning.py": ("test_an_attack_from_files",),
    "evaluate/test_tofu.py": ("test_the_command_measures_and_its_log_says_the_same",),
}
"""Whole commands, and what is read back by ``--resume``."""

needs_stand_in = pytest.mark.skipif(
    not stand_in.AVAILABLE, reason="this PyTorch has no such devices"
)


def run(work, *arguments, said: Path) -> None:
    """In a process of its own: devices are made known before anything is computed."""
    process = start(work, *arguments, said=said)
    process.join()
    text = "".join((said / name).read_text() for name in ("stdout", "stderr"))
    assert process.exitcode == 0, text[-4000:]


@pytest.mark.slow
@needs_stand_in
@pytest.mark.parametrize("file", ON_THE_DEVICE)
def test_whole_commands_run_on_a_device(file, tmp_path):
    """Mixed devices fail there; that the tests pass on the CPU as well is the control."""
    selected = [f"{TESTS / file}::{test}" for test in ON_THE_DEVICE[file]]
    options = ["-p", "stand_in", "-p", "no:cacheprovider", "-p", "no:xdist"]
    options.append(f"--basetemp={tmp_path / 'inner'}")
    # The process has imported what pytest would rewrite: asserts of libraries say less.
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    run(pytest.main, [*options, *selected], said=tmp_path)


def compute_and_mix() -> None:
    device = stand_in.register()
    x = torch.arange(6.0).reshape(2, 3)
    y = x.to(device).requires_grad_()
    (y.T @ y).sum().backward()
    assert y.grad.device == device
    assert torch.equal(y.grad.cpu(), 2 * x.sum(dim=1, keepdim=True).expand(2, 3))
    assert (y + 1.0).device == device
    for mixed in (lambda: y + x, lambda: x @ y.T, lambda: torch.cat([x, y]), lambda: y.add_(x)):
        with pytest.raises(RuntimeError):
            mixed()


@needs_stand_in
def test_the_stand_in_computes_and_refuses_mixed_devices(tmp_path):
    run(compute_and_mix, said=tmp_path)
