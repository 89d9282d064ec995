"""Experts of a mixture that see too little retain text to be changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kfade.data.batches import Batch
from kfade.data.sequences import TokenSequence
from kfade.errors import InputError
from kfade.evaluate.routing import chosen_experts
from kfade.models.experts import ExpertMap, expert_modules
from kfade.models.lengths import batches_for
from kfade.models.targets import Target, named
from kfade.runs.config import EstimatorConfig
from kfade.runs.inputs import SavedFit
from kfade.runs.session import Loaded
from kfade.runtime import distributed, progress
from kfade.runtime.counts import counted
from kfade.runtime.stages import stage


def leave_out_unfitted(loaded: Loaded, saved: SavedFit) -> Loaded:
    """The model with the experts among its targets that a saved curvature has."""
    fitted = saved.curvature.blocks
    kept = [target for target in loaded.targets if not target.is_routed or target.name in fitted]
    return replace(loaded, targets=kept)


def leave_out_rare(
    loaded: Loaded,
    retain: Sequence[TokenSequence],
    config: EstimatorConfig,
    batch_tokens: int,
) -> Loaded:
    """The model with the experts among its targets that at least ``config.expert_rows`` retain
    tokens reach.

    The retain set goes through the model once.

    Raises:
        InputError: nothing is left.
    """
    if not any(target.is_routed for target in loaded.targets):
        return loaded
    least = config.expert_rows
    with stage("load"):
        rows = expert_rows(loaded.model, batches_for(loaded.model, retain, batch_tokens))
    kept = [target for target in loaded.targets if _rows_of(target, rows) >= least]
    rare = [target for target in loaded.targets if _rows_of(target, rows) < least]
    if not kept:
        raise InputError(
            f"fewer than {least} retain tokens reach each of the chosen experts: give more retain "
            "text, other --experts, or a lower --expert-rows"
        )
    if rare:
        progress.say(
            f"left alone, since fewer than {counted(least, 'retain token')} reach their experts: "
            f"{counted(len(rare), 'weight')} ({named([target.name for target in rare])})"
        )
    return replace(loaded, targets=kept)


def expert_rows(model: Any, batches: Sequence[Batch]) -> dict[int, Tensor]:
    """Number of live positions that go to each expert [E], by the ``id`` of its layer's module."""
    # All layers, since a process may have no batch.
    layers = expert_modules(model)
    rows = {id(m): torch.zeros(m.num_experts, dtype=torch.float64) for m in layers}
    for module, chosen_RK in chosen_experts(model, batches):
        count_E = rows[id(module)]
        found_E = chosen_RK.flatten().bincount(minlength=len(count_E))[: len(count_E)]
        count_E += found_E.double().cpu()
    return {layer: distributed.all_reduce(count_E) for layer, count_E in rows.items()}


def _rows_of(target: Target, rows: dict[int, Tensor]) -> float:
    """Rows of a target's expert; without limit for other targets."""
    if not isinstance(target.module, ExpertMap):
        return float("inf")
    return float(rows[id(target.module.layer.module)][target.module.expert])
