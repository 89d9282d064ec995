"""Run decoder blocks once more in the backward pass, instead of keeping what they hold for it.

The forward pass that a backward pass follows keeps, of every block, what autograd will ask for:
many times the block's input. Here each block from the lowest target upwards runs without a graph
and keeps its input; when the gradient of its output has come it runs again, with a graph, and the
gradient goes through that. The same operations in the same order give the same bits, for one more
forward pass through those blocks.

Shapes: B batch, T positions, D hidden width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from kfade.errors import InputError
from kfade.models.layers import Target, decoder_blocks


@contextlib.contextmanager
def recomputing(model: nn.Module, targets: Sequence[Target], wanted: bool = True) -> Iterator[None]:
    """Within the ``with``, if ``wanted``, the blocks from the lowest of ``targets`` upwards run
    twice in a pass with gradients: without a graph, and with one when their gradient has come.

    Passes without gradients, and the blocks below, run as ever. Hooks on modules within a block
    see both runs, and tell them apart by ``torch.is_grad_enabled()``.

    Raises:
        InputError: in a pass, if gradients go from block to block by other ways than the block's
            first argument.
    """
    blocks: list[nn.Module] = []
    if wanted:
        lowest = min(target.block for target in targets)
        blocks = list(decoder_blocks(model)[1])[lowest:]
    own = [vars(block).get("forward") for block in blocks]  # a wrapper that was there before
    try:
        for block in blocks:
            # Not the whole call: a sharded block is gathered once for its gradient and second run.
            block.forward = _checkpointed(block.forward)
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            vars(block).pop("forward", None)
            if forward is not None:
                block.forward = forward


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        first, rest = args[:1], args[1:]
        others = [x for x in tree_leaves((rest, kwargs)) if isinstance(x, Tensor)]
        if not first or any(tensor.requires_grad for tensor in others):
            raise InputError(
                "--recompute: in this model more than the first argument carries gradients from "
                "block to block; leave it out"
            )

        def run_block(hidden_BTD: Tensor, anchor: Tensor) -> Any:
            return forward(hidden_BTD, *rest, **kwargs)

        # The lowest block's input requires no gradient. Without an argument that requires one, the
        # checkpoint would take no part in the backward pass.
        anchor = first[0].new_empty(0).requires_grad_()
        return checkpoint(run_block, *first, anchor, use_reentrant=True, preserve_rng_state=False)

    return run
