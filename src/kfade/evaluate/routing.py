"""How many tokens an edit of a mixture of experts sends to other experts.

The method takes the choice of experts as fixed, so its predictions hold while this share is small.

Shapes: N positions of a batch, R live ones of them, K experts of a position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from kfade.data.batches import Batch
from kfade.models.experts import choices
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
    before = _ascending(model, batches)
    with edited() as other:
        after = _ascending(other, batches)
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
            "; steps are computed for fixed routing, so trust the measured KL only, and compare "
            "with --experts none, or with later blocks only (--layers), which reach fewer routers"
        )
    return line


def _ascending(model: nn.Module, batches: Sequence[Batch]) -> list[Tensor]:
    """The experts [R, K] of every call, in ascending order."""
    found = chosen_experts(model, batches)
    return [chosen_RK.sort(dim=1).values.to("cpu", torch.int16) for _, chosen_RK in found]


def chosen_experts(
    model: nn.Module, batches: Sequence[Batch]
) -> Iterator[tuple[nn.Module, Tensor]]:
    """(layer, experts [R, K] of the live positions) for each call of a layer of experts, in passes
    over this process's share of the batches."""
    check_lengths(model, batches)
    own = distributed.share(batches, lambda batch: batch.positions)
    missing = distributed.extra_passes(model, len(own))
    with frozen(model), torch.no_grad():
        for batch in track(own, "routing", lambda b: b.positions):
            with choices(model) as chosen:
                hidden_states(model, batch.input_BT)
            for layer, chosen_NK in chosen:
                yield layer, chosen_NK[batch.live_index]
        for _ in range(missing):
            hidden_states(model, batches[-1].input_BT)
