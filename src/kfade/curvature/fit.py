"""Fit the curvature on retain batches: identity, diagonal, K-FAC, EK-FAC.

With N loss tokens and M live positions, a layer's inputs a and gradients g of the summed
pseudo-log-likelihood with respect to its outputs:

    K-FAC (Martens & Grosse 2015; weight sharing as Grosse et al. 2023)
        A = (1/M) Σ a aᵀ,  S = (1/N) Σ g gᵀ,  G ≈ S ⊗ A,  Λ = λ_S λ_Aᵀ
    EK-FAC (George et al. 2018)
        the same bases, Λ = (1/N) Σ_sequences (Q_Oᵀ ∇W_sequence Q_I)∘², from a fresh draw
    diagonal
        no bases, Λ = (1/N) Σ_sequences (∇W_sequence)∘²
    identity
        no bases, Λ = 1

so that in all of them ½ δᵀGδ is in nats per loss token. The model is left bit-identical.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from kfade.batches import Batch
from kfade.curvature.block import EigenBlock
from kfade.curvature.capture import FiniteCheck, capture
from kfade.curvature.curvature import Curvature
from kfade.curvature.draws import Draw, square_root_draw, token_keys
from kfade.curvature.factors import CovarianceSum, eigendecompose, sequence_squares, sum_dtype
from kfade.curvature.jacobian import backward
from kfade.head import Head, read_head
from kfade.layers import Target
from kfade.models import frozen
from kfade.progress import track
from kfade.stages import stage

COVARIANCE_STREAM, EIGENVALUE_STREAM = 0, 1
Fit = Callable[..., Curvature]
"""(model, batches, targets, *, draw, seed) -> Curvature."""


def fit_identity(
    model: nn.Module,
    batches: Sequence[Batch],
    targets: Sequence[Target],
    *,
    draw: Draw = square_root_draw,
    seed: int = 0,
) -> Curvature:
    """G̃ = I: no curvature at all; nothing of ``batches`` is used."""
    blocks = {}
    for target in targets:
        weight = target.weight
        one = torch.ones(1, 1, dtype=sum_dtype(weight.dtype), device=weight.device)
        blocks[target.name] = EigenBlock(None, None, one)
    return Curvature(blocks, {"estimator": "identity"})


def fit_diagonal(
    model: nn.Module,
    batches: Sequence[Batch],
    targets: Sequence[Target],
    *,
    draw: Draw = square_root_draw,
    seed: int = 0,
) -> Curvature:
    """Λ = (1/N) Σ_sequences (∇W_sequence)∘²."""
    bare = {target.name: (None, None) for target in targets}
    grids = _fit_eigenvalues(model, batches, targets, bare, draw, seed)
    blocks = {name: EigenBlock(None, None, grid) for name, grid in grids.items()}
    return Curvature(blocks, _provenance("diagonal", batches, draw, seed))


def fit_kfac(
    model: nn.Module,
    batches: Sequence[Batch],
    targets: Sequence[Target],
    *,
    draw: Draw = square_root_draw,
    seed: int = 0,
) -> Curvature:
    """G̃ = S ⊗ A for each layer, in the eigenbases of S and A."""
    dtype = sum_dtype(targets[0].weight.dtype)
    a_sums: dict[str, CovarianceSum] = {}
    s_sums: dict[str, CovarianceSum] = {}
    for target in targets:
        device = target.weight.device
        if target.input_of not in a_sums:
            a_sums[target.input_of] = CovarianceSum(target.shape[1], dtype, device)
        s_sums[target.name] = CovarianceSum(target.shape[0], dtype, device)
    pseudo = pseudo_gradients(draw, seed, COVARIANCE_STREAM)
    check = FiniteCheck()
    live = torch.zeros(0)

    def on_input(target: Target, a_BTI: Tensor) -> None:
        check.note("activations", target.name, a_BTI)
        a_sums[target.input_of].add(a_BTI[live])

    def on_gradient(target: Target, g_BTO: Tensor) -> None:
        check.note("gradients", target.name, g_BTO)
        s_sums[target.name].add(g_BTO[live])

    with stage("covariance"), frozen(model):
        head = read_head(model)
        for batch in track(batches, "covariances", _positions):
            live = batch.live_BT
            with capture(targets, on_input=on_input, on_gradient=on_gradient):
                backward(model, head, batch, pseudo)
            check.raise_if_broken()
    loss_tokens, positions = _counts(batches)
    eigen: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
    work = [("A", name, positions) for name in a_sums]
    work += [("S", name, loss_tokens) for name in s_sums]
    sums = {"A": a_sums, "S": s_sums}
    with stage("eigh"):
        for factor, name, count in track(
            work, "eigendecompositions", lambda w: sums[w[0]][w[1]].width ** 3
        ):
            mean = sums[factor][name].mean(count)
            eigen[factor, name] = eigendecompose(mean, f"{factor} of {name}")
            sums[factor][name].free()
    blocks = {}
    for target in targets:
        s_values, q_out = eigen["S", target.name]
        a_values, q_in = eigen["A", target.input_of]
        blocks[target.name] = EigenBlock(q_out, q_in, torch.outer(s_values, a_values))
    return Curvature(blocks, _provenance("kfac", batches, draw, seed))


def fit_ekfac(
    model: nn.Module,
    batches: Sequence[Batch],
    targets: Sequence[Target],
    *,
    draw: Draw = square_root_draw,
    seed: int = 0,
) -> Curvature:
    """K-FAC's bases with eigenvalues measured in them, sequence by sequence."""
    kfac = fit_kfac(model, batches, targets, draw=draw, seed=seed)
    return correct_eigenvalues(model, batches, targets, kfac, draw=draw, seed=seed)


def correct_eigenvalues(
    model: nn.Module,
    batches: Sequence[Batch],
    targets: Sequence[Target],
    kfac: Curvature,
    *,
    draw: Draw = square_root_draw,
    seed: int = 0,
) -> Curvature:
    """EK-FAC from a K-FAC fit: the same bases, Λ measured with a fresh draw."""
    bases = {name: (block.q_out, block.q_in) for name, block in kfac.blocks.items()}
    grids = _fit_eigenvalues(model, batches, targets, bases, draw, seed)
    blocks = {name: EigenBlock(*bases[name], grids[name]) for name in bases}
    return Curvature(blocks, _provenance("ekfac", batches, draw, seed))


def pseudo_gradients(draw: Draw, seed: int, stream: int):
    """What :func:`backward` asks for: gradients [N, D] of the summed pseudo-log-likelihood."""

    def from_outputs(head: Head, batch: Batch, hidden_ND: Tensor) -> Tensor:
        row_N, position_N = batch.loss_BT.nonzero(as_tuple=True)
        key_N = token_keys(seed, stream, batch.id_B[row_N], position_N)
        u_ND = torch.empty_like(hidden_ND)
        for part in head.chunks(hidden_ND):
            with torch.enable_grad():
                h = hidden_ND[part].requires_grad_()
                logits = head(h)
            u_NV = draw(logits.detach().softmax(dim=-1), key_N[part])
            u_ND[part] = torch.autograd.grad(logits, h, u_NV)[0]
        return u_ND

    return from_outputs


def _fit_eigenvalues(
    model: nn.Module,
    batches: Sequence[Batch],
    targets: Sequence[Target],
    bases: Mapping[str, tuple[Tensor | None, Tensor | None]],
    draw: Draw,
    seed: int,
) -> dict[str, Tensor]:
    """Λ [O, I] of every target in the given bases."""
    grids: dict[str, Tensor] = {}
    work: dict[tuple[tuple[int, int], torch.device], Tensor] = {}
    for target in targets:
        weight = target.weight
        grids[target.name] = torch.zeros(
            target.shape, dtype=sum_dtype(weight.dtype), device=weight.device
        )
        work.setdefault((target.shape, weight.device), torch.empty_like(grids[target.name]))
    readers: dict[str, int] = {}
    for target in targets:
        readers[target.input_of] = readers.get(target.input_of, 0) + 1
    inputs: dict[str, tuple[Tensor, int]] = {}
    live, lengths = torch.zeros(0), [0]
    pseudo = pseudo_gradients(draw, seed, EIGENVALUE_STREAM)
    check = FiniteCheck()

    def on_input(target: Target, a_BTI: Tensor) -> None:
        check.note("activations", target.name, a_BTI)
        a_RI = a_BTI[live].to(grids[target.name].dtype)
        q_in = bases[target.name][1]
        rotated = a_RI if q_in is None else a_RI @ q_in
        inputs[target.input_of] = (rotated, readers[target.input_of])

    def on_gradient(target: Target, g_BTO: Tensor) -> None:
        check.note("gradients", target.name, g_BTO)
        grid = grids[target.name]
        g_RO = g_BTO[live].to(grid.dtype)
        q_out = bases[target.name][0]
        a_RI, left = inputs.pop(target.input_of)
        if left > 1:
            inputs[target.input_of] = (a_RI, left - 1)
        scratch = work[target.shape, grid.device]
        g_RO = g_RO if q_out is None else g_RO @ q_out
        sequence_squares(g_RO, a_RI, lengths, grid, scratch)

    name = "eigenvalues" if any(q is not None for q, _ in bases.values()) else "diagonal"
    with stage("lambda"), frozen(model):
        head = read_head(model)
        for batch in track(batches, name, _positions):
            live, lengths = batch.live_BT, batch.live_BT.sum(dim=1).tolist()
            with capture(targets, on_input=on_input, on_gradient=on_gradient):
                backward(model, head, batch, pseudo)
            check.raise_if_broken()
    loss_tokens, _ = _counts(batches)
    return {name: grid.div_(loss_tokens) for name, grid in grids.items()}


def _counts(batches: Sequence[Batch]) -> tuple[int, int]:
    """(N loss tokens, M live positions)."""
    return sum(b.loss_tokens for b in batches), sum(int(b.live_BT.sum()) for b in batches)


def _positions(batch: Batch) -> float:
    return batch.positions


def _provenance(
    estimator: str, batches: Sequence[Batch], draw: Draw, seed: int
) -> dict[str, object]:
    loss_tokens, positions = _counts(batches)
    return {
        "estimator": estimator,
        "labels": draw.__name__,
        "seed": seed,
        "sequences": sum(len(b.id_B) for b in batches),
        "loss_tokens": loss_tokens,
        "live_positions": positions,
    }
