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

import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kfade.curvature.block import EigenBlock
from kfade.curvature.curvature import Curvature
from kfade.curvature.draws import Draw, square_root_draw, token_keys
from kfade.curvature.factors import (
    sum_dtype,
)
from kfade.curvature.groups import group_targets
from kfade.curvature.owners import Blocks, Owners, everywhere
from kfade.curvature.passes import FromOutputs, Keeper, run_pass
from kfade.curvature.recompute import recomputing
from kfade.curvature.store import Store
from kfade.curvature.sums import (
    Bases,
    Covariances,
    Eigenvalues,
    dealt_out,
    decomposed,
)
from kfade.data.batches import Batch, digest_batches
from kfade.models.head import Head
from kfade.models.interface import check_batches, check_model
from kfade.models.layers import Target
from kfade.runtime import distributed
from kfade.runtime.stages import stage

COVARIANCE_STREAM, EIGENVALUE_STREAM = 0, 1
Fit = Callable[..., Curvature]
"""(model, batches, targets, *, draw, seed, recompute, memory, store) -> Curvature."""


def fit_identity(
    model: nn.Module,
    batches: Sequence[Batch],
    targets: Sequence[Target],
    *,
    draw: Draw = square_root_draw,
    seed: int = 0,
    recompute: bool = False,
    memory: int | None = None,
    store: Store | None = None,
) -> Curvature:
    """G̃ = I: no curvature at all; nothing of ``batches`` is used."""

    def fit_group(owners: Owners, keeper_of: KeeperOf) -> Blocks:
        blocks = {}
        for target in owners.own:
            weight = target.weight
            one = torch.ones(1, 1, dtype=sum_dtype(weight.dtype), device=weight.device)
            blocks[target.name] = EigenBlock(None, None, one)
        return blocks

    facts = {"estimator": "identity"}
    return _in_groups(model, batches, targets, fit_group, facts, memory, store)


def fit_diagonal(
    model: nn.Module,
    batches: Sequence[Batch],
    targets: Sequence[Target],
    *,
    draw: Draw = square_root_draw,
    seed: int = 0,
    recompute: bool = False,
    memory: int | None = None,
    store: Store | None = None,
) -> Curvature:
    """Λ = (1/N) Σ_sequences (∇W_sequence)∘²; arguments as in :func:`fit_ekfac`."""

    def fit_group(owners: Owners, keeper_of: KeeperOf) -> Blocks:
        bare = {target.name: (None, None) for target in owners.own}
        pseudo = pseudo_gradients(draw, seed, EIGENVALUE_STREAM)
        with recomputing(model, owners.group, recompute):
            return _with_eigenvalues(model, batches, owners, bare, pseudo, keeper_of("diagonal"))

    facts = _provenance("diagonal", batches, draw, seed)
    return _in_groups(model, batches, targets, fit_group, facts, memory, store)


def fit_kfac(
    model: nn.Module,
    batches: Sequence[Batch],
    targets: Sequence[Target],
    *,
    draw: Draw = square_root_draw,
    seed: int = 0,
    recompute: bool = False,
    memory: int | None = None,
    store: Store | None = None,
) -> Curvature:
    """G̃ = S ⊗ A for each layer, in the eigenbases of S and A; arguments as in
    :func:`fit_ekfac`."""

    def fit_group(owners: Owners, keeper_of: KeeperOf) -> Blocks:
        pseudo = pseudo_gradients(draw, seed, COVARIANCE_STREAM)
        with recomputing(model, owners.group, recompute):
            return _kfac(model, batches, owners, pseudo, keeper_of("covariance"))

    facts = _provenance("kfac", batches, draw, seed)
    return _in_groups(model, batches, targets, fit_group, facts, memory, store)


def fit_ekfac(
    model: nn.Module,
    batches: Sequence[Batch],
    targets: Sequence[Target],
    *,
    draw: Draw = square_root_draw,
    seed: int = 0,
    recompute: bool = False,
    memory: int | None = None,
    store: Store | None = None,
) -> Curvature:
    """K-FAC's bases with eigenvalues measured in them, sequence by sequence.

    Args:
        draw: makes the pseudo-labels, see ``draws``.
        seed: keys them.
        recompute: run each block again in the backward pass instead of keeping what its first run
            made, see ``recompute``: the same bits for less memory and more work.
        memory: bytes that the curvature may hold at a time; the layers are then fitted in groups,
            each with passes of its own. None: all at once.
        store: where finished groups go, to be read back block by block, and where unfinished
            sums are kept, so that a fit that was interrupted goes on. None: all in memory.

    With several processes (``distributed``) each sums over its share of the batches; of a model
    whose weights are spread over them each keeps the sums of some layers, see ``owners``.

    Raises:
        InputError: NaN or Inf in activations, gradients or factors; a group over ``memory``; a
            token or a length that the model does not read.
    """

    def fit_group(owners: Owners, keeper_of: KeeperOf) -> Blocks:
        pseudo = pseudo_gradients(draw, seed, COVARIANCE_STREAM)
        with recomputing(model, owners.group, recompute):
            kfac = _kfac(model, batches, owners, pseudo, keeper_of("covariance"))
        bases = {name: (block.q_out, block.q_in) for name, block in kfac.items()}
        kfac.clear()
        pseudo = pseudo_gradients(draw, seed, EIGENVALUE_STREAM)
        # Sums in other bases are not continued, should an eigendecomposition not repeat itself.
        keeper = keeper_of(f"lambda-{_fingerprint(bases):08x}")
        with recomputing(model, owners.group, recompute):
            return _with_eigenvalues(model, batches, owners, bases, pseudo, keeper)

    facts = _provenance("ekfac", batches, draw, seed)
    return _in_groups(model, batches, targets, fit_group, facts, memory, store)


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
    pseudo = pseudo_gradients(draw, seed, EIGENVALUE_STREAM)
    owners = Owners(targets, "ekfac", spread=distributed.is_sharded(model))
    blocks = _with_eigenvalues(model, batches, owners, bases, pseudo, None)
    return Curvature(everywhere(blocks, owners), _provenance("ekfac", batches, draw, seed))


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


KeeperOf = Callable[[str], "Keeper | None"]
"""Stage -> what keeps its unfinished sums."""


def _in_groups(
    model: nn.Module,
    batches: Sequence[Batch],
    targets: Sequence[Target],
    fit_group: Callable[[Owners, KeeperOf], Blocks],
    facts: dict[str, Any],
    memory: int | None,
    store: Store | None,
) -> Curvature:
    """Fit group after group, each stored before the next where there is a store."""
    check_model(model, targets)
    if batches or facts["estimator"] != "identity":  # which looks at none
        check_batches(model, batches)
    estimator, spread = facts["estimator"], distributed.is_sharded(model)
    processes = distributed.count() if spread else 1
    groups = group_targets(targets, estimator, memory, processes)
    owned = [Owners(group, estimator, spread=spread) for group in groups]
    if store is None:
        blocks: Mapping[str, EigenBlock] = {}
        for owners in owned:
            blocks = {**blocks, **everywhere(fit_group(owners, lambda stage: None), owners)}
        return Curvature(blocks, facts)
    made = {**facts, "spread over": processes} if spread else facts
    part = distributed.rank() if spread else 0
    done = [_is_finished(store, number, owners, made) for number, owners in enumerate(owned)]
    data = digest_batches(batches)
    for number, (owners, is_done) in enumerate(zip(owned, done, strict=True)):
        if not is_done:
            names = [target.name for target in owners.group]
            summed = {**facts, "targets": names, "batches": data}
            found = fit_group(owners, partial(store.keeper, number, summed, together=spread))
            with stage("save"):
                writes = spread or distributed.rank() == 0
                store.finish(number * processes + part, found if writes else {}, made, number)
            del found  # before the next group is fitted
    files = [
        number * processes + process
        for number, owners in enumerate(owned)
        for process in range(processes)
        if owners.kept_by(process)
    ]
    names = [target.name for target in targets]
    stored = store.blocks(files).only(names, store.device)
    return Curvature(stored, {**facts, **store.provenance})


def _is_finished(store: Store, number: int, owners: Owners, facts: Mapping[str, Any]) -> bool:
    """Whether all processes see what they have to have written of group ``number``."""
    processes = distributed.count() if owners.spread else 1
    part = distributed.rank() if owners.spread else 0
    names = [target.name for target in owners.own]
    there = not names or store.finished(number * processes + part, names, facts)
    return all(own for [own] in distributed.all_gather_lists([there]))


def _kfac(
    model: nn.Module,
    batches: Sequence[Batch],
    owners: Owners,
    pseudo: FromOutputs,
    keeper: Keeper | None,
) -> Blocks:
    """A and S, each decomposed by one process: its owner, or where there are no owners by one that
    has the sum over all of them and spreads the result to all."""
    sums = Covariances(owners)
    with stage("covariance"):
        run_pass(model, batches, owners.group, sums, pseudo, "covariances", keeper)
    loss_tokens, positions = _counts(batches)
    work = [(f"A of {name}", name, total, positions) for name, total in sums.a.items()]
    work += [(f"S of {name}", name, total, loss_tokens) for name, total in sums.s.items()]
    with stage("eigh"):
        eigen = decomposed(work) if owners.spread else dealt_out(work)
    blocks = {}
    for target in owners.own:
        s_values, q_out = eigen[f"S of {target.name}"]
        a_values, q_in = eigen[f"A of {target.input_of}"]
        blocks[target.name] = EigenBlock(q_out, q_in, torch.outer(s_values, a_values))
    return blocks


def _with_eigenvalues(
    model: nn.Module,
    batches: Sequence[Batch],
    owners: Owners,
    bases: Bases,
    pseudo: FromOutputs,
    keeper: Keeper | None,
) -> Blocks:
    """Λ [O, I] in the given bases, with them, of every target whose sums lie here."""
    sums = Eigenvalues(owners, bases)
    name = "eigenvalues" if any(q is not None for q, _ in bases.values()) else "diagonal"
    with stage("lambda"):
        run_pass(model, batches, owners.group, sums, pseudo, name, keeper)
        loss_tokens, _ = _counts(batches)
        blocks = {}
        for target in owners.own:
            grid = sums.grids[target.name]
            if not owners.spread:
                distributed.all_reduce(grid)
            blocks[target.name] = EigenBlock(*bases[target.name], grid.div_(loss_tokens))
    return blocks


def _fingerprint(bases: Bases) -> int:
    """A number that changes with the bases."""
    number = 0
    for pair in bases.values():
        for q in pair:
            if q is not None:
                number = zlib.crc32(q.sum(dim=1).cpu().numpy().data, number)
    return number


def _counts(batches: Sequence[Batch]) -> tuple[int, int]:
    """(N loss tokens, M live positions)."""
    return sum(b.loss_tokens for b in batches), sum(int(b.live_BT.sum()) for b in batches)


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
