"""Exact Gauss-Newton products and quadratic forms, without forming the matrix.

    δᵀGε = (1/N) Σ_t żᵀ (diag p − p pᵀ) ė,   ż = J δ, ė = J ε
    G δ  = (1/N) Jᵀ (diag p − p pᵀ) J δ

over the N loss tokens of the batches. The forms of K vectors cost one forward-mode pass (about
three forward passes) a vector, or four forward passes if the model does not support forward mode. A
product costs a forward and a backward pass more. A δ that is not in memory is read once for each
batch, since all of its layers take part in one forward pass.

Shapes: K vectors, N loss tokens, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence

import torch
from torch import Tensor, nn

from kfade.curvature.jacobian import tangents_of, transpose_product
from kfade.curvature.vectors import OnDevice, Storage, Vector
from kfade.data.batches import Batch
from kfade.models.head import Head, read_head
from kfade.models.lengths import check_lengths
from kfade.models.load import frozen
from kfade.models.targets import Target
from kfade.runtime import distributed
from kfade.runtime.progress import track


def quadratic_form(
    model: nn.Module,
    batches: Sequence[Batch],
    targets: Sequence[Target],
    delta: Vector,
    *,
    head: Head | None = None,
) -> float:
    """δᵀGδ with the exact G of ``batches``; ½ of it is the KL in nats per loss token as δ → 0.

    Args:
        head: the model's head, if it has been read before (reading it runs trial passes).
    """
    return float(gram_matrix(model, batches, targets, [delta], head=head))


def gram_matrix(
    model: nn.Module,
    batches: Sequence[Batch],
    targets: Sequence[Target],
    deltas: Sequence[Vector],
    *,
    head: Head | None = None,
) -> Tensor:
    """C [K, K] in float64 on the CPU, C_ij = δ_iᵀGδ_j with the exact G of ``batches``.

    Args:
        deltas: K vectors, each with matrices [O, I] of some of the targets; it is zero in others.
        head: the model's head, if it has been read before (reading it runs trial passes).
    """
    check_lengths(model, batches)
    moved = [[target for target in targets if target.name in delta] for delta in deltas]
    count = len(deltas)
    total_KK = torch.zeros(count, count, dtype=torch.float64, device=batches[0].input_BT.device)
    with frozen(model):
        head = head or read_head(model)
        tangents = tangents_of(model, targets)
        own = distributed.share(batches, lambda batch: batch.positions)
        missing = distributed.extra_passes(model, len(own))
        for batch in track(own, "exact quadratic form", lambda b: b.positions):
            states = [tangents(model, batch, *of) for of in zip(moved, deltas, strict=True)]
            for part in head.chunks(states[0][0], count):
                total_KK += _centred_products(head, states, part)
        for _ in range(missing):
            for of in zip(moved, deltas, strict=True):
                tangents(model, batches[-1], *of)
    sums = distributed.all_reduce_numbers(total_KK.flatten().tolist())
    loss_tokens = sum(batch.loss_tokens for batch in batches)
    return torch.tensor(sums, dtype=torch.float64).view(count, count) / loss_tokens


def _centred_products(head: Head, states: Sequence[tuple[Tensor, Tensor]], part: slice) -> Tensor:
    """Σ_t ż_iᵀ (diag p − p pᵀ) ż_j [K, K] over the positions of ``part``.

    Args:
        states: (h [N, D], ḣ_i [N, D]) of each vector.
    """
    with torch.no_grad():
        hidden_ND = states[0][0][part]  # the same for all
        logits_NV = head(hidden_ND)
        p_NV, rows = logits_NV.softmax(dim=-1), []
        for _, tangent_ND in states:
            dot_NV = head.tangent(hidden_ND, logits_NV, tangent_ND[part])
            rows.append(dot_NV.sub_((p_NV * dot_NV).sum(dim=1, keepdim=True)))
        rows_NKV = torch.stack(rows, dim=1).mul_(p_NV.sqrt()[:, None])
    return (rows_NKV @ rows_NKV.mT).double().sum(dim=0)


def gauss_newton_product(
    model: nn.Module,
    batches: Sequence[Batch],
    targets: Sequence[Target],
    delta: Vector,
    *,
    recompute: bool = False,
    storage: Storage = OnDevice(),
    head: Head | None = None,
) -> MutableMapping[str, Tensor]:
    """G δ with the exact G of ``batches``, one matrix [O, I] a target.

    Args:
        recompute: see :func:`~kfade.curvature.recompute.recomputing`.
        storage: keeps the product, see :func:`~kfade.curvature.jacobian.transpose_product`.
        head: the model's head, if it has been read before (reading it runs trial passes).
    """
    loss_tokens = sum(batch.loss_tokens for batch in batches)
    with frozen(model):
        tangents = tangents_of(model, targets)

    def from_outputs(head: Head, batch: Batch, hidden_ND: Tensor) -> Tensor:
        _, tangent_ND = tangents(model, batch, targets, delta)
        u_ND = torch.empty_like(hidden_ND)
        for part in head.chunks(hidden_ND):
            with torch.enable_grad():
                h = hidden_ND[part].requires_grad_()
                logits = head(h)
            with torch.no_grad():
                p, logits_dot = logits.softmax(dim=-1), head.tangent(h, logits, tangent_ND[part])
                mean_N1 = (p * logits_dot).sum(dim=1, keepdim=True)
                fisher_NV = p * (logits_dot - mean_N1) / loss_tokens
            u_ND[part] = torch.autograd.grad(logits, h, fisher_NV)[0]
        return u_ND

    return transpose_product(
        model,
        batches,
        targets,
        from_outputs,
        "exact product",
        recompute=recompute,
        storage=storage,
        head=head,
    )
