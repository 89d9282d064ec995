"""The baselines: their losses as the experiments set them, training, and the KL at the target."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch.optim import AdamW

from kfade.baselines import rmu
from kfade.baselines.loop import train
from kfade.baselines.methods import Method
from kfade.baselines.settings import Settings
from kfade.baselines.weights import Dense
from kfade.data.sequences import TokenSequence
from kfade.method.update import Update
from kfade.models.layers import decoder_blocks
from kfade.models.lengths import batches_for
from kfade.runs.baseline_choices import builder_of
from kfade.runs.session import Loaded

from .fine_tune import block_weights
from .forgetting import BUDGET, TRAIN_BUDGET

RMU_LENGTH = 3.0  # of the control vector, times the median length of hidden states at its block
RMU_RETAIN_WEIGHT = 100.0


def method_of(
    name: str, model: Any, forget: Sequence[TokenSequence], tokenizer: Any = None, **options: Any
) -> Method:
    """The method of ``kfade baseline NAME`` with the given options of its loss.

    RMU works on the block at a third of the model's depth.
    """
    loaded = Loaded(model, tokenizer, [])
    if name == "rmu":
        layer = len(decoder_blocks(model)[1]) // 3
        block = rmu.find_block(model, layer)
        with torch.no_grad():
            lengths = [
                rmu.live_output(model, block, batch).norm(dim=-1)
                for batch in batches_for(model, forget, BUDGET)
            ]
        length = RMU_LENGTH * torch.cat(lengths).median().item()
        options = {"layer": layer, "coefficient": length, "retain_weight": RMU_RETAIN_WEIGHT}
    return builder_of(name, options)(loaded, 0)


def train_baseline(
    model: Any,
    method: Method,
    sets: dict[str, Sequence[TokenSequence]],
    on_evaluation: Callable[[Any, Update], bool],
    **options: Any,
) -> Update:
    """Train all weights of the blocks, or those that the method names, at a constant rate.

    A run ends when it has forgotten enough, which is not known beforehand, so the rate does not
    decay.

    Args:
        sets: sequences by name: ``forget``, ``retain``, ``held_out``.
        on_evaluation: called with a checkpoint and the update; True ends the run.
        options: settings that are not the method's own: ``lr``, ``steps``, ``batch`` and others
            of :class:`~kfade.baselines.settings.Settings`.

    Raises:
        InputError: the loss is not finite.
    """
    defaults = method.defaults
    # Over all weights a fused step takes a seventh of the time on a CPU.
    fused = partial(AdamW, fused=True)
    settings = Settings(
        weight_decay=defaults.weight_decay,
        clip=defaults.clip,
        optimizer=fused if defaults.optimizer is AdamW else defaults.optimizer,
        selection=defaults.selection,
        batch_tokens=TRAIN_BUDGET,
        **options,
    )
    trainable = Dense(model, method.trains or block_weights(model))
    return train(model, method.terms, trainable, sets, settings, on_evaluation=on_evaluation)


def at_target(curve: Sequence[dict[str, float]], target: float) -> dict[str, float] | None:
    """``kl``, and ``report_kl`` if measured, at the lowest ``kl`` at or below the target.

    Where the curve crosses the target between two evaluations, √KL is interpolated linearly in
    log p. None if the curve does not reach the target.
    """
    found: list[dict[str, float]] = []
    for before, after in pairwise(curve):
        if after["forget_probability"] > target:
            continue
        reached = {name: after[name] for name in ("kl", "report_kl") if name in after}
        found.append(reached)
        if before["forget_probability"] > target:
            first, last = nats(before["forget_probability"]), nats(after["forget_probability"])
            share = (nats(target) - first) / (last - first)
            found.append(
                {
                    name: ((1 - share) * before.get(name, 0.0) ** 0.5 + share * end**0.5) ** 2
                    for name, end in reached.items()
                }
            )
    return min(found, key=lambda kls: kls["kl"], default=None)


def nats(probability: float) -> float:
    """−log p, finite if p has underflowed."""
    return -math.log(max(probability, 1e-300))
