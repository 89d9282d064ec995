"""Fine-tuning until a model knows its training data, which the experiments then unlearn."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from kfade.data.sequences import TokenSequence
from kfade.method.objectives import cross_entropy
from kfade.models.head import hidden_states, read_head
from kfade.models.layers import decoder_blocks
from kfade.models.lengths import batches_for
from kfade.models.load import frozen


def fine_tune(
    model: Any,
    sequences: Sequence[TokenSequence],
    names: Sequence[str],
    *,
    rate: float,
    epochs: int,
    enough: Callable[[float], bool],
    warm_up: int = 0,
    batch: int = 8,
    budget: int = 10**6,
    seed: int = 0,
) -> list[float]:
    """Train the named parameters in place by AdamW without decay.

    Args:
        enough: called after each epoch with its mean loss per scored token; True stops.
        warm_up: steps over which the learning rate rises linearly.
        budget: positions in one forward pass; larger batches are split.

    Returns:
        The mean loss of each epoch.
    """
    own = dict(model.named_parameters())
    parameters = [own[name] for name in names]
    torch.manual_seed(seed)
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, fused=True)
    history: list[float] = []
    start = time.perf_counter()
    step = 0
    with frozen(model):
        head = read_head(model)
        for parameter in parameters:
            parameter.requires_grad_(True)
        while len(history) < epochs and not (history and enough(history[-1])):
            losses = []
            order = torch.randperm(len(sequences)).tolist()
            for first in range(0, len(order), batch):
                drawn = [sequences[i] for i in order[first : first + batch]]
                tokens = sum(sequence.loss_tokens for sequence in drawn)
                total = 0.0
                for piece in batches_for(model, drawn, budget):
                    hidden_ND = piece.at_loss(hidden_states(model, piece.input_BT))
                    loss_N = cross_entropy(head(hidden_ND), piece.at_loss(piece.target_BT))
                    loss = loss_N.sum() / tokens
                    loss.backward()
                    total += loss.item()
                step += 1
                optimiser.param_groups[0]["lr"] = rate * min(1.0, step / max(1, warm_up))
                optimiser.step()
                optimiser.zero_grad()
                losses.append(total)
            history.append(sum(losses) / len(losses))
            seconds = time.perf_counter() - start
            print(f"  epoch {len(history)}: loss {history[-1]:.3f}, {seconds:.0f} s", flush=True)
    return history


def block_weights(model: Any) -> list[str]:
    """Names of all parameters of the decoder's blocks, so without embeddings and head."""
    name, _ = decoder_blocks(model)
    return [own for own, _ in model.named_parameters() if own.startswith(f"{name}.")]
