"""Attacks in each of several processes, for test_relearning_processes.py."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import torch
from helpers import random_sequences, tiny_llama

import kfade.runs.attacking as attacking
from kfade.cli import INTERRUPTED, main
from kfade.evaluate.relearning import Examination, Tuning, attack, fine_tune
from kfade.method.update import Update
from kfade.models.head import body_of
from kfade.models.layers import decoder_blocks
from kfade.runtime import distributed

DATA, FORGET, HELD_OUT = (random_sequences(7, seed=seed) for seed in range(3))
TUNING = Tuning(4, 1e-2, 5, warmup=2, weight_decay=0.1, batch_tokens=10, seed=1)


def made(sharded: bool):
    model = tiny_llama()
    if sharded:
        distributed.shard(body_of(model), decoder_blocks(model)[1])
    return model


def weights_of(model) -> dict[str, torch.Tensor]:
    own = model.named_parameters()
    return {name: distributed.gather_full(p.detach()).clone() for name, p in own}


def compute(sharded: bool) -> dict:
    """An attack on an edited model, and the weights after the same fine-tuning."""
    model = made(sharded)
    before = weights_of(model)
    name = "model.layers.1.mlp.up_proj.weight"
    update = Update({name: torch.full((12, 8), 0.1, dtype=torch.float64)})
    examine = Examination(model, forget=FORGET, held_out=HELD_OUT, batch_tokens=20)
    found = attack(model, update, DATA, examine, tuning=TUNING, at=[0, 2, 4])
    after = weights_of(model)
    fine_tune(model, DATA, TUNING)
    single = made(sharded)
    fine_tune(single, DATA, Tuning(2, 1e-2, 1))  # fewer sequences in a step than processes
    return {
        "figures": [(m.state, m.step, m.figures.values) for m in found],
        "kept": all(torch.equal(after[n], before[n]) for n in before),
        "tuned": weights_of(model),
        "tuned one by one": weights_of(single),
    }


def work(folder: Path) -> None:
    with distributed.processes():
        found = {"whole": compute(False), "sharded": compute(True)}
        with mock.patch.object(distributed, "sum_gradients"):
            found["not summed"] = compute(False)
        torch.save(found, folder / f"rank-{distributed.rank()}.pt")


def interrupted(words: list[str]) -> int:
    """Run ``kfade attack`` up to its second kind of data; 0 if it ended as an interrupted one."""
    real, calls = attacking.attack_model, []

    def tripped(*arguments, **named):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **named)

    with mock.patch.object(attacking, "attack_model", tripped):
        return int(main(words) != INTERRUPTED)
