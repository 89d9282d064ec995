"""One pass over the data: forward, backward, and sums of what the target layers saw.

A pass is resumable: what it sums can be kept every so often, with the number of batches that are
in it. With several processes each takes its share of the batches.

Shapes: B batch, T positions, N loss tokens, D hidden width, R live rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from kfade.curvature.capture import capture
from kfade.data.batches import Batch
from kfade.errors import InputError
from kfade.models.faults import check_weights
from kfade.models.head import Head, hidden_states, read_head
from kfade.models.layers import Target
from kfade.models.lengths import refuse_mixed
from kfade.models.load import frozen
from kfade.runtime import distributed
from kfade.runtime.progress import track

T = TypeVar("T")
FromOutputs = Callable[[Head, Batch, Tensor], Tensor]
"""(head, batch, hidden [N, D] at the loss positions) -> what is sent backward there, u [N, D]."""


class Sums(Protocol):
    """What a pass adds up."""

    def begin(self, batch: Batch) -> None:
        """The next batch is about to run."""

    def on_input(self, target: Target, a_BTI: Tensor) -> None:
        """The input of a target, once for all that read it."""

    def on_gradient(self, target: Target, g_BTO: Tensor) -> None:
        """The gradient with respect to a target's output."""

    def tensors(self) -> Mapping[str, Tensor]:
        """The sums so far, by name; loading writes into them."""


class Keeper(Protocol):
    """Keeps the sums of an interrupted pass."""

    def load(self, tensors: Mapping[str, Tensor]) -> int:
        """Fill ``tensors`` with what was kept; the number of batches that are in it."""

    def save(self, batches: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep the sums over that many batches, if it is time to."""


class Waiting(Generic[T]):
    """What was made of inputs, each until the gradients of all targets that read it have come."""

    def __init__(self, targets: Sequence[Target]) -> None:
        self.readers = Counter(target.input_of for target in targets)
        """Of each input."""
        self._kept: dict[str, tuple[T, int]] = {}

    def put(self, target: Target, value: T) -> None:
        """Keep ``value`` for all that read the target's input."""
        self._kept[target.input_of] = (value, self.readers[target.input_of])

    def take(self, target: Target) -> T:
        """For one of them."""
        value, left = self._kept.pop(target.input_of)
        if left > 1:
            self._kept[target.input_of] = (value, left - 1)
        return value


def run_pass(
    model: nn.Module,
    batches: Sequence[Batch],
    targets: Sequence[Target],
    sums: Sums,
    from_outputs: FromOutputs,
    name: str,
    keeper: Keeper | None = None,
) -> None:
    """Add this process's share of ``batches`` to ``sums``.

    Raises:
        InputError: NaN or Inf in what a layer reads or passes back; names the weight that
            holds them, else the layer. A batch of
            sequences that the model treats unlike when alone. A model in float16.
    """
    refuse_float16(targets)
    refuse_mixed(model, batches)
    own = distributed.share(batches, lambda batch: batch.positions)
    own += [batches[-1].silenced()] * distributed.extra_passes(
        model, len(own)
    )  # in step with others
    done = keeper.load(sums.tensors()) if keeper is not None else 0
    seen: list[tuple[str, str, Tensor]] = []
    reached: set[str] = set()

    # A sum shows NaN and Inf at a third of the cost of asking every entry.
    def on_input(target: Target, a_BTI: Tensor) -> None:
        seen.append(("activations", target.name, a_BTI.sum()))
        sums.on_input(target, a_BTI)

    def on_gradient(target: Target, g_BTO: Tensor) -> None:
        reached.add(target.name)
        seen.append(("gradients", target.name, g_BTO.sum()))
        sums.on_gradient(target, g_BTO)

    with frozen(model):
        head = read_head(model)
        for number, batch in enumerate(track(own[done:], name, lambda b: b.positions), done + 1):
            sums.begin(batch)
            with capture(targets, on_input=on_input, on_gradient=on_gradient):
                backward(model, head, batch, from_outputs)
            _refuse_broken(model, seen)
            refuse_unreached(targets, reached)
            if keeper is not None:
                keeper.save(number, sums.tensors())


def refuse_unreached(targets: Sequence[Target], reached: Collection[str]) -> None:
    """Raises InputError where a backward pass has not come back to a target."""
    for target in targets:
        if target.name not in reached:
            raise InputError(
                f"no gradient comes back to {target.name} from the model's outputs: leave it out "
                "with --target or --layers"
            )


def refuse_float16(targets: Sequence[Target]) -> None:
    """See to it that no gradient is computed in float16.

    Its numbers end at 65504 and 6e-8. The square of an activation of 260 is above the first, a
    token's share of the gradient of a long text below the second.

    Raises:
        InputError: a target has weights in float16.
    """
    for target in targets:
        if target.weight.dtype == torch.float16:
            raise InputError(
                f"{target.name} is float16, whose range is too small for gradients and sums of "
                "squares: load the model with --dtype bfloat16 or --dtype float32"
            )


def backward(model: nn.Module, head: Head, batch: Batch, from_outputs: FromOutputs) -> None:
    """Forward, then backward with u [N, D] at the loss positions and zero elsewhere."""
    with torch.enable_grad():
        hidden_BTD = hidden_states(model, batch.input_BT)
    if not hidden_BTD.requires_grad:
        raise InputError(
            "no gradient comes back to any target from the model's outputs: find the targets in "
            "this very model, or others with --target or --layers"
        )
    u_BTD = torch.zeros_like(hidden_BTD)
    u_BTD[batch.loss_BT] = from_outputs(head, batch, batch.at_loss(hidden_BTD.detach()))
    hidden_BTD.backward(u_BTD)


def live_rows(x_BT: Tensor, batch: Batch) -> Tensor:
    """The rows of ``x_BT``, [B, T, ...] or as one list [B·T, ...], at live positions, [R, ...]; a
    view where all are live.

    Raises:
        InputError: it holds something else than one row for each position.
    """
    shape = batch.live_BT.shape
    if x_BT.shape[:2] == shape:
        return x_BT.flatten(0, 1) if batch.full else x_BT[batch.live_BT]
    if x_BT.ndim != 2 or len(x_BT) != batch.positions:
        raise InputError(
            f"a target reads or writes {list(x_BT.shape)}, not one row for each position of "
            f"{list(shape)} (routed experts?): leave it out with --target"
        )
    return x_BT if batch.full else x_BT[batch.live_BT.flatten()]


def _refuse_broken(model: nn.Module, seen: list[tuple[str, str, Tensor]]) -> None:
    """Asks the device once a batch, not once a layer."""
    fine = torch.stack([torch.isfinite(total) for _, _, total in seen]).tolist()
    broken = [(what, name) for (what, name, _), good in zip(seen, fine, strict=True) if not good]
    seen.clear()
    if broken:
        check_weights(type(model).__name__, model)  # the weight at fault may be another layer's
    for what, name in broken:
        raise InputError(
            f"NaN or Inf in the {what} of {name}: look at the model's weights there, or "
            "load the model in float32 with --dtype float32"
        )
