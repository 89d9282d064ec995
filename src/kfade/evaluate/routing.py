"""How many tokens an edit of a mixture of experts sends to other experts.

The method takes the choice of experts as fixed, so its predictions hold while this share is small.

Shapes: N positions of a batch, R live ones of them, K experts of a position.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from kfade.data.batches import Batch
from kfade.models.experts import is_expert_layer
from kfade.models.head import hidden_states
from kfade.models.lengths import check_lengths
from kfade.models.load import frozen
from kfade.runtime import distributed
from kfade.runtime.progress import track

LARGE = 0.05
"""Share of rerouted positions from which :func:`routing_line` says what to do."""


def rerouted_share(
    model: nn.Module,
    batches: Sequence[Batch],
    edited: Callable[[], AbstractContextManager[nn.Module]],
) -> float | None:
    """Share of the (live position, layer) pairs whose set of experts differs in the edited model.

    The order of the experts and their weights do not count. All layers of experts count that call
    their experts with the choice of each position.

    Args:
        edited: makes the edited model within a ``with``.

    Returns:
        The share; None if the model has no such layer.
    """
    before = _chosen_experts(model, batches)
    with edited() as other:
        after = _chosen_experts(other, batches)
    changed = sum(
        int((one_RK != other_RK).any(dim=1).sum())
        for one_RK, other_RK in zip(before, after, strict=True)
    )
    pairs = sum(len(chosen_RK) for chosen_RK in before)
    moved, total = distributed.all_reduce_numbers([changed, pairs])
    return moved / total if total else None


def routing_line(held_out: float, forget: float) -> str:
    """One line of text about the shares on held-out retain data and on the forget set."""
    line = (
        f"routing: {100 * held_out:.2g} % of the held-out retain positions and {100 * forget:.2g} "
        "% of the forget positions go to other experts than before, on average over layers"
    )
    if max(held_out, forget) >= LARGE:
        line += (
            "; steps are computed for fixed routing: take more, smaller steps (--steps), or change "
            "later blocks only (--layers), which reach fewer routers"
        )
    return line


def _chosen_experts(model: nn.Module, batches: Sequence[Batch]) -> list[Tensor]:
    """The experts [R, K] of the live positions, in ascending order, for each call of a layer of
    experts in passes over this process's share of the batches."""
    check_lengths(model, batches)
    own = distributed.share(batches, lambda batch: batch.positions)
    missing = distributed.extra_passes(model, len(own))
    found: list[Tensor] = []
    with frozen(model), torch.no_grad():
        for batch in track(own, "routing", lambda b: b.positions):
            with _choices(model) as chosen:
                hidden_states(model, batch.input_BT)
            found += [
                chosen_NK[batch.live_index].sort(dim=1).values.to("cpu", torch.int16)
                for chosen_NK in chosen
            ]
        for _ in range(missing):
            hidden_states(model, batches[-1].input_BT)
    return found


@contextlib.contextmanager
def _choices(model: nn.Module) -> Iterator[list[Tensor]]:
    """Within the ``with``, the list gets the choice [N, K] of every call of a layer of experts."""
    chosen: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        if len(args) > 1:  # (hidden states, experts of each position, their weights)
            chosen.append(args[1].flatten(0, -2))

    handles = [m.register_forward_pre_hook(note) for m in model.modules() if is_expert_layer(m)]
    try:
        yield chosen
    finally:
        for handle in handles:
            handle.remove()
