"""What each of several processes computes for test_distributed.py.

Every process writes rank-R.pt, a dictionary of numbers and tensors, into a folder. :func:`compute`
is also called by the tests themselves, without processes, for the numbers that must come out.
"""

from __future__ import annotations

import contextlib
import math
import unittest.mock
from pathlib import Path

import torch
from helpers import Counted, flat, random_sequences, tiny_llama

import kfade
from kfade import (
    EKFAC,
    KFAC,
    Correction,
    Diagonal,
    find_targets,
    make_batches,
    margin,
)
from kfade.curvature import fit as fit_module
from kfade.curvature import jacobian
from kfade.curvature.passes import run_pass
from kfade.curvature.product import gauss_newton_product, quadratic_form
from kfade.curvature.store import Store
from kfade.curvature.vectors import Divided, OnDevice
from kfade.method.gradient import forget_gradient, kl_gradient
from kfade.method.measure import TokenLosses, hidden_reference, mean_divergence, mean_objectives
from kfade.models.head import body_of, read_head
from kfade.models.layers import decoder_blocks
from kfade.models.weights import digest_weights
from kfade.runtime import distributed

RETAIN = random_sequences(27)
FORGET = random_sequences(5, seed=2)
HELD_OUT = random_sequences(4, seed=1)
FITS = {"diagonal": Diagonal, "kfac": KFAC, "ekfac": EKFAC}


def batches_of(sequences, budget=20):
    return make_batches(sequences, budget=budget)


def tensors_of(curvature) -> dict[str, torch.Tensor]:
    """What does not depend on the signs of eigenvectors: G x for one x."""
    x = {name: torch.linspace(-1, 1, b.eigenvalues.numel(), dtype=torch.float64)
         .reshape(b.eigenvalues.shape) for name, b in curvature.blocks.items()}  # fmt: skip
    return curvature.matvec(x)


def bits_of(curvature) -> dict[str, torch.Tensor]:
    parts = ("q_out", "q_in", "eigenvalues")
    return {f"{name}/{part}": getattr(block, part)
            for name, block in curvature.blocks.items() for part in parts}  # fmt: skip


def numbers_summed(module, compute, *arguments) -> dict[str, int]:
    """How many numbers this process's sums hold in each pass of a computation, which ``module``
    runs."""
    found = {}

    def counting(model, batches, targets, sums, pseudo, name, *keeper, **head):
        found[name] = sum(tensor.numel() for tensor in sums.tensors().values())
        return run_pass(model, batches, targets, sums, pseudo, name, *keeper, **head)

    with unittest.mock.patch.object(module, "run_pass", counting):
        compute(*arguments)
    return found


def brought_rows() -> dict:
    """What each process gets of rows that are brought to one of them; the first has none."""
    rank, counts = distributed.rank(), [0, 2, 3, 1][: distributed.count()]
    rows = torch.full((counts[rank], 4), float(rank), dtype=torch.bfloat16)
    last = distributed.count() - 1
    return {
        "counts": counts,
        "largest": distributed.maximum(rank - 7),
        "any": [distributed.any_of(rank == last), distributed.any_of(rank > last)],
        "rows": distributed.gather_rows(last, rows, counts),
    }


def divided() -> dict:
    """A vector that is divided over the processes: what this one holds, and what all read."""
    held: dict[str, torch.Tensor] = {}
    with unittest.mock.patch.object(OnDevice, "vector", return_value=held):
        vector = Divided(OnDevice()).vector()
    shapes = {"matrix": (7, 5), "small": (2,), "number": (), "none": (0, 3), "dropped": (40,)}
    for name, shape in shapes.items():
        vector[name] = torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape)
    vector["small"] = torch.full((3,), 9.0, dtype=torch.float64)
    del vector["dropped"]
    storages = {name: part.untyped_storage().nbytes() // 8 for name, part in held.items()}
    return {"held": storages, "read": dict(vector)}


def compute(folder: Path, sharded: bool) -> dict:
    """Everything that must not depend on the number of processes."""
    model = tiny_llama()
    if sharded:
        distributed.shard(body_of(model), decoder_blocks(model)[1])
    targets = find_targets(model)
    before = {
        name: distributed.gather_full(p.detach()).clone() for name, p in model.named_parameters()
    }
    batches = batches_of(RETAIN)
    found: dict = {"batches": len(batches), "digest": digest_weights(model, before)}
    for name, fit in FITS.items():
        draw = Counted()
        found[f"G of {name}"] = tensors_of(fit(draw).fit(model, batches, targets))
        found[f"passes of {name}"] = draw.calls
    found["numbers summed"] = {
        **numbers_summed(fit_module, EKFAC().fit, model, batches, targets),
        **numbers_summed(jacobian, forget_gradient, model, batches, targets, margin),
    }
    found["G, one batch"] = tensors_of(EKFAC().fit(model, batches_of(RETAIN, 1000), targets))
    kept = folder / f"kept-{sharded}"
    if distributed.rank() == 0:
        kept.mkdir()
    distributed.barrier()
    options = {"memory": EKFAC().peak_bytes(targets[:2]), "store": Store(kept)}
    stored = EKFAC().fit(model, batches, targets, **options)
    found["G, stored in groups"], found["order"] = tensors_of(stored), list(stored.blocks)
    gradient = forget_gradient(model, batches_of(FORGET), targets, margin)
    found["gradient"] = gradient
    found["gradient, recomputed"] = forget_gradient(
        model, batches_of(FORGET), targets, margin, recompute=True
    )
    weighed = forget_gradient(model, batches_of(FORGET), targets, margin, weigh=True)
    found["gradient, weighed"] = dict(weighed)
    again = Diagonal().fit(model, batches, targets[3:], recompute=True)
    found["G of diagonal, recomputed"] = tensors_of(again)
    found["gradient, one batch"] = forget_gradient(model, batches_of(FORGET, 1000), targets, margin)
    measured = batches_of(HELD_OUT)
    found["quadratic form"] = quadratic_form(model, measured, targets, gradient)
    found["product"] = gauss_newton_product(model, measured, targets, gradient)
    corrected = Correction(count=1, sequences=20)
    options = {"kl": 0.02, "steps": 2, "refine": 1, "refine_sequences": 9, "correction": corrected}
    options |= {"noise": 0.5, "bound": 2.0, "at_prompts": True}
    update = kfade.unlearn(
        model,
        forget=FORGET,
        retain=RETAIN,
        held_out=[*HELD_OUT, *RETAIN[:8]],
        **flat(targets=targets, batch_tokens=20, **options),
    )
    # Of a sharded model it is divided over the processes, and read by all of them together.
    found["update"], found["provenance"] = dict(update.deltas), update.provenance
    base = hidden_reference(model, measured, "base")
    found["references"] = len(base.hidden)
    with update.applied_to(model):
        found["gradient of the KL"] = kl_gradient(model, base, targets)
        after = hidden_reference(model, measured, "after")
        found["objective"] = mean_objectives(model, batches_of(FORGET), [margin])
        losses = TokenLosses()
        mean_objectives(model, batches_of(FORGET), [losses])
        found["probability"] = losses.mean_probability(batches_of(FORGET))
    found["divergence"] = mean_divergence(read_head(model), base, after)
    found["lost"] = update.lost_fraction(model)
    found["weights kept"] = all(
        torch.equal(distributed.gather_full(p.detach()), before[name])
        for name, p in model.named_parameters()
    )
    found["numbers held"] = sum(t.weight.to_local().numel() if sharded else t.weight.numel()
                                for t in targets)  # fmt: skip
    update.apply(model)
    found["edited"] = {n: distributed.gather_full(p.detach()) for n, p in model.named_parameters()}
    return found


def interrupted(folder: Path, sharded: bool, lost: bool = True) -> dict:
    """A fit cut short in each process, elsewhere in each, and gone on with; ``lost`` are the sums
    of the second."""
    model = tiny_llama()
    if sharded:
        distributed.shard(body_of(model), decoder_blocks(model)[1])
    targets, batches = find_targets(model), batches_of(RETAIN)
    kept = folder / f"interrupted-{sharded}-{lost}"
    if distributed.rank() == 0:
        kept.mkdir()
    distributed.barrier()
    store = Store(kept, seconds=0.0)
    # A sharded model's processes run in step, so all of them stop in the same pass.
    own = len(distributed.share(batches, lambda batch: batch.positions))
    first = Counted(fail_at=2 if sharded else min(1 + distributed.rank(), own))
    with contextlib.suppress(RuntimeError):
        EKFAC(first).fit(model, batches, targets, store=store)
    if lost and distributed.rank() == 1:  # as if it had been slower in writing
        for path in kept.glob("sums-*-001.safetensors"):
            path.unlink()
    distributed.barrier()
    rest = Counted()
    resumed = EKFAC(rest).fit(model, batches, targets, store=store)
    whole = EKFAC().fit(model, batches, targets)
    return {
        "first": first.calls,
        "rest": rest.calls,
        "resumed": bits_of(resumed),
        "whole": bits_of(whole),
        "files": sorted(path.name for path in kept.iterdir()),
    }


def main(folder: Path) -> None:
    with distributed.processes():
        results = {"count": distributed.count(), "rank": distributed.rank()}
        results["brought"] = brought_rows()
        results["divided"] = divided()
        results["whole"] = compute(folder, sharded=False)
        results["interrupted"] = interrupted(folder, sharded=False)
        results["sharded"] = compute(folder, sharded=True)
        results["interrupted, sharded"] = interrupted(folder, sharded=True)
        results["interrupted, sharded, kept"] = interrupted(folder, sharded=True, lost=False)
        torch.save(results, folder / f"rank-{distributed.rank()}.pt")
