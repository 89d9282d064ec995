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
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from kfade import distributed
from kfade.batches import Batch, digest_batches
from kfade.curvature.block import EigenBlock
from kfade.curvature.curvature import Curvature
from kfade.curvature.draws import Draw, square_root_draw, token_keys
from kfade.curvature.eigh import at_once, eigendecompose, side_by_side
from kfade.curvature.factors import (
    CovarianceSum,
    add_sequence_squares,
    rows_first,
    sum_dtype,
)
from kfade.curvature.groups import group_targets
from kfade.curvature.passes import FromOutputs, Keeper, Waiting, live_rows, run_pass
from kfade.curvature.recompute import recomputing
from kfade.curvature.store import Store
from kfade.head import Head
from kfade.layers import Target
from kfade.progress import track
from kfade.stages import stage

COVARIANCE_STREAM, EIGENVALUE_STREAM = 0, 1
Fit = Callable[..., Curvature]
"""(model, batches, targets, *, draw, seed, recompute, memory, store) -> Curvature."""
Blocks = dict[str, EigenBlock]
Bases = Mapping[str, tuple[Tensor | None, Tensor | None]]
"""Target name -> (Q_O, Q_I)."""


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

    def fit_group(group: Sequence[Target], keeper_of: KeeperOf) -> Blocks:
        blocks = {}
        for target in group:
            weight = target.weight
            one = torch.ones(1, 1, dtype=sum_dtype(weight.dtype), device=weight.device)
            blocks[target.name] = EigenBlock(None, None, one)
        return blocks

    facts = {"estimator": "identity"}
    return _in_groups(batches, targets, fit_group, facts, memory, store)


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

    def fit_group(group: Sequence[Target], keeper_of: KeeperOf) -> Blocks:
        bare = {target.name: (None, None) for target in group}
        pseudo = pseudo_gradients(draw, seed, EIGENVALUE_STREAM)
        with recomputing(model, group, recompute):
            return _with_eigenvalues(model, batches, group, bare, pseudo, keeper_of("diagonal"))

    facts = _provenance("diagonal", batches, draw, seed)
    return _in_groups(batches, targets, fit_group, facts, memory, store)


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

    def fit_group(group: Sequence[Target], keeper_of: KeeperOf) -> Blocks:
        pseudo = pseudo_gradients(draw, seed, COVARIANCE_STREAM)
        with recomputing(model, group, recompute):
            return _kfac(model, batches, group, pseudo, keeper_of("covariance"))

    facts = _provenance("kfac", batches, draw, seed)
    return _in_groups(batches, targets, fit_group, facts, memory, store)


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

    With several processes (``distributed``) each sums over its share of the batches.

    Raises:
        InputError: NaN or Inf in activations, gradients or factors; a group over ``memory``.
    """

    def fit_group(group: Sequence[Target], keeper_of: KeeperOf) -> Blocks:
        pseudo = pseudo_gradients(draw, seed, COVARIANCE_STREAM)
        with recomputing(model, group, recompute):
            kfac = _kfac(model, batches, group, pseudo, keeper_of("covariance"))
        bases = {name: (block.q_out, block.q_in) for name, block in kfac.items()}
        kfac.clear()
        pseudo = pseudo_gradients(draw, seed, EIGENVALUE_STREAM)
        # Sums in other bases are not continued, should an eigendecomposition not repeat itself.
        keeper = keeper_of(f"lambda-{_fingerprint(bases):08x}")
        with recomputing(model, group, recompute):
            return _with_eigenvalues(model, batches, group, bases, pseudo, keeper)

    facts = _provenance("ekfac", batches, draw, seed)
    return _in_groups(batches, targets, fit_group, facts, memory, store)


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
    blocks = _with_eigenvalues(model, batches, targets, bases, pseudo, None)
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


KeeperOf = Callable[[str], "Keeper | None"]
"""Stage -> what keeps its unfinished sums."""


def _in_groups(
    batches: Sequence[Batch],
    targets: Sequence[Target],
    fit_group: Callable[[Sequence[Target], KeeperOf], Blocks],
    facts: dict[str, Any],
    memory: int | None,
    store: Store | None,
) -> Curvature:
    """Fit group after group, each stored before the next where there is a store."""
    groups = group_targets(targets, facts["estimator"], memory)
    if store is None:
        blocks: Mapping[str, EigenBlock] = {}
        for group in groups:
            blocks = {**blocks, **fit_group(group, lambda stage: None)}
        return Curvature(blocks, facts)
    names = [[target.name for target in group] for group in groups]
    finished = [store.finished(number, group, facts) for number, group in enumerate(names)]
    distributed.wait()  # all have looked before the first writes
    data = digest_batches(batches)
    for number, group in enumerate(groups):
        if not finished[number]:
            summed = {**facts, "targets": names[number], "batches": data}
            found = fit_group(group, partial(store.keeper, number, summed))
            with stage("save"):
                store.finish(number, found, facts)
            del found  # before the next group is fitted
    return Curvature(store.blocks(len(groups)), {**facts, **store.provenance})


class _Covariances:
    """Σ a aᵀ for each distinct input, Σ g gᵀ for each layer."""

    def __init__(self, targets: Sequence[Target]) -> None:
        self.a: dict[str, CovarianceSum] = {}
        self.s: dict[str, CovarianceSum] = {}
        for target in targets:
            dtype, device = sum_dtype(target.weight.dtype), target.weight.device
            if target.input_of not in self.a:
                self.a[target.input_of] = CovarianceSum(target.shape[1], dtype, device)
            self.s[target.name] = CovarianceSum(target.shape[0], dtype, device)

    def begin(self, batch: Batch) -> None:
        self._batch = batch

    def on_input(self, target: Target, a_BTI: Tensor) -> None:
        self.a[target.input_of].add(live_rows(a_BTI, self._batch))

    def on_gradient(self, target: Target, g_BTO: Tensor) -> None:
        self.s[target.name].add(live_rows(g_BTO, self._batch))

    def tensors(self) -> dict[str, Tensor]:
        both = {"A": self.a, "S": self.s}
        return {f"{k}/{name}": s.sum_ for k, sums in both.items() for name, s in sums.items()}


def _kfac(
    model: nn.Module,
    batches: Sequence[Batch],
    targets: Sequence[Target],
    pseudo: FromOutputs,
    keeper: Keeper | None,
) -> Blocks:
    """A and S, summed over processes, each decomposed by one of them and spread to all."""
    sums = _Covariances(targets)
    with stage("covariance"):
        run_pass(model, batches, targets, sums, pseudo, "covariances", keeper)
    loss_tokens, positions = _counts(batches)
    work = [(f"A of {name}", name, total, positions) for name, total in sums.a.items()]
    work += [(f"S of {name}", name, total, loss_tokens) for name, total in sums.s.items()]
    owners = distributed.deal([total.width**3 for _, _, total, _ in work])
    eigen: dict[str, tuple[Tensor, Tensor]] = {}
    with stage("eigh"):
        for owner, (what, _, total, _) in zip(owners, work, strict=True):
            distributed.sum_to(owner, total.sum_)
            if owner != distributed.rank():
                eigen[what] = (total.sum_.new_empty(total.width), total.sum_)
        own = [
            piece for owner, piece in zip(owners, work, strict=True) if owner == distributed.rank()
        ]
        eigen.update(_decomposed(own))
        for owner, (what, _, _, _) in zip(owners, work, strict=True):
            for tensor in eigen[what]:
                distributed.spread_from(owner, tensor)
    blocks = {}
    for target in targets:
        s_values, q_out = eigen[f"S of {target.name}"]
        a_values, q_in = eigen[f"A of {target.input_of}"]
        blocks[target.name] = EigenBlock(q_out, q_in, torch.outer(s_values, a_values))
    return blocks


def _decomposed(
    work: Sequence[tuple[str, str, CovarianceSum, int]],
) -> dict[str, tuple[Tensor, Tensor]]:
    """(values, vectors) of each (name, layer, sum, count); vectors take the place of the sums."""
    work = sorted(work, key=lambda piece: -piece[2].width)

    def decompose(piece: tuple[str, str, CovarianceSum, int]) -> tuple[Tensor, Tensor]:
        what, _, total, count = piece
        values, vectors = eigendecompose(total.mean(count), what)
        return values, total.sum_.copy_(vectors)

    def decompositions() -> Iterator[tuple[Tensor, Tensor]]:
        # Each width by itself: how many run at a time, and so with how many threads, must not
        # depend on what else is fitted.
        for width, alike in groupby(work, lambda piece: piece[2].width):
            pieces = list(alike)
            sum_ = pieces[0][2].sum_
            count = at_once(width, sum_.element_size(), sum_.device)
            yield from side_by_side(decompose, pieces, count)

    pieces = track(work, "eigendecompositions", lambda piece: piece[2].width ** 3)
    return {piece[0]: pair for piece, pair in zip(pieces, decompositions(), strict=True)}


class _Eigenvalues:
    """Σ_sequences (Q_Oᵀ ∇W_sequence Q_I)∘² of every target in the given bases."""

    def __init__(self, targets: Sequence[Target], bases: Bases) -> None:
        self.grids: dict[str, Tensor] = {}
        self._bases: dict[str, tuple[Tensor | None, Tensor | None]] = {}
        low: dict[int, Tensor] = {}  # one copy of a shared basis in the model's dtype
        self._inputs: Waiting[tuple[Tensor, Tensor | None]] = Waiting(targets)
        for target in targets:
            weight = target.weight
            self.grids[target.name] = torch.zeros(
                target.shape, dtype=sum_dtype(weight.dtype), device=weight.device
            )
            q_out, q_in = bases[target.name]
            cast = [
                q if q is None else low.setdefault(id(q), q.to(weight.dtype)) for q in (q_out, q_in)
            ]
            self._bases[target.name] = (cast[0], cast[1])

    def begin(self, batch: Batch) -> None:
        self._batch, self._lengths = batch, batch.live_BT.sum(dim=1).tolist()
        self._mean_length = sum(self._lengths) / len(self._lengths)

    def on_input(self, target: Target, a_BTI: Tensor) -> None:
        a_RI, q_in = live_rows(a_BTI, self._batch), self._bases[target.name][1]
        readers = self._inputs.readers[target.input_of]
        if q_in is not None and rows_first(self._mean_length, target.shape[0], readers):
            a_RI, q_in = a_RI @ q_in, None
        self._inputs.put(target, (a_RI, q_in))

    def on_gradient(self, target: Target, g_BTO: Tensor) -> None:
        g_RO, q_out = live_rows(g_BTO, self._batch), self._bases[target.name][0]
        if q_out is not None and rows_first(self._mean_length, target.shape[1]):
            g_RO, q_out = g_RO @ q_out, None
        a_RI, q_in = self._inputs.take(target)
        grid = self.grids[target.name]
        add_sequence_squares(grid, g_RO, a_RI, self._lengths, q_out=q_out, q_in=q_in)

    def tensors(self) -> dict[str, Tensor]:
        return self.grids


def _with_eigenvalues(
    model: nn.Module,
    batches: Sequence[Batch],
    targets: Sequence[Target],
    bases: Bases,
    pseudo: FromOutputs,
    keeper: Keeper | None,
) -> Blocks:
    """Λ [O, I] of every target in the given bases, with them."""
    sums = _Eigenvalues(targets, bases)
    name = "eigenvalues" if any(q is not None for q, _ in bases.values()) else "diagonal"
    with stage("lambda"):
        run_pass(model, batches, targets, sums, pseudo, name, keeper)
        loss_tokens, _ = _counts(batches)
        blocks = {}
        for target in targets:
            grid = distributed.sum_everywhere(sums.grids[target.name])
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
