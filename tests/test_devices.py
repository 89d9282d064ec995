"""What was read from files lies in the CPU's memory, the model perhaps not: a stand-in device."""

from __future__ import annotations

import pytest
import torch
import zoo

import kfade
from kfade.curvature.curvature import Curvature
from kfade.method.update import Update


def test_an_update_and_a_curvature_move():
    model = zoo.tiny("llama", dtype=torch.float32)
    targets = kfade.find_targets(model)
    batches = kfade.make_batches(zoo.sequences((6, 5, 7)))
    curvature = kfade.fit_ekfac(model, batches, targets).only([targets[0].name], "meta")
    block = curvature.blocks[targets[0].name]
    assert {block.q_out.device.type, block.q_in.device.type, block.eigenvalues.device.type} == {
        "meta"
    }
    update = Update({"a": torch.ones(2)}, {"b": 1}).to("meta")
    assert (update.deltas["a"].device.type, update.provenance) == ("meta", {"b": 1})


def test_unlearn_moves_them_to_the_model(monkeypatch):
    """On ``meta`` a step mixes devices and fails, unless everything is moved at the top."""
    model = zoo.tiny("llama", dtype=torch.float32)
    data = {name: zoo.sequences((6, 5, 7), seed=i) for i, name in enumerate(("forget", "retain"))}
    data["held_out"] = zoo.sequences((8,), seed=5)
    targets = kfade.find_targets(model)
    first = kfade.unlearn(model, **data, kl=0.01)
    fitted = kfade.fit_kfac(model, kfade.make_batches(data["retain"]), targets)
    options = {"steps": 2, "refit": False, "kl": 0.01}
    expected = kfade.unlearn(model, **data, **options, start=first, curvature=fitted)
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
        found = kfade.unlearn(model, **data, **options, start=away, curvature=fitted)
    assert moved == [("Update", "cpu"), ("Curvature", "cpu")]
    assert all(torch.equal(found.deltas[n], d) for n, d in expected.deltas.items())
    monkeypatch.setattr(Update, "to", lambda self, device: self)  # without the move it fails
    with pytest.raises((RuntimeError, NotImplementedError)):
        kfade.unlearn(model, **data, **options, start=away, curvature=fitted)
