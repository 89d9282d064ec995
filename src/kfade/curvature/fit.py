"""The passes of a fit over one group of layers, and fits group by group.

With N loss tokens and M live positions of the batches, a layer's inputs a, and gradients g of the
summed pseudo-log-likelihood with respect to its outputs, the passes measure

    A = (1/M) Σ a aᵀ,  S = (1/N) Σ g gᵀ                      ("covariance")
    Λ = (1/N) Σ_sequences (Q_Oᵀ ∇W_sequence Q_I)∘²           ("lambda"; Q = I without bases)

``estimators`` says what each estimator makes of them. The model is left bit-identical.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kfade.curvature.block import EigenBlock
from kfade.curvature.draws import Draw, token_keys
from kfade.curvature.owners import Blocks, OwnedBlocks, Owners
from kfade.curvature.passes import Checkpoint, FromOutputs, run_pass
from kfade.curvature.recompute import recomputing
from kfade.curvature.store import Store, StoredBlocks
from kfade.curvature.sums import Bases, Covariances, Eigenvalues, decompose, decompose_shared
from kfade.data.batches import Batch, digest_batches
from kfade.models.head import Head
from kfade.runtime import distributed
from kfade.runtime.stages import stage

COVARIANCE_STREAM, EIGENVALUE_STREAM = 0, 1
"""Streams of random numbers: pseudo-labels of the two passes are independent."""
CheckpointOf = Callable[[str], "Checkpoint | None"]
"""Name of a pass -> where its unfinished sums are kept."""


@dataclass(frozen=True)
class GroupFit:
    """One group of layers to be fitted, with the passes over the data that estimators use."""

    model: nn.Module
    batches: Sequence[Batch]
    owners: Owners
    """The layers of the group, and which process keeps each."""
    seed: int
    """Keys the pseudo-labels."""
    recompute: bool
    """Run each block again in the backward pass, see ``recompute``."""
    checkpoint_of: CheckpointOf
    head: Head | None = None
    """The model's head, if it has been read before."""

    def kfac(self, draw: Draw) -> Blocks:
        """S and A of each layer, decomposed: their eigenbases, and Λ = λ_S λ_Aᵀ.

        Each factor is decomposed by one process: the owner of its layer, or, where layers have no
        owners, any one of them, which sends the result to all.
        """
        sums = Covariances(self.owners)
        with stage("covariance"):
            self._run(sums, draw, COVARIANCE_STREAM, "covariances", "covariance")
        loss_tokens, positions = count_tokens(self.batches)
        work = [(f"A of {name}", total, positions) for name, total in sums.a.items()]
        work += [(f"S of {name}", total, loss_tokens) for name, total in sums.s.items()]
        with stage("eigh"):
            eigen = decompose(work) if self.owners.spread else decompose_shared(work)
        blocks = {}
        for target in self.owners.own:
            s_values, q_out = eigen[f"S of {target.name}"]
            a_values, q_in = eigen[f"A of {target.input_of}"]
            blocks[target.name] = EigenBlock(q_out, q_in, torch.outer(s_values, a_values))
        return blocks

    def eigenvalues(self, bases: Bases, draw: Draw) -> Blocks:
        """Λ [O, I] of each layer in the given bases, from pseudo-labels of its own."""
        sums = Eigenvalues(self.owners, bases)
        name, kept = "diagonal", "diagonal"
        if any(q_out is not None for q_out, _ in bases.values()):
            # A repeated eigendecomposition may give other bases; sums in those are not continued.
            name, kept = "eigenvalues", f"lambda-{_fingerprint(bases):08x}"
        with stage("lambda"):
            self._run(sums, draw, EIGENVALUE_STREAM, name, kept)
            loss_tokens, _ = count_tokens(self.batches)
            blocks = {}
            for target in self.owners.own:
                grid = sums.grids[target.name]
                if not self.owners.spread:
                    distributed.all_reduce(grid)
                blocks[target.name] = EigenBlock(*bases[target.name], grid.div_(loss_tokens))
        return blocks

    def _run(
        self, sums: Covariances | Eigenvalues, draw: Draw, stream: int, name: str, kept: str
    ) -> None:
        """One pass, shown as ``name`` and kept as ``kept``."""
        pseudo, group = pseudo_gradients(draw, self.seed, stream), self.owners.group
        with recomputing(self.model, group, self.recompute):
            checkpoint = self.checkpoint_of(kept)
            run_pass(
                self.model, self.batches, group, sums, pseudo, name, checkpoint, head=self.head
            )


def bases_of(blocks: Mapping[str, EigenBlock]) -> Bases:
    """(Q_O, Q_I) of each block."""
    return {name: (block.q_out, block.q_in) for name, block in blocks.items()}


def pseudo_gradients(draw: Draw, seed: int, stream: int) -> FromOutputs:
    """Gradients [N, D] of the summed pseudo-log-likelihood in the final hidden states, for
    :func:`~kfade.curvature.passes.run_pass`."""

    def from_outputs(head: Head, batch: Batch, hidden_ND: Tensor) -> Tensor:
        length = batch.loss_BT.shape[1]
        id_N = batch.id_B[batch.loss_index // length]
        key_N = token_keys(seed, stream, id_N, batch.loss_index % length)
        u_ND = torch.empty_like(hidden_ND)
        for part in head.chunks(hidden_ND):
            with torch.enable_grad():
                h = hidden_ND[part].requires_grad_()
                logits = head(h)
            u_NV = draw(logits.detach().softmax(dim=-1), key_N[part])
            u_ND[part] = torch.autograd.grad(logits, h, u_NV)[0]
        return u_ND

    return from_outputs


FitOne = Callable[[Owners, CheckpointOf], Blocks]
"""The fit of one group."""


def fit_in_memory(groups: Sequence[Owners], fit_one: FitOne) -> Mapping[str, EigenBlock]:
    """Fit group after group. All blocks are in every process, or with the owners of their
    layers."""
    if groups[0].spread:
        owned = OwnedBlocks()
        for owners in groups:
            owned.add(fit_one(owners, lambda name: None), owners)
        return owned
    blocks: Blocks = {}
    for owners in groups:
        blocks |= fit_one(owners, lambda name: None)
    return blocks


def fit_on_disk(
    groups: Sequence[Owners],
    fit_one: FitOne,
    facts: Mapping[str, Any],
    batches: Sequence[Batch],
    store: Store,
) -> StoredBlocks:
    """Fit group after group and write each before the next; skip groups that are finished.

    Each group is one file, written by the first process. If layers have owners, each process writes
    a file for each group.
    """
    spread = groups[0].spread
    processes, process = (distributed.count(), distributed.rank()) if spread else (1, 0)
    made = {**facts, "spread over": processes} if spread else facts
    data = digest_batches(batches)
    finished = [
        _is_finished(store, number * processes + process, owners, made)
        for number, owners in enumerate(groups)
    ]
    for number, owners in enumerate(groups):
        if finished[number]:
            continue
        names = [target.name for target in owners.group]
        summed = {**facts, "targets": names, "batches": data}
        found = fit_one(owners, partial(store.checkpoint, number, summed, in_step=spread))
        with stage("save"):
            writes = spread or distributed.rank() == 0
            store.finish(number * processes + process, found if writes else {}, made, number)
        del found  # before the next group is fitted
    return store.blocks(
        [
            number * processes + owner
            for number, owners in enumerate(groups)
            for owner in range(processes)
            if owners.kept_by(owner)
        ]
    )


def _is_finished(store: Store, number: int, owners: Owners, facts: Mapping[str, Any]) -> bool:
    """Whether every process finds its file of a group, ``number`` in this process, complete."""
    names = [target.name for target in owners.own]
    found = not names or store.finished(number, names, facts)
    return not distributed.any_of(not found)


def count_tokens(batches: Sequence[Batch]) -> tuple[int, int]:
    """(N loss tokens, M live positions)."""
    return sum(b.loss_tokens for b in batches), sum(sum(b.lengths) for b in batches)


def _fingerprint(bases: Bases) -> int:
    """A number that changes with the bases."""
    number = 0
    for pair in bases.values():
        for q in pair:
            if q is not None:
                number = zlib.crc32(q.sum(dim=1).cpu().numpy().data, number)
    return number
