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
from kfade.models.lengths import batches_for
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
) -> Iterator[tuple[int, Tensor]]:
    """Yield (number, values) of every sequence as soon as its batch is computed.

    The values [n, K] are what ``measure`` gives at the sequence's scored tokens, in float64 on the
    CPU. The head runs on a few positions at a time. The longest sequences come first.

    Raises:
        InputError: the model's outputs are not finite.
    """
    batches = batches_for(model, sequences, batch_tokens)
    with frozen(model), torch.no_grad():
        head = read_head(model)

    def values_of(batch: Batch) -> list[tuple[int, Tensor]]:
        with frozen(model), torch.no_grad():
            hidden_ND = batch.at_loss(hidden_states(model, batch.input_BT))
            target_N = batch.at_loss(batch.target_BT)
            parts = [measure(head(hidden_ND[p]), target_N[p]) for p in head.chunks(hidden_ND)]
        return list(by_sequence(batch, torch.cat(parts)))

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
) -> list[float]:
    """Summed log-probability of each sequence's scored tokens, in nats."""
    found = token_values(model, sequences, log_probability, name=name, batch_tokens=batch_tokens)
    totals = {number: values.sum().item() for number, values in found}
    return [totals[number] for number in range(len(sequences))]


def by_sequence(batch: Batch, values: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Split ``values`` [N, ...] into (number of the sequence, its part), in float64 on the CPU.

    Raises:
        InputError: a value is not finite.
    """
    parts = values.double().cpu().split(batch.loss_counts)
    for number, part in zip(batch.id_B.tolist(), parts, strict=True):
        if not torch.isfinite(part).all():
            raise InputError(
                f"the model's outputs on sequence {number} are not finite: it is broken, or its "
                "dtype overflows; try --dtype float32"
            )
        yield number, part.clone()  # pickled without the other parts
