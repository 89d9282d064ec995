"""RMU: hidden states of forget text are moved to a random vector, those of retain text held.

    loss = mean ‖h_ℓ(x_f) − c u‖² + a mean ‖h_ℓ(x_r) − h_ℓ^base(x_r)‖²      over live positions

h_ℓ is the output of block ℓ, u the direction of a draw from [0, 1)^D. The last feed-forward maps of
blocks ℓ−2, ℓ−1 and ℓ are trained (Li et al. 2024). The reference code also averages over the D
coordinates: its loss is this one divided by D, which makes no difference to Adam.

The forward pass stops at block ℓ: the blocks above it and the head are not run. Of a sharded model
all blocks are run, since FSDP's state between passes needs whole passes.

Shapes: B batch, T positions, P live positions, D hidden width.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from kfade.baselines.losses import Net, Row, Rows, Term, alone, positions
from kfade.data.batches import Batch
from kfade.data.sequences import TokenSequence
from kfade.errors import InputError
from kfade.models.head import hidden_states
from kfade.models.layers import find_targets
from kfade.models.targets import Target
from kfade.runtime import distributed

TRAINED_BLOCKS = 3


class _Reached(Exception):
    """Ends a forward pass at the block."""


def steering(block: nn.Module, vector_D: Tensor) -> Term:
    """Mean ‖h_ℓ − c u‖² on forget text, ``vector_D`` being c u."""

    def values(net: Net, batch: Batch, rows: Rows) -> Tensor:
        hidden_PD = live_output(net.model, block, batch)
        return (hidden_PD - vector_D.to(hidden_PD)).square().sum(dim=-1)

    return Term("forget", 1.0, values, positions)


def holding(block: nn.Module, weight: float) -> Term:
    """a times the mean ‖h_ℓ − h_ℓ^base‖² on retain text."""

    def values(net: Net, batch: Batch, rows: Rows) -> Tensor:
        hidden_PD = live_output(net.model, block, batch)
        base_PD = torch.cat([row[0] for row in rows])
        return (hidden_PD - base_PD.to(hidden_PD)).square().sum(dim=-1)

    def reference(net: Net, sequence: TokenSequence) -> Row:
        return (live_output(net.model, block, alone(net, sequence)),)

    return Term("retain", weight, values, positions, reference)


def control_vector(width: int, coefficient: float, seed: int) -> Tensor:
    """c u [D] with u = r / ‖r‖, r uniform in [0, 1)^D; a seed gives the same one on any device."""
    draw_D = torch.rand(width, generator=torch.Generator().manual_seed(seed), device="cpu")
    return coefficient * draw_D / draw_D.norm()


def live_output(model: nn.Module, block: nn.Module, batch: Batch) -> Tensor:
    """The output [P, D] of ``block`` at live positions, in float32 or better."""

    found: list[Tensor] = []
    whole = distributed.is_sharded(model)

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)
        if not whole:
            raise _Reached

    handle = block.register_forward_hook(stop)
    try:
        with contextlib.suppress(_Reached):
            hidden_states(model, batch.input_BT)
    finally:
        handle.remove()
    (output,) = found
    hidden_PD = output[batch.live_BT]
    return hidden_PD.to(torch.promote_types(hidden_PD.dtype, torch.float32))


def find_block(model: nn.Module, layer: int) -> nn.Module:
    """Decoder block number ``layer``, from 0.

    Raises:
        InputError: the model has no such block.
    """
    first = _targets(model, layer)[0]
    blocks = first.name.partition(f".{first.block}.")[0]
    return model.get_submodule(f"{blocks}.{layer}")


def trained_weights(model: nn.Module, layer: int) -> list[str]:
    """Names of the last feed-forward map of ``layer`` and of the two blocks before it.

    Raises:
        InputError: the model has no such block.
    """
    last: dict[int, str] = {}
    for target in _targets(model, layer):  # in the order of the forward pass
        last[target.block] = target.name
    return [last[b] for b in range(max(0, layer + 1 - TRAINED_BLOCKS), layer + 1)]


def _targets(model: nn.Module, layer: int) -> list[Target]:
    targets = find_targets(model)
    last = max(target.block for target in targets)
    if not 0 <= layer <= last:
        raise InputError(f"--layer {layer}: this model has blocks 0 to {last}")
    return targets
