"""Run a few tokens through a model and see which of its linear maps can be changed.

Shapes: B sequences, T positions of each, R = B·T rows, I inputs, O outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from kfade.models.head import refuse_looking_ahead, run_on_tokens
from kfade.models.load import frozen
from kfade.models.targets import ForwardHook, LeftOut, Target, hooked

PROBE = (2, 3)  # sequences and positions that targets are tried on: no two sizes are alike


class Seen:
    """What a forward pass over a few tokens shows of each target."""

    def __init__(self, model: nn.Module, targets: list[Target], input_BT: Tensor) -> None:
        self.calls: dict[str, int] = {}
        self.inputs: dict[str, Tensor] = {}
        """In the order of the forward pass; held, so that no address is used twice."""
        self.linear: dict[str, bool] = {}
        """Whether the output is W a + b; not asked of fake tensors."""
        with hooked(targets, self._note, every=False, with_kwargs=True), torch.no_grad():
            run_on_tokens(model, input_BT)

    def _note(self, target: Target) -> ForwardHook:
        def hook(module: Any, args: tuple[Any, ...], named: Any, output: Any) -> None:
            self.calls[target.name] = self.calls.get(target.name, 0) + 1
            if not args or not isinstance(args[0], Tensor) or not isinstance(output, Tensor):
                self.linear[target.name] = False
                return
            self.inputs[target.name] = a = args[0]
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
    """Run a few tokens through the model: what was seen, and which targets cannot be changed.

    A target may read its input as [B, T, I] or as one list [B·T, I] of all positions, row b·T + t
    that of position t of sequence b.
    """
    sequences, positions = PROBE
    weight = targets[0].weight
    fake = isinstance(weight, FakeTensor)
    vocabulary = cast(Any, model).get_input_embeddings().weight.shape[0]
    input_BT = (torch.arange(sequences * positions, device=weight.device) + 3) % vocabulary
    input_BT = input_BT.view(PROBE)
    if not fake:
        with frozen(model):
            refuse_looking_ahead(model)
    with frozen(model):
        seen = Seen(model, targets, input_BT)
        listed = [t for t in targets if t.name in seen.inputs and seen.inputs[t.name].ndim == 2]
        moved: dict[str, Tensor] = {}
        if listed and not fake:
            other_BT = input_BT.clone()
            other_BT[0, -1] = 2
            moved = Seen(model, listed, other_BT).inputs
    left_out: list[LeftOut] = []
    for target in targets:
        unfit = _unfit(target, seen, moved)
        if unfit is not None:
            left_out.append(LeftOut(target.name, *unfit))
    return seen, left_out


def _unfit(target: Target, seen: Seen, moved: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """(kind, reason) where a target cannot be changed."""
    name = target.name
    calls = seen.calls.get(name, 0)
    if calls == 0:
        return (
            "maps that a forward pass does not run by themselves",
            "takes no part in a forward pass as a layer of its own (unused, or a routed expert)",
        )
    if calls > 1:
        return (
            "maps that a forward pass runs more than once",
            "is used more than once in a forward pass (a shared layer)",
        )
    if not seen.linear.get(name, True):
        return "layers that are no plain linear map", "does not map its input a to W a + b"
    a = seen.inputs[name]
    sequences, positions = PROBE
    rows = sequences * positions
    in_order = a.shape[:-1] == PROBE or (
        a.shape[:-1] == (rows,) and (name not in moved or _in_order(a, moved[name]))
    )
    if not in_order:
        return (
            "maps that do not read one vector for each position",
            f"does not read one vector for each position, {[*PROBE, a.shape[-1]]} or, in their "
            f"order, {[rows, a.shape[-1]]}, but {list(a.shape)} (routed experts, or another order)",
        )
    return None


def _in_order(a_RI: Tensor, moved_RI: Tensor) -> bool:
    """Whether another last token of the first sequence has moved its own row alone."""
    if a_RI.shape != moved_RI.shape:
        return False
    moved_R = (a_RI - moved_RI).abs().amax(dim=1) > 1e-3 * a_RI.abs().max()
    moved_R[PROBE[1] - 1] = False
    return not moved_R.any()
