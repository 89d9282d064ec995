"""Activation checkpointing: run decoder blocks again in the backward pass.

Usually a forward pass keeps the activations that autograd needs, in every block many times the
block's input. Here each block from the lowest target upwards runs without a graph and keeps only
its input. When the gradient of its output arrives, the block runs again with a graph, and the
gradient is propagated through that. The same operations in the same order give the same bits, at
the cost of one more forward pass through those blocks.

If a block passes on anything besides its output, the gradients of that are lost. So each use first
compares gradients on a few tokens with those of a plain pass.

Shapes: B batch, T positions, D hidden width, O outputs of a layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from kfade.curvature.capture import capture
from kfade.errors import InputError, first_line
from kfade.models.experts import Routing
from kfade.models.head import FEW, hidden_states, trial_tokens
from kfade.models.layers import decoder_blocks
from kfade.models.load import frozen
from kfade.models.targets import Target


@contextlib.contextmanager
def recomputing(model: nn.Module, targets: Sequence[Target], wanted: bool = True) -> Iterator[None]:
    """Within the ``with``, if ``wanted``, blocks are recomputed in passes with gradients.

    Each block from the lowest of ``targets`` upwards then runs twice: without a graph in the
    forward pass, with one in the backward pass. Passes without gradients, and lower blocks, are
    unchanged. Hooks on modules within a block see both runs and can distinguish them by
    ``torch.is_grad_enabled()``.

    Raises:
        InputError: gradients with and without recomputing differ on a few tokens, or blocks cannot
            run twice.
    """
    if wanted and not isinstance(targets[0].parameter, FakeTensor):
        _refuse_other_gradients(model, targets)
    with _running_twice(model, targets, wanted):
        yield


@contextlib.contextmanager
def _running_twice(model: nn.Module, targets: Sequence[Target], wanted: bool) -> Iterator[None]:
    blocks: list[nn.Module] = []
    if wanted:
        lowest = min(target.block for target in targets)
        blocks = list(decoder_blocks(model)[1])[lowest:]
    own = [vars(block).get("forward") for block in blocks]  # wrappers set by others
    try:
        for block in blocks:
            # ``forward``, not the call: hooks gather a sharded block once for both, second run and
            # gradient.
            block.forward = _checkpointed(block.forward)
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            vars(block).pop("forward", None)
            if forward is not None:
                block.forward = forward


def _refuse_other_gradients(model: nn.Module, targets: Sequence[Target]) -> None:
    """Raise InputError if recomputing changes the gradients of targets' outputs on a few tokens.

    The bits are equal where a device uses the same kernels, adding in the same order, in both runs
    of a block. Elsewhere the two differ by some units in the last place. The limit is 4 eps, at
    least 1e-4: far below any effect on a step, and far below what a lost path would take away.
    """
    with frozen(model):
        plain = _trial_gradients(model, targets)
        try:
            with _running_twice(model, targets, True):
                twice = _trial_gradients(model, targets)
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"--recompute: the blocks of {type(model).__name__} cannot run twice "
                f"({type(error).__name__}: {first_line(error)}); leave it out"
            ) from error
    for name, g_BTO in plain.items():
        other_BTO = twice.get(name, torch.zeros_like(g_BTO))
        apart = (other_BTO.double() - g_BTO.double()).norm()
        limit = max(1e-4, 4 * torch.finfo(g_BTO.dtype).eps) * g_BTO.double().norm()
        if apart > limit:
            raise InputError(
                f"--recompute: it changes the gradient at {name} by "
                f"{apart / g_BTO.double().norm():.1e} of its size on {FEW} tokens: blocks of "
                f"{type(model).__name__} hand on more than their output (keys and values, say); "
                "leave it out"
            )


def _trial_gradients(model: nn.Module, targets: Sequence[Target]) -> dict[str, Tensor]:
    """The gradient of each target's output, for a weighted sum of the final hidden states."""
    found: dict[str, Tensor] = {}

    def on_gradient(target: Target, g_BTO: Tensor, routing: Routing | None) -> None:
        found[target.name] = g_BTO

    with capture(targets, on_gradient=on_gradient):
        with torch.enable_grad():
            hidden_BTD = hidden_states(model, trial_tokens(model, FEW))
        hidden_BTD.backward(uneven_like(hidden_BTD))
    return found


def uneven_like(x: Tensor) -> Tensor:
    """Numbers between -1 and 1, all different: a norm's derivative along equal numbers is zero."""
    steps = torch.arange(x.numel(), device=x.device, dtype=torch.float32)
    return steps.cos().to(x.dtype).view(x.shape)


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
