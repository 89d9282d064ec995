"""Run decoder blocks once more in the backward pass, instead of keeping what they hold for it.

The forward pass that a backward pass follows keeps, of every block, what autograd will ask for:
many times the block's input. Here each block from the lowest target upwards runs without a graph
and keeps its input; when the gradient of its output has come it runs again, with a graph, and the
gradient goes through that. The same operations in the same order give the same bits, for one more
forward pass through those blocks.

What a block hands on by another way than its output is lost, and with it the gradients that come
back by that way. Each use is therefore tried on a few tokens first, against a plain pass.

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
from kfade.models.head import FEW, hidden_states, trial_tokens
from kfade.models.layers import Target, decoder_blocks
from kfade.models.load import frozen


@contextlib.contextmanager
def recomputing(model: nn.Module, targets: Sequence[Target], wanted: bool = True) -> Iterator[None]:
    """Within the ``with``, if ``wanted``, the blocks from the lowest of ``targets`` upwards run
    twice in a pass with gradients: without a graph, and with one when their gradient has come.

    Passes without gradients, and the blocks below, run as ever. Hooks on modules within a block
    see both runs, and tell them apart by ``torch.is_grad_enabled()``.

    Raises:
        InputError: gradients with and without differ on a few tokens, or blocks cannot run twice.
    """
    if wanted and not isinstance(targets[0].weight, FakeTensor):
        _refuse_other_gradients(model, targets)
    with _running_twice(model, targets, wanted):
        yield


@contextlib.contextmanager
def _running_twice(model: nn.Module, targets: Sequence[Target], wanted: bool) -> Iterator[None]:
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


def _refuse_other_gradients(model: nn.Module, targets: Sequence[Target]) -> None:
    """Compare the gradients of all targets' outputs on a few tokens with those of a plain pass.

    The bits are the same where a device computes the first run of a block and the second in the
    same kernels, adding in the same order. Elsewhere each rounds for itself, by some units in the
    last place, and as much is allowed for: 4 eps, and 1e-4 at least, which no use of a gradient
    notices. A way that is lost takes its whole share of the gradient with it.
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
    """By target, the gradient of its output for uneven weights of the final hidden states."""
    found: dict[str, Tensor] = {}
    with capture(targets, on_gradient=lambda target, g_BTO: found.update({target.name: g_BTO})):
        with torch.enable_grad():
            hidden_BTD = hidden_states(model, trial_tokens(model, FEW))
        hidden_BTD.backward(uneven_like(hidden_BTD))
    return found


def uneven_like(x: Tensor) -> Tensor:
    """Numbers between -1 and 1 that do not add up to zero anywhere: a norm's derivative along
    equal ones is zero."""
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
