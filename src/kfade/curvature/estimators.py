"""Estimators of the Gauss-Newton matrix G, layer by layer: identity, diagonal, K-FAC, EK-FAC.

    K-FAC (Martens & Grosse 2015; weight sharing as Grosse et al. 2023)
        G̃ = S ⊗ A, in the eigenbases of S and A: Λ = λ_S λ_Aᵀ
    EK-FAC (George et al. 2018)
        the same bases, and Λ measured in them, sequence by sequence, with pseudo-labels of its own
    diagonal
        no bases, Λ = (1/N) Σ_sequences (∇W_sequence)∘²
    identity
        no bases, Λ = 1

``fit`` defines S, A and Λ. For all but the identity ½ δᵀG̃δ is in nats per loss token.

An estimator is an object: its settings, how it is fitted (``EKFAC().fit(model, batches, targets)``)
and the bytes that a fit takes. A new one is a subclass here and a name in ``runs/choices.py``.

Shapes: O outputs, I inputs of a layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from kfade.curvature.block import EigenBlock
from kfade.curvature.curvature import Curvature
from kfade.curvature.draws import Draw, square_root_draw
from kfade.curvature.eigh import workspace_bytes
from kfade.curvature.factors import SLAB_BYTES, factor_bytes, sum_dtype, widths
from kfade.curvature.fit import (
    CheckpointOf,
    GroupFit,
    bases_of,
    count_tokens,
    fit_in_memory,
    fit_on_disk,
)
from kfade.curvature.groups import group_targets
from kfade.curvature.owners import Blocks, Owners
from kfade.curvature.store import Store
from kfade.data.batches import Batch
from kfade.models.head import Head, read_head
from kfade.models.interface import check_batches, check_model
from kfade.models.load import frozen
from kfade.models.targets import Target
from kfade.runtime import distributed

Pass = Literal["covariance", "lambda"]


@dataclass(frozen=True)
class Estimator(ABC):
    """An estimator G̃ of G, block-diagonal over the targeted weights.

    A subclass defines ``name``, ``passes`` and :meth:`fit_group`. The bytes of a fit and of its
    result follow from the passes.
    """

    name: ClassVar[str]
    """Its name in saved curvatures and on the command line."""
    passes: ClassVar[tuple[Pass, ...]]
    """Passes over the data for each group of layers: "covariance" for eigenbases, "lambda" for
    measured eigenvalues."""

    @abstractmethod
    def fit_group(self, group: GroupFit) -> Blocks:
        """The blocks of one group of layers that this process keeps."""

    @property
    def has_eigenbases(self) -> bool:
        """Whether its blocks have bases Q_O and Q_I."""
        return "covariance" in self.passes

    def fit(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        targets: Sequence[Target],
        *,
        seed: int = 0,
        recompute: bool = False,
        memory: int | None = None,
        store: Store | None = None,
        head: Head | None = None,
    ) -> Curvature:
        """Fit the curvature of ``model`` at ``targets`` on retain ``batches``.

        The model is left bit-identical. With several processes (``distributed``) each sums over its
        share of the batches; of a model whose weights are spread over them each process keeps the
        sums of some layers, see ``owners``.

        Args:
            seed: keys the pseudo-labels.
            recompute: run each block again in the backward pass instead of keeping its
                activations, see ``recompute``: the same bits for less memory and more work.
            memory: bytes that the curvature may hold at a time; the layers are then fitted in
                groups, each with passes of its own. None: all at once.
            store: keeps finished groups on disk, to be read back block by block, and unfinished
                sums, so that an interrupted fit can continue. None: all in memory.
            head: the model's head, if it has been read before (reading it runs trial passes).

        Raises:
            InputError: NaN or Inf in activations, gradients or factors; a group over ``memory``; a
                token or a length that the model does not read.
        """
        check_model(model, targets)
        if batches or self.passes:
            check_batches(model, batches)
        spread = distributed.is_sharded(model)
        processes = distributed.count() if spread else 1
        groups = [
            Owners(group, self.peak_bytes, spread=spread)
            for group in group_targets(targets, self.peak_bytes, memory, processes)
        ]
        facts = self.facts(batches, seed)
        if head is None and self.passes:
            with frozen(model):
                head = read_head(model)

        def fit_one(owners: Owners, checkpoint_of: CheckpointOf) -> Blocks:
            return self.fit_group(
                GroupFit(model, batches, owners, seed, recompute, checkpoint_of, head)
            )

        if store is None:
            return Curvature(fit_in_memory(groups, fit_one), facts)
        stored = fit_on_disk(groups, fit_one, facts, batches, store)
        names = [target.name for target in targets]
        return Curvature(stored.only(names, store.device), {**facts, **store.provenance})

    def facts(self, batches: Sequence[Batch], seed: int) -> dict[str, Any]:
        """Provenance of a fit."""
        return {"estimator": self.name}

    def fit_bytes(self, group: Sequence[Target]) -> dict[str, int]:
        """Bytes of curvature that fitting ``group`` holds at the peak of each of its stages.

        covariance: the factors. eigh: the factors, which the bases replace one by one, with the
        workspace of the decompositions or the eigenvalues O·I. lambda: the eigenvalues, two more
        matrices O·I where a sequence's product is rotated and squared (or two slabs of several
        products, see ``SLAB_BYTES``), the bases, and a copy of them in the model's dtype where that
        is another.
        """
        dtype, device, stages = group[0].dtype, group[0].device, {}
        size = sum_dtype(dtype).itemsize
        grids = [size * target.shape[0] * target.shape[1] for target in group]
        bases = 0
        if self.has_eigenbases:
            factors = factor_bytes(group)
            decomposing = factors + workspace_bytes(widths(group), size, device)
            stages = {"covariance": factors, "eigh": max(decomposing, factors + sum(grids))}
            is_cast = dtype.itemsize != size
            bases = factors + (factors * dtype.itemsize // size if is_cast else 0)
        if "lambda" in self.passes:
            products = max(*grids, SLAB_BYTES.get(device.type, 0))
            stages["lambda"] = bases + sum(grids) + 2 * products
        return stages

    def peak_bytes(self, group: Sequence[Target]) -> int:
        """Bytes of curvature that fitting ``group`` holds at its peak."""
        return max(self.fit_bytes(group).values(), default=0) if group else 0

    def stored_bytes(self, group: Sequence[Target]) -> int:
        """Bytes of the finished curvature of ``group``: bases, shared ones once, and Λ."""
        size = sum_dtype(group[0].dtype).itemsize
        bases = factor_bytes(group) if self.has_eigenbases else 0
        return bases + size * sum(target.shape[0] * target.shape[1] for target in group)


@dataclass(frozen=True)
class Identity(Estimator):
    """G̃ = I: no curvature; the batches are not used."""

    name = "identity"
    passes = ()

    def fit_group(self, group: GroupFit) -> Blocks:
        """Λ = 1, one number for all entries of a layer."""
        blocks = {}
        for target in group.owners.own:
            one = torch.ones(1, 1, dtype=sum_dtype(target.dtype), device=target.device)
            blocks[target.name] = EigenBlock(None, None, one)
        return blocks

    def stored_bytes(self, group: Sequence[Target]) -> int:
        """One number a layer."""
        return sum_dtype(group[0].dtype).itemsize * len(group)


@dataclass(frozen=True)
class _FromPseudoLabels(Estimator):
    """An estimator that measures gradients of pseudo-labels."""

    draw: Draw = square_root_draw
    """Makes the pseudo-labels, see ``draws``."""

    def facts(self, batches: Sequence[Batch], seed: int) -> dict[str, Any]:
        """Estimator, pseudo-labels, and how much data there is."""
        loss_tokens, positions = count_tokens(batches)
        return {
            "estimator": self.name,
            "labels": self.draw.__name__,
            "seed": seed,
            "sequences": sum(len(b.id_B) for b in batches),
            "loss_tokens": loss_tokens,
            "live_positions": positions,
        }


@dataclass(frozen=True)
class Diagonal(_FromPseudoLabels):
    """G̃ = diag Λ, Λ = (1/N) Σ_sequences (∇W_sequence)∘²."""

    name = "diagonal"
    passes = ("lambda",)

    def fit_group(self, group: GroupFit) -> Blocks:
        """Λ of each layer, without bases."""
        no_bases = {target.name: (None, None) for target in group.owners.own}
        return group.eigenvalues(no_bases, self.draw)


@dataclass(frozen=True)
class KFAC(_FromPseudoLabels):
    """G̃ = S ⊗ A for each layer, in the eigenbases of S and A (Martens & Grosse 2015)."""

    name = "kfac"
    passes = ("covariance",)

    def fit_group(self, group: GroupFit) -> Blocks:
        """Eigenbases of S and A, and Λ = λ_S λ_Aᵀ."""
        return group.kfac(self.draw)


@dataclass(frozen=True)
class EKFAC(_FromPseudoLabels):
    """K-FAC's eigenbases with eigenvalues measured in them, sequence by sequence (George et al.
    2018)."""

    name = "ekfac"
    passes = ("covariance", "lambda")

    def fit_group(self, group: GroupFit) -> Blocks:
        """K-FAC's eigenbases, and Λ in them."""
        return group.eigenvalues(bases_of(group.kfac(self.draw)), self.draw)

    def correct(
        self,
        kfac: Curvature,
        model: nn.Module,
        batches: Sequence[Batch],
        targets: Sequence[Target],
        *,
        seed: int = 0,
    ) -> Curvature:
        """EK-FAC from a finished K-FAC fit: its eigenbases, and Λ measured in them."""
        owners = Owners(targets, self.peak_bytes, spread=distributed.is_sharded(model))

        def fit_one(owners: Owners, checkpoint_of: CheckpointOf) -> Blocks:
            group = GroupFit(model, batches, owners, seed, False, checkpoint_of)
            return group.eigenvalues(bases_of(kfac.blocks), self.draw)

        return Curvature(fit_in_memory([owners], fit_one), self.facts(batches, seed))


def fit_kfac(
    model: nn.Module,
    batches: Sequence[Batch],
    targets: Sequence[Target],
    *,
    draw: Draw = square_root_draw,
    **options: Any,
) -> Curvature:
    """``KFAC(draw).fit(model, batches, targets, **options)``, see :meth:`Estimator.fit`."""
    return KFAC(draw).fit(model, batches, targets, **options)
