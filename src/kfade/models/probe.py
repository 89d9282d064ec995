"""Run a few tokens through a model and see which of its linear maps can be changed.

Shapes: B sequences, T positions of each, R = B·T rows, I inputs, O outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from kfade.models.experts import ExpertMap
from kfade.models.head import refuse_looking_ahead, run_on_tokens
from kfade.models.load import frozen
from kfade.models.targets import ForwardHook, LeftOut, Target, expert_layers_of, hooked
from kfade.models.weights import parameter_of

PROBE = (2, 3)  # sequences and positions of the trial: different, so that axes can be told apart


class Seen:
    """What a forward pass over a few tokens shows of each target."""

    def __init__(self, model: nn.Module, targets: list[Target], input_BT: Tensor) -> None:
        self.calls: dict[str, int] = {}
        self.inputs: dict[str, Tensor] = {}
        """In the order of the forward pass; kept, so that equal ids mean the same tensor."""
        self.linear: dict[str, bool] = {}
        """Whether the output is W a + b; no entry for fake tensors, which have no values."""
        self._entering: dict[int, Tensor] = {}
        handles = [
            layer.module.register_forward_pre_hook(partial(self._enter, id(layer)))
            for layer in expert_layers_of(targets)
        ]
        try:
            with hooked(targets, self._note, every=False, with_kwargs=True), torch.no_grad():
                run_on_tokens(model, input_BT)
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, layer: int, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Note what enters a layer of experts: the rows of all positions."""
        self._entering[layer] = args[0]

    def _note(self, target: Target) -> ForwardHook:
        def hook(module: Any, args: tuple[Any, ...], named: Any, output: Any) -> None:
            self.calls[target.name] = self.calls.get(target.name, 0) + 1
            if not args or not isinstance(args[0], Tensor) or not isinstance(output, Tensor):
                self.linear[target.name] = False
                return
            self.inputs[target.name] = a = args[0]
            if isinstance(module, ExpertMap):
                self.inputs[target.name] = self._entering[id(module.layer)]
                if not len(a):
                    return
            if isinstance(output, FakeTensor) or not torch.isfinite(output).all():
                return
            weight = module.weight.T if target.transposed else module.weight
            expected = nn.functional.linear(a, weight, module.bias)
            close = expected.shape == output.shape and (
                (expected - output).abs().max() <= 0.05 * expected.abs().max()
            )
            self.linear[target.name] = bool(close)

        return hook


def probe(model: nn.Module, targets: list[Target]) -> tuple[Seen, list[LeftOut]]:
    """(what a pass over a few tokens shows, the targets that cannot be changed).

    A target may read its input as [B, T, I] or as rows [B·T, I], where row b·T + t is position t of
    sequence b. The order of rows is tested with a second pass, in which one token differs.
    """
    fake = isinstance(targets[0].parameter, FakeTensor)
    vocabulary = cast(Any, model).get_input_embeddings().weight.shape[0]
    input_R = (torch.arange(PROBE[0] * PROBE[1], device=targets[0].device) + 3) % vocabulary
    input_BT = input_R.view(PROBE)
    moved: dict[str, Tensor] = {}
    with frozen(model):
        if not fake:
            refuse_looking_ahead(model)
        seen = Seen(model, targets, input_BT)
        in_rows = [t for t in targets if t.name in seen.inputs and seen.inputs[t.name].ndim == 2]
        if in_rows and not fake:
            other_BT = input_BT.clone()
            other_BT[0, -1] = 2
            moved = Seen(model, in_rows, other_BT).inputs
    unfit = [_unfit(target.name, seen, moved) for target in targets]
    return seen, [weight for weight in unfit if weight is not None]


def _unfit(name: str, seen: Seen, moved: Mapping[str, Tensor]) -> LeftOut | None:
    """Why a target cannot be changed, or None."""
    calls = seen.calls.get(name, 0)
    if calls == 0:
        return LeftOut(
            name,
            "maps that a forward pass does not run by themselves",
            "takes no part in a forward pass as a layer of its own (unused, or a routed expert)",
        )
    if calls > 1:
        return LeftOut(
            name,
            "maps that a forward pass runs more than once",
            "is used more than once in a forward pass (a shared layer)",
        )
    if not seen.linear.get(name, True):
        reason = "does not map its input a to W a + b"
        return LeftOut(name, "layers that are not a plain linear map", reason)
    a = seen.inputs[name]
    rows = PROBE[0] * PROBE[1]
    in_order = a.shape[:-1] == PROBE or (
        a.shape[:-1] == (rows,) and (name not in moved or _in_order(a, moved[name]))
    )
    if in_order:
        return None
    return LeftOut(
        name,
        "maps that do not read one vector for each position",
        f"does not read one vector for each position, {[*PROBE, a.shape[-1]]} or, in their order, "
        f"{[rows, a.shape[-1]]}, but {list(a.shape)} (routed experts, or another order)",
    )


def _in_order(a_RI: Tensor, moved_RI: Tensor) -> bool:
    """Whether a change of the first sequence's last token has changed only that token's row."""
    if a_RI.shape != moved_RI.shape:
        return False
    moved_R = (a_RI - moved_RI).abs().amax(dim=1) > 1e-3 * a_RI.abs().max()
    moved_R[PROBE[1] - 1] = False
    return not moved_R.any()


def share_inputs(targets: Sequence[Target], seen: Seen, experts: bool) -> list[Target]:
    """The targets, each with the name of its input factor; ``experts``: whether those of a layer
    share theirs."""
    first: dict[tuple[int, bool], str] = {}
    shared = []
    for target in targets:
        if not target.is_routed:
            # An input with a column of ones has another second moment A.
            key = (id(seen.inputs[target.name]), target.bias is not None)
            target = replace(target, input_of=first.setdefault(key, target.name))
        elif experts:
            target = replace(target, input_of=parameter_of(target.name))
        shared.append(target)
    return shared
