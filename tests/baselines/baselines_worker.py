"""Training runs of every method, for test_baselines_loop.py, and of each of several processes, for
test_baselines_processes.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from helpers import random_sequences, same_bits, tiny_llama

from kfade.baselines import methods, training
from kfade.baselines.checkpoint import Checkpoint
from kfade.baselines.elm import Guidance
from kfade.baselines.loop import train
from kfade.baselines.settings import Settings
from kfade.baselines.weights import Dense, LowRank
from kfade.models.head import body_of
from kfade.models.layers import decoder_blocks
from kfade.runtime import distributed

FORGET = random_sequences(7, seed=1)
RETAIN = random_sequences(9, seed=2)
HELD_OUT = random_sequences(4, seed=3)
SETS = {"forget": FORGET, "retain": RETAIN, "held_out": HELD_OUT}
STEERING = Guidance((1, 2, 3), (1, 4, 5), (6, 7), bos=None, eos=None, window=64, fluent_tokens=4)
NAMES = (
    *("ga", "gd", "kl-min", "npo", "npo-sam", "simnpo", "wga", "satimp", "undial", "soul", "rmu"),
    *("repselect", "elm"),
)


def method_of(name: str, model) -> methods.Method:
    match name:
        case "ga":
            return methods.gradient_ascent()
        case "gd":
            return methods.gradient_difference()
        case "kl-min":
            return methods.kl_minimisation()
        case "npo":
            return methods.npo()
        case "npo-sam":
            return methods.npo_sam()
        case "simnpo":
            return methods.simnpo()
        case "wga":
            return methods.wga()
        case "satimp":
            return methods.satimp()
        case "undial":
            return methods.undial()
        case "soul":
            return methods.soul()
        case "rmu":
            return methods.rmu(model, layer=1)
        case "repselect":
            return methods.repselect(model, components=4, adapter_lr=0.1)
    return methods.elm(STEERING)


def dense(model, names=None) -> Dense:
    return Dense(model, names or [name for name, _ in model.named_parameters()])


def lora(model, dropout: float = 0.05) -> LowRank:
    targets = methods.block_targets(model, None)
    return LowRank(model, targets, rank=3, alpha=6, dropout=dropout, seed=0)


def settings(**other) -> Settings:
    given = {"lr": 1e-2, "steps": 6, "batch": 3, "accumulate": 2, "warm_up": 2, "decay": True}
    return Settings(**{**given, "weight_decay": 0.01, **other})


def run(name: str, model, trainable=None, **other):
    method = method_of(name, model)
    if trainable is None:
        trainable = lora(model) if name == "elm" else dense(model, method.trains)
    own = settings(optimizer=method.defaults.optimizer)
    calls = {name: other.pop(name) for name in ("start", "on_evaluation") if name in other}
    sets = {**SETS, **{name: other.pop(name) for name in SETS if name in other}}
    given = other.pop("settings", own)
    made = replace(given, **{"selection": method.defaults.selection, **other})
    return train(model, method.terms, trainable, sets, made, **calls)


def same(first, second) -> bool:
    assert first.deltas.keys() == second.deltas.keys()
    return all(same_bits(first.deltas[n], second.deltas[n]) for n in first.deltas)


def difference(first, second) -> float:
    """‖first − second‖ / ‖second‖ of two updates."""
    pairs = [(first.deltas[n], second.deltas[n]) for n in second.deltas]
    apart = sum((a - b).square().sum() for a, b in pairs)
    return (apart / sum(b.square().sum() for _, b in pairs)).sqrt().item()


# --- What each of several processes computes ----------------------------------------------------

SHARDED = tuple(name for name in NAMES if name not in ("repselect", "elm"))  # they do not run then
RESUMED = ("kl-min", "npo-sam", "soul", "rmu")


def made(sharded: bool, dtype: torch.dtype = torch.float64):
    model = tiny_llama(dtype, layers=3)
    if sharded:
        distributed.shard(body_of(model), decoder_blocks(model)[1])
    return model


def told(update) -> dict:
    return {"deltas": dict(update.deltas), "provenance": update.provenance}


def alike(name: str, model, low_rank: bool = False, **other) -> dict:
    """A run that differs between numbers of processes by the rounding of sums alone.

    SGD: Adam would blow up rounding where a gradient is nearly zero. Without dropout, whose masks
    are drawn in each process.
    """
    trainable = lora(model, dropout=0.0) if low_rank or name == "elm" else None
    plain = settings(**{"optimizer": torch.optim.SGD, "steps": 3, "clip": 1.0, **other})
    return told(run(name, model, trainable, settings=plain))


def resumed(name: str, folder: Path, sharded: bool) -> dict:
    """A run of the method's own optimiser, whole and interrupted; and gone on with in a model that
    is not sharded."""
    model, path = made(sharded), folder / f"{name}-{sharded}.safetensors"

    def keep_second(checkpoint, update):
        if checkpoint.curve[-1]["step"] == 4:
            checkpoint.save(path) if distributed.rank() == 0 else checkpoint.read()

    # A KL budget, so that what is kept may lie before the interruption.
    budget = {"evaluate_every": 2, "max_kl": 0.05}
    found = told(run(name, model, on_evaluation=keep_second, **budget))
    distributed.barrier()
    again = run(name, model, start=Checkpoint.load(path), **budget)
    other = run(name, made(False), start=Checkpoint.load(path), **budget)
    return {**found, "resumed": told(again), "resumed whole": told(other)}


def held(sharded: bool) -> dict[str, dict[str, int]]:
    """Numbers that this process has of each weight: in its master, and in the optimiser's state."""
    model, optimizers = made(sharded), []
    trainable, make = dense(model), training._optimizer

    def noting(*arguments):
        optimizers.append(make(*arguments))
        return optimizers[-1]

    with mock.patch.object(training, "_optimizer", noting):
        run("gd", model, trainable)
    (optimizer,) = optimizers
    state = {
        name: sum(value.numel() for value in optimizer.state[tensor].values() if value.dim())
        for name, tensor in trainable.tensors.items()
    }
    return {"masters": {n: t.numel() for n, t in trainable.tensors.items()}, "state": state}


def compute(folder: Path, sharded: bool) -> dict:
    names = SHARDED if sharded else NAMES
    return {
        **{name: alike(name, made(sharded)) for name in names},
        "low rank": alike("gd", made(sharded), low_rank=True),
        "low rank, sharp": alike("npo-sam", made(sharded), low_rank=True),
        "few sequences": alike("ga", made(sharded), batch=1, accumulate=1),
        "bfloat16": alike("gd", made(sharded, torch.bfloat16)),
        "resumed": {name: resumed(name, folder, sharded) for name in RESUMED},
        "held": held(sharded),
    }


def main(folder: Path) -> None:
    with distributed.processes():
        found = {"whole": compute(folder, False), "sharded": compute(folder, True)}
        with mock.patch.object(distributed, "sum_gradients"):
            found["not summed"] = {name: alike(name, made(False)) for name in NAMES}
        torch.save(found, folder / f"rank-{distributed.rank()}.pt")
