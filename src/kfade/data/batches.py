"""Turn token sequences into right-padded batches.

Shapes: B batch, T positions. A sequence of n + 1 tokens has n positions: position t holds token t
and is scored on token t + 1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby

import torch
from torch import Tensor

from kfade.data.sequences import TokenSequence, check_sequences

COUNTS = ("loss_tokens", "lengths", "reaches", "loss_counts", "full")
"""What a batch counts, as Python numbers."""
INDICES = ("loss_index", "live_index")
ENOUGH, PADDING = 1 / 8, 1 / 4  # shares of a batch's budget and of its width, see make_batches


@dataclass(frozen=True)
class Batch:
    """Right-padded sequences, cut after their last loss position."""

    input_BT: Tensor
    target_BT: Tensor
    """The token that follows each position."""
    loss_BT: Tensor
    """True where the following token is scored."""
    live_BT: Tensor
    """True up to a sequence's last loss position: not padding, and able to reach the loss. Of a
    batch of prompts only True within them, see :func:`make_batches`."""
    id_B: Tensor
    """Number of each sequence in its data set: keys the pseudo-labels."""

    @cached_property
    def loss_tokens(self) -> int:
        """Number of scored tokens."""
        return int(self.loss_BT.sum())

    @cached_property
    def lengths(self) -> list[int]:
        """Number of live positions of each sequence."""
        counts: list[int] = self.live_BT.sum(dim=1).tolist()
        return counts

    @cached_property
    def reaches(self) -> list[int]:
        """Number of positions of each sequence up to its last loss position; 0 without one."""
        counts = torch.arange(1, self.loss_BT.shape[1] + 1, device=self.loss_BT.device)
        longest: list[int] = (self.loss_BT * counts).amax(dim=1).tolist()
        return longest

    @cached_property
    def loss_counts(self) -> list[int]:
        """Number of scored tokens of each sequence."""
        counts: list[int] = self.loss_BT.sum(dim=1).tolist()
        return counts

    @property
    def positions(self) -> int:
        """Positions computed, padding included."""
        return self.input_BT.numel()

    @cached_property
    def full(self) -> bool:
        """Whether every position is live."""
        return bool(self.live_BT.all())

    @cached_property
    def loss_index(self) -> Tensor:
        """Index of each loss position among the B·T positions, [N]."""
        return self.loss_BT.flatten().nonzero()[:, 0]

    @cached_property
    def live_index(self) -> Tensor:
        """Index of each live position among the B·T positions, [R]."""
        return self.live_BT.flatten().nonzero()[:, 0]

    def to(self, device: torch.device | str) -> Batch:
        """The batch on ``device``, with its counts and indices: to read them there would wait for
        all work on the device."""
        tensors = (self.input_BT, self.target_BT, self.loss_BT, self.live_BT, self.id_B)
        moved = Batch(*(tensor.to(device) for tensor in tensors))
        known = {name: getattr(self, name) for name in COUNTS}
        known |= {name: getattr(self, name).to(device) for name in INDICES}
        vars(moved).update(known)
        return moved

    def silenced(self) -> Batch:
        """The same inputs, none of them live or scored: a pass over them adds nothing to a sum."""
        none_BT = torch.zeros_like(self.loss_BT)
        return Batch(self.input_BT, self.target_BT, none_BT, none_BT, self.id_B)

    def at_loss(self, x_BT: Tensor) -> Tensor:
        """The entries of ``x_BT`` [B, T, ...] at the N loss positions, [N, ...]."""
        return x_BT.flatten(0, 1)[self.loss_index]


def make_batches(
    sequences: Sequence[TokenSequence],
    *,
    budget: int = 4096,
    device: torch.device | str | None = None,
    group: Callable[[int], Hashable] = lambda positions: None,
    prompts: bool = False,
) -> list[Batch]:
    """Batches of at most ``budget`` positions (but at least one sequence), longest first.

    They are sorted by length, so that there is little padding; a batch that has ``ENOUGH`` of the
    budget takes no sequence that would be padded by more than ``PADDING`` of the width. The longest
    come first, so that a batch that does not fit the memory fails at once.

    Args:
        device: where their tensors are; None: PyTorch's default device.
        group: maps a sequence's number of live positions to a key; sequences share a batch only if
            they have the same key. For a model give :func:`~kfade.models.lengths.length_class`.
        prompts: only the positions of its :attr:`~kfade.data.sequences.TokenSequence.prompt` are
            live, of a sequence that has one.

    Raises:
        InputError: they are not token sequences.
    """
    check_sequences(sequences, "sequences")
    order = sorted(range(len(sequences)), key=lambda i: -sequences[i].live)
    batches = []
    for _, own in groupby(order, key=lambda i: group(sequences[i].live)):
        left = list(own)
        while left:
            width = sequences[left[0]].live
            most, few = max(1, budget // width), int(ENOUGH * budget) // width
            alike = sum(sequences[i].live >= (1 - PADDING) * width for i in left[:most])
            count = max(alike, few)
            batches.append(_collate(sequences, left[:count], device, prompts))
            left = left[count:]
    return batches


def largest_batch(
    sets: Sequence[Sequence[TokenSequence]], count: int, budget: int
) -> tuple[int, int]:
    """(B, T) of the largest batch of up to ``count`` sequences and ``budget`` positions of one of
    the sets, that :func:`make_batches` could make."""
    length = max(sequence.live for sequences in sets for sequence in sequences)
    return max(1, min(count, budget // length)), length


def draw_without_replacement(count: int, size: int | None, step: int, seed: int) -> list[int]:
    """Numbers of the ``step``-th batch of ``size`` out of ``count``.

    Batches are cut from a permutation; a new permutation begins when less than a batch is left. A
    ``size`` of None takes all at every step.
    """
    if size is None or size >= count:
        return list(range(count))
    per_pass = count // size
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step // per_pass)
    order = torch.randperm(count, generator=generator, device="cpu").tolist()
    start = (step % per_pass) * size
    return sorted(order[start : start + size])


def digest_batches(batches: Sequence[Batch]) -> str:
    """SHA-256 over tokens, masks and their division: says which batches a sum has seen."""
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(repr(tuple(batch.input_BT.shape)).encode())
        for tensor in (batch.input_BT, batch.loss_BT, batch.live_BT, batch.id_B):
            digest.update(tensor.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _collate(
    sequences: Sequence[TokenSequence],
    chosen: list[int],
    device: torch.device | str | None,
    prompts: bool,
) -> Batch:
    width = max(sequences[i].live for i in chosen)
    # Filled row by row on the CPU, then moved.
    make, zeros = partial(torch.tensor, device="cpu"), partial(torch.zeros, device="cpu")
    shape = (len(chosen), width)
    inputs, targets = zeros(shape, dtype=torch.long), zeros(shape, dtype=torch.long)
    loss, live = zeros(shape, dtype=torch.bool), zeros(shape, dtype=torch.bool)
    for row, i in enumerate(chosen):
        n, tokens = sequences[i].live, make(sequences[i].tokens)
        inputs[row, :n], targets[row, :n] = tokens[:n], tokens[1 : n + 1]
        loss[row, :n] = make(sequences[i].scored[1 : n + 1])
        live[row, : (prompts and sequences[i].prompt) or n] = True
    where = torch.get_default_device() if device is None else device
    return Batch(inputs, targets, loss, live, make(chosen)).to(where)
