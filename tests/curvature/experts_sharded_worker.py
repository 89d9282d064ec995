"""What each of several processes computes of a mixture, for test_experts_sharded.py."""

from __future__ import annotations

from pathlib import Path

import torch
from helpers import flat, random_sequences
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from zoo.mixtures import mixture

import kfade
from kfade import EKFAC, InputError, Update, find_targets, make_batches, margin
from kfade.method.gradient import forget_gradient
from kfade.models.head import body_of
from kfade.models.layers import decoder_blocks
from kfade.models.weights import Weights, digest_weights
from kfade.runtime import distributed

FAMILIES = ("mixtral", "gpt_oss")
RETAIN, FORGET = random_sequences(24), random_sequences(9, seed=2)
HELD_OUT = random_sequences(4, seed=1)


def parameters_of(model) -> dict[str, torch.Tensor]:
    """All of them, whole."""
    return {n: distributed.gather_full(p.detach()).clone() for n, p in model.named_parameters()}


def compute(family: str, folder: Path, sharded: bool) -> dict:
    """Everything that must not depend on the number of processes."""
    model = mixture(family, inner=6)  # two and three processes can divide it
    if sharded:
        distributed.shard(body_of(model), decoder_blocks(model)[1])
    biased = family == "gpt_oss"
    targets = find_targets(model, joint_bias=biased)
    before, batches = parameters_of(model), make_batches(FORGET, budget=20)
    found = {"names": [t.name for t in targets], "digest": digest_weights(model)}
    found["gradient"] = dict(forget_gradient(model, batches, targets, margin))
    again = forget_gradient(model, batches, targets, margin, recompute=True)
    found["gradient, recomputed"] = dict(again)
    update = kfade.unlearn(
        model,
        **{"forget": FORGET, "retain": RETAIN, "held_out": HELD_OUT},
        **flat(targets=targets, kl=0.02, batch_tokens=40, fit=EKFAC()),
    )
    found["update"] = dict(update.deltas)
    found["measured"] = update.provenance["steps"][0]["measured_kl"]
    path = folder / f"{family}.safetensors"
    if distributed.rank() == 0:
        update.save(path)
    else:
        update.read()
    distributed.barrier()
    saved = Update.load(path)
    saved.apply(model)
    found["edited"] = parameters_of(model)
    saved.revert(model)
    found["reverted"], found["before"] = parameters_of(model), before
    reverted = digest_weights(model)
    with saved.applied_to(model):
        found["moved"] = digest_weights(model) != reverted
    found["restored"] = digest_weights(model) == reverted
    found["held"] = sum(distributed.own_part(t.weight).numel() for t in targets)
    return found


def refusals() -> dict[str, str]:
    """What is said of experts that the processes cannot divide, and of one without rows."""
    said = {}
    mesh = init_device_mesh("cpu", (distributed.count(),))
    whole = distribute_tensor(torch.zeros(4, 5, 7), mesh, [Shard(0)])
    with torch.no_grad():
        distributed.scatter_into(whole[1], torch.ones(5, 7))
    said["written"] = float(whole.full_tensor().sum())
    model = torch.nn.Module()
    model.experts = torch.nn.Parameter(whole)
    try:
        Weights(model)["experts[1]"]
    except InputError as error:
        said["uneven"] = str(error)
    model = mixture("mixtral", experts=24, each=1, inner=6)
    distributed.shard(body_of(model), decoder_blocks(model)[1])
    targets = find_targets(model, layers="1")
    try:
        EKFAC().fit(model, make_batches(RETAIN[:2]), targets)
    except InputError as error:
        said["no rows"] = str(error)
    return said


def main(folder: Path) -> None:
    with distributed.processes():
        found = {family: compute(family, folder, sharded=True) for family in FAMILIES}
        torch.save({**found, "said": refusals()}, folder / f"rank-{distributed.rank()}.pt")
