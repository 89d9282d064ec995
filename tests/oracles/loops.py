"""What kfade computes by a loop over sequences and tokens, and plain autograd.

They share no code with the fits: each sequence goes through the model alone and unpadded, up to
its logits, and weight gradients come from autograd. Only the random numbers are the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal, localcontext

import torch
from torch import Tensor, nn

from kfade.curvature.block import EigenBlock
from kfade.curvature.draws import Draw, token_keys
from kfade.data.sequences import TokenSequence
from kfade.models.targets import Target


def fisher(p_V: Tensor) -> Tensor:
    """diag(p) − p pᵀ."""
    return torch.diag(p_V) - torch.outer(p_V, p_V)


def loss_positions(sequence: TokenSequence) -> list[int]:
    """Positions whose next token is scored."""
    return [t for t in range(len(sequence.tokens) - 1) if sequence.scored[t + 1]]


def sequence_logits(model: nn.Module, sequence: TokenSequence) -> Tensor:
    """Logits [T, V] of one sequence by itself, with a graph."""
    return model(input_ids=torch.tensor([sequence.tokens]), use_cache=False).logits[0]


def mean_objective(model: nn.Module, sequences: Sequence[TokenSequence], objective) -> Tensor:
    """Mean of an objective per loss token, with a graph."""
    values = []
    for sequence in sequences:
        logits = sequence_logits(model, sequence)
        for t in loss_positions(sequence):
            values.append(objective(logits[t : t + 1], torch.tensor([sequence.tokens[t + 1]])))
    return torch.cat(values).mean()


def pseudo_log_likelihood(
    logits_TV: Tensor, sequence: TokenSequence, index: int, draw: Draw, seed: int, stream: int
) -> Tensor:
    """Σ_t u_t · z_t over loss positions: its gradient is that of the summed pseudo-likelihood."""
    total = logits_TV.new_zeros(())
    for t in loss_positions(sequence):
        key = token_keys(seed, stream, torch.tensor([index]), torch.tensor([t]))
        u_V = draw(logits_TV[t].detach().softmax(0)[None], key)[0]
        total = total + (u_V * logits_TV[t]).sum()
    return total


def weight_gradients(scalar: Tensor, model: nn.Module, targets: Sequence[Target]):
    """Gradient of ``scalar`` for each target, [O, I]."""
    parameters = dict(model.named_parameters())
    names = [n for t in targets for n in (t.name, t.bias) if n is not None]
    gradients = torch.autograd.grad(scalar, [parameters[n] for n in names])
    by_name = dict(zip(names, gradients, strict=True))
    return {t.name: t.from_parameters(by_name) for t in targets}


def pseudo_gradients_of(
    model: nn.Module,
    sequences: Sequence[TokenSequence],
    targets: Sequence[Target],
    draw: Draw,
    seed: int,
    stream: int,
) -> list[dict[str, Tensor]]:
    """∇W of the summed pseudo-log-likelihood of each sequence."""
    found = []
    for index, sequence in enumerate(sequences):
        logits = sequence_logits(model, sequence)
        scalar = pseudo_log_likelihood(logits, sequence, index, draw, seed, stream)
        found.append(weight_gradients(scalar, model, targets))
    return found


def eigenvalues(
    gradients: Sequence[dict[str, Tensor]], loss_tokens: int, name: str, block: EigenBlock
) -> Tensor:
    """Λ = (1/N) Σ_sequences (Q_Oᵀ ∇W Q_I)∘² in the bases of ``block``."""
    total = torch.zeros_like(gradients[0][name])
    q_out, q_in = bases(block, total.shape)
    for gradient in gradients:
        total += (q_out.T @ gradient[name] @ q_in) ** 2
    return total / loss_tokens


def kronecker_factors(
    model: nn.Module,
    sequences: Sequence[TokenSequence],
    target: Target,
    draw: Draw,
    seed: int,
    stream: int,
) -> tuple[Tensor, Tensor]:
    """(S, A) of one layer, an outer product at a time."""
    n_out, n_in = target.shape
    s_sum, a_sum = torch.zeros(n_out, n_out).double(), torch.zeros(n_in, n_in).double()
    loss_tokens = positions = 0
    for index, sequence in enumerate(sequences):
        seen = {}

        def note(module, args, output, seen=seen):
            seen["a"], seen["out"] = args[0], output

        handle = target.module.register_forward_hook(note)
        logits = sequence_logits(model, sequence)
        handle.remove()
        scalar = pseudo_log_likelihood(logits, sequence, index, draw, seed, stream)
        g_TO = torch.autograd.grad(scalar, seen["out"])[0][0]
        where = loss_positions(sequence)
        for t in range(max(where) + 1):
            a = seen["a"][0, t].detach()
            if target.bias is not None:
                a = torch.cat([a, torch.ones(1).double()])
            a_sum += torch.outer(a, a)
            s_sum += torch.outer(g_TO[t], g_TO[t])
        positions += max(where) + 1
        loss_tokens += len(where)
    return s_sum / loss_tokens, a_sum / positions


def bases(block: EigenBlock, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(Q_O, Q_I), the identity written out where a block has none."""
    n_out, n_in = shape
    q_out = torch.eye(n_out).double() if block.q_out is None else block.q_out
    q_in = torch.eye(n_in).double() if block.q_in is None else block.q_in
    return q_out, q_in


def block_matrix(block: EigenBlock, shape: tuple[int, int]) -> Tensor:
    """(Q_O ⊗ Q_I) diag(vec Λ) (Q_O ⊗ Q_I)ᵀ written out, [OI, OI]."""
    q = torch.kron(*bases(block, shape))
    return q @ torch.diag(block.eigenvalues.expand(shape).reshape(-1)) @ q.T


def textbook_divergence(base_V: Tensor, edited_V: Tensor) -> float:
    """Σ p (log p − log q) of two rows of logits, with 60 digits."""
    with localcontext() as context:
        context.prec = 60
        log_p, log_q = _log_softmax(base_V), _log_softmax(edited_V)
        return float(sum(p.exp() * (p - q) for p, q in zip(log_p, log_q, strict=True)))


def _log_softmax(logits_V: Tensor) -> list[Decimal]:
    z = [Decimal(value) for value in logits_V.double().tolist()]
    total = sum(value.exp() for value in z).ln()
    return [value - total for value in z]
