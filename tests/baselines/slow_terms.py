"""Losses and gradients of baselines by slow formulas, and those of their terms to compare with."""

from __future__ import annotations

import pytest
import torch
from helpers import relative_error

from kfade.baselines import losses
from kfade.baselines.losses import Net
from kfade.data.batches import make_batches
from kfade.data.sequences import TokenSequence
from kfade.models.head import read_head


def net_of(model) -> Net:
    head = read_head(model)
    return Net(model, head, head)


def moved(model, size: float = 0.05, seed: int = 1):
    """``model``, changed a little everywhere."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


def log_probabilities(model, sequence: TokenSequence) -> torch.Tensor:
    """log p of each token given those before it at every position, from the model's own logits."""
    logits_TV = model(input_ids=torch.tensor([sequence.tokens])).logits[0]
    return logits_TV[:-1].log_softmax(dim=-1)


def slow_nll(model, sequence: TokenSequence) -> torch.Tensor:
    """Summed over the scored tokens, one by one."""
    log_p = log_probabilities(model, sequence)
    return sum(
        -log_p[t - 1, token]
        for t, (token, scored) in enumerate(zip(sequence.tokens, sequence.scored, strict=True))
        if scored
    )


def gradient(value: torch.Tensor, model) -> torch.Tensor:
    """With respect to all parameters, as one vector."""
    parameters = list(model.parameters())
    grads = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    parts = zip(grads, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in parts])


def value_of(term: losses.Term, net: Net, sequences, rows=None) -> torch.Tensor:
    """``weight`` times the mean over all of ``sequences`` as one batch."""
    (batch,) = make_batches(sequences, budget=10_000)
    own = [] if rows is None else [rows[i] for i in batch.id_B.tolist()]
    return term.weight * term.values(net, batch, own).sum() / term.count(batch, own)


def rows_of(term: losses.Term, net: Net, sequences) -> list:
    """What the term keeps of ``net``, by sequence."""
    with torch.no_grad():
        return [term.reference(net, sequence) for sequence in sequences]


def both_agree(term, model, sequences, slow, rows=None) -> None:
    """Value and gradient of a term against those of a slow formula."""
    ours = value_of(term, net_of(model), sequences, rows)
    assert ours.item() == pytest.approx(slow.item(), rel=1e-12)
    assert relative_error(gradient(ours, model), gradient(slow, model)) < 1e-10
