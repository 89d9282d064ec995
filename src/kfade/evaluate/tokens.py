"""Per-token values of a model's outputs: the loop that the evaluations share.

The batches are divided over the processes, if there are several.

Shapes: N scored tokens of a batch, n of one sequence, K values a token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from kfade.data.batches import Batch
from kfade.data.sequences import TokenSequence
from kfade.errors import InputError
from kfade.evaluate.division import map_shared
from kfade.models.head import hidden_states, read_head
from kfade.models.lengths import LengthClass, batches_for, length_class
from kfade.models.load import frozen

BATCHES = 8  # that a process runs between two exchanges of results
Measure = Callable[[Tensor, Tensor], Tensor]
"""(logits [N, V] in float32 or better, target tokens [N]) -> values [N, K]."""


def log_probability(logits_NV: Tensor, target_N: Tensor) -> Tensor:
    """log p(target) [N, 1], in nats."""
    return logits_NV.log_softmax(dim=-1).gather(1, target_N[:, None])


def token_values(
    model: nn.Module,
    sequences: Sequence[TokenSequence],
    measure: Measure,
    *,
    name: str,
    batch_tokens: int = 4096,
    share: bool = False,
) -> Iterator[tuple[int, Tensor]]:
    """Yield (number, values) of every sequence as soon as its batch is computed.

    The values [n, K] are what ``measure`` gives at the sequence's scored tokens, in float64 on the
    CPU. The head runs on a few positions at a time. The longest sequences come first.

    Args:
        share: read a sequence whose inputs begin another's from the pass of that one.

    Raises:
        InputError: the model's outputs are not finite.
    """
    readers = [[number] for number in range(len(sequences))]
    if share:
        readers = _sharing(sequences, length_class(model))
    batches = batches_for(model, [sequences[own[0]] for own in readers], batch_tokens)
    with frozen(model), torch.no_grad():
        head = read_head(model)

    def values_of(batch: Batch) -> list[tuple[int, Tensor]]:
        read = [(row, n) for row, i in enumerate(batch.id_B.tolist()) for n in readers[i]]
        scored = [
            (row, t, sequences[n].tokens[t])
            for row, n in read
            for t, is_scored in enumerate(sequences[n].scored)
            if is_scored
        ]
        row_N, t_N, target_N = torch.tensor(scored, device=batch.input_BT.device).T
        with frozen(model), torch.no_grad():
            hidden_ND = hidden_states(model, batch.input_BT)[row_N, t_N - 1]
            parts = [measure(head(hidden_ND[p]), target_N[p]) for p in head.chunks(hidden_ND)]
        counts = [sequences[n].loss_tokens for _, n in read]
        return list(by_sequence([n for _, n in read], counts, torch.cat(parts)))

    for found in map_shared(
        batches,
        values_of,
        name,
        cost=lambda b: b.positions,
        each=BATCHES,
        model=model,
        one_pass=True,
    ):
        yield from found


def log_likelihoods(
    model: nn.Module,
    sequences: Sequence[TokenSequence],
    *,
    batch_tokens: int = 4096,
    name: str = "likelihoods",
    share: bool = False,
) -> list[float]:
    """Summed log-probability of each sequence's scored tokens, in nats.

    Args:
        share: as for :func:`token_values`.
    """
    found = token_values(
        model, sequences, log_probability, name=name, batch_tokens=batch_tokens, share=share
    )
    totals = {number: values.sum().item() for number, values in found}
    return [totals[number] for number in range(len(sequences))]


def _sharing(sequences: Sequence[TokenSequence], group: LengthClass) -> list[list[int]]:
    """Numbers of the sequences that one pass serves: first its own, then those whose inputs begin
    its own's, where ``group`` lets both lengths share a batch."""

    def inputs(number: int) -> tuple[int, ...]:
        return sequences[number].tokens[: sequences[number].live]

    passes: list[list[int]] = []
    own: tuple[int, ...] = ()
    # In the order of a dictionary a beginning stands before what it begins, and nothing else
    # stands between.
    for number in sorted(range(len(sequences)), key=inputs, reverse=True):
        begin = inputs(number)
        if passes and own[: len(begin)] == begin and group(len(own)) == group(len(begin)):
            passes[-1].append(number)
        else:
            passes.append([number])
            own = begin
    return passes


def by_sequence(
    numbers: Sequence[int], counts: Sequence[int], values: Tensor
) -> Iterator[tuple[int, Tensor]]:
    """Split ``values`` [N, ...] into (number of the sequence, its part), in float64 on the CPU.

    Args:
        counts: scored tokens of each sequence; N together.

    Raises:
        InputError: a value is not finite.
    """
    parts = values.double().cpu().split(list(counts))
    for number, part in zip(numbers, parts, strict=True):
        if not torch.isfinite(part).all():
            raise InputError(
                f"the model's outputs on sequence {number} are not finite: it is broken, or its "
                "dtype overflows; try --dtype float32"
            )
        yield number, part.clone()  # pickled without the other parts
