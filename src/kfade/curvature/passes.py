"""One pass over the data: forward, backward, and sums over inputs and output gradients of layers.

A pass is resumable: its sums can be kept at intervals, with the number of batches in them. With
several processes each takes its share of the batches.

Shapes: B batch, T positions, N loss tokens, D hidden width, R live rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import zip_longest
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from kfade.curvature.capture import capture
from kfade.data.batches import Batch
from kfade.errors import InputError
from kfade.models.experts import ExpertMap, Routing
from kfade.models.faults import check_weights
from kfade.models.head import Head, hidden_states, read_head
from kfade.models.lengths import check_lengths
from kfade.models.load import frozen
from kfade.models.targets import Target
from kfade.runtime import distributed
from kfade.runtime.progress import track

T = TypeVar("T")
FromOutputs = Callable[[Head, Batch, Tensor], Tensor]
"""(head, batch, hidden [N, D] at the loss positions) -> the gradient u [N, D] to propagate back
from there."""


class LiveRows(NamedTuple):
    """Rows of a batch at live positions."""

    rows_RD: Tensor
    lengths: list[int]
    """The number of them in each sequence that has any."""
    routing: Routing | None = None
    """Which positions they are; None: all, in their order."""


class Sums(Protocol):
    """The sums that a pass accumulates."""

    def begin(self, batch: Batch, together: Sequence[Batch]) -> None:
        """Called before each batch of this process; ``together``: see :func:`rounds`."""

    def on_input(self, target: Target, live: LiveRows) -> None:
        """Called with each input, once for all targets that read it."""

    def on_gradient(self, target: Target, live: LiveRows) -> None:
        """Called with the gradient with respect to each target's output."""

    def tensors(self) -> Mapping[str, Tensor]:
        """The sums so far, by name. A checkpoint is loaded into these tensors."""


class Checkpoint(Protocol):
    """Where an interrupted pass keeps its sums."""

    def load(self, tensors: Mapping[str, Tensor]) -> int:
        """Fill ``tensors`` with the kept sums and return the number of batches in them."""

    def due(self) -> bool:
        """Whether it is time to save; asked once after each batch."""

    def save(self, batches: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep the sums over the first ``batches`` batches."""


class PendingInputs(Generic[T]):
    """Values computed from inputs, each kept until every target that reads the input has its
    gradient."""

    def __init__(self, targets: Sequence[Target]) -> None:
        self.readers = Counter(target.tensor_of for target in targets)
        """Number of targets that read each input tensor."""
        self._kept: dict[str, tuple[T, int]] = {}

    def put(self, target: Target, value: T) -> None:
        """Keep ``value`` for every target that reads this target's input."""
        self._kept[target.tensor_of] = (value, self.readers[target.tensor_of])

    def take(self, target: Target) -> T:
        """The value for one of them; the last to take it removes it."""
        value, left = self._kept.pop(target.tensor_of)
        if left > 1:
            self._kept[target.tensor_of] = (value, left - 1)
        return value


def run_pass(
    model: nn.Module,
    batches: Sequence[Batch],
    targets: Sequence[Target],
    sums: Sums,
    from_outputs: FromOutputs,
    name: str,
    checkpoint: Checkpoint | None = None,
    *,
    head: Head | None = None,
) -> None:
    """Add this process's share of ``batches`` to ``sums``.

    Args:
        head: the model's head, if it has been read before (reading it runs trial passes).

    Raises:
        InputError: NaN or Inf in a layer's input or output gradient (names the weight that holds
            them, or else the layer); a batch that mixes sequences of different length classes
            (``lengths``), or holds one over the model's window; a model in float16.
    """
    refuse_float16(targets)
    check_lengths(model, batches)
    own = rounds(model, batches)
    done = checkpoint.load(sums.tensors()) if checkpoint is not None else 0
    watch = _Watch(model)
    reached: set[str] = set()

    def on_input(target: Target, a_BTI: Tensor, routing: Routing | None) -> None:
        watch.see("activations", target, a_BTI)
        sums.on_input(target, live_rows(a_BTI, batch, target, routing))

    def on_gradient(target: Target, g_BTO: Tensor, routing: Routing | None) -> None:
        reached.add(target.name)
        watch.see("gradients", target, g_BTO)
        sums.on_gradient(target, live_rows(g_BTO, batch, target, routing))

    with frozen(model):
        head = head or read_head(model)
        left = track(own[done:], name, lambda work: work[0].positions)
        for number, (batch, together) in enumerate(left, done + 1):
            sums.begin(batch, together)
            with capture(targets, on_input=on_input, on_gradient=on_gradient):
                backward(model, head, batch, from_outputs)
            watch.end_batch()
            refuse_unreached(targets, reached)
            if checkpoint is not None and checkpoint.due():
                watch.refuse_broken()
                checkpoint.save(number, sums.tensors())
        watch.refuse_broken()


def rounds(model: nn.Module, batches: Sequence[Batch]) -> list[tuple[Batch, Sequence[Batch]]]:
    """Each batch of this process, with the batches that are computed together with it.

    Processes run through a sharded model together, since they gather its weights together. They
    compute one batch each, and all know those of the others, in the order of the processes. Where
    a process has none left, it runs along with a batch that adds nothing. Through a whole model
    each process runs alone.
    """
    parts = distributed.shares(batches, lambda batch: batch.positions)
    if not distributed.is_sharded(model):
        return [(batch, [batch]) for batch in parts[distributed.rank()]]
    together = list(zip_longest(*parts, fillvalue=batches[-1].silenced()))
    return [(one[distributed.rank()], one) for one in together]


def refuse_unreached(targets: Sequence[Target], reached: Collection[str]) -> None:
    """Raises InputError if a target got no gradient in a backward pass."""
    for target in targets:
        if target.name not in reached:
            raise InputError(
                f"no gradient comes back to {target.name} from the model's outputs: leave it out "
                "with --target or --layers"
            )


def refuse_float16(targets: Sequence[Target]) -> None:
    """Refuse float16, whose range (6e-8 to 65504) is too small for gradients.

    The square of an activation of 260 overflows; a token's share of the gradient of a long text
    underflows.

    Raises:
        InputError: a target has weights in float16.
    """
    for target in targets:
        if target.dtype == torch.float16:
            raise InputError(
                f"{target.name} is float16, whose range is too small for gradients and sums of "
                "squares: load the model with --dtype bfloat16 or --dtype float32"
            )


def backward(model: nn.Module, head: Head, batch: Batch, from_outputs: FromOutputs) -> None:
    """Forward pass, then backward pass of u [N, D] at the loss positions, zero elsewhere.

    Raises:
        InputError: no target is in the graph.
    """
    with torch.enable_grad():
        hidden_BTD = hidden_states(model, batch.input_BT)
    if not hidden_BTD.requires_grad:
        raise InputError(
            "no gradient comes back to any target from the model's outputs: find the targets in "
            "this very model, or others with --target or --layers"
        )
    u_ND = from_outputs(head, batch, batch.at_loss(hidden_BTD.detach()))
    u_BTD = torch.zeros_like(hidden_BTD, memory_format=torch.contiguous_format)
    u_BTD.flatten(0, 1).index_copy_(0, batch.loss_index, u_ND)
    hidden_BTD.backward(u_BTD)


def live_rows(
    x_BT: Tensor, batch: Batch, target: Target, routing: Routing | None = None
) -> LiveRows:
    """The rows of ``x_BT`` at live positions; a view if all positions are live.

    Args:
        x_BT: an input or output of ``target``: [B, T, ...], or flattened to [B·T, ...]; of an
            expert the rows that ``routing`` sends to it.

    Raises:
        InputError: it does not have one row for each position.
    """
    if routing is not None and isinstance(target.module, ExpertMap):
        live_R, lengths = routing.live(batch, target.module.expert)
        return LiveRows(x_BT if batch.full else x_BT[live_R], lengths, routing)
    shape = batch.live_BT.shape
    if x_BT.shape[:2] == shape:
        x_BT = x_BT.flatten(0, 1)
    elif x_BT.ndim != 2 or len(x_BT) != batch.positions:
        raise InputError(
            f"a target reads or writes {list(x_BT.shape)}, not one row for each position of "
            f"{list(shape)} (routed experts?): leave it out with --target"
        )
    return LiveRows(x_BT if batch.full else x_BT[batch.live_index], batch.lengths)


class _Watch:
    """Looks for NaN and Inf in the inputs and output gradients of a pass.

    A result is read after 1, 2, 4, ... batches, before sums are kept, and at the end: to read it
    waits for all work on the device.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._batches = 0
        self._seen: list[tuple[str, str]] = []  # since the last result was read
        self._totals: list[Tensor] = []  # of the present batch
        self._fine: list[Tensor] = []  # one vector for each batch since then

    def see(self, what: str, target: Target, x_BT: Tensor) -> None:
        """NaN and Inf survive a sum, which costs a third of testing every entry."""
        self._seen.append((what, target.name))
        self._totals.append(x_BT.sum())

    def end_batch(self) -> None:
        """Called after each batch; raises what :meth:`refuse_broken` does."""
        self._batches += 1
        self._fine.append(torch.isfinite(torch.stack(self._totals)))
        self._totals.clear()
        if self._batches & (self._batches - 1) == 0:
            self.refuse_broken()

    def refuse_broken(self) -> None:
        """Raises InputError for the first NaN or Inf that was not refused yet."""
        fine = torch.cat(self._fine).tolist() if self._fine else []
        broken = [seen for seen, good in zip(self._seen, fine, strict=True) if not good]
        self._seen.clear()
        self._fine.clear()
        if broken:
            # The weight at fault may be another layer's.
            check_weights(type(self._model).__name__, self._model)
        for what, name in broken:
            raise InputError(
                f"NaN or Inf in the {what} of {name}: look at the model's weights there, or "
                "load the model in float32 with --dtype float32"
            )
