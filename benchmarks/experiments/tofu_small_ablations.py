"""TOFU-small's ablations: EK-FAC and margin, one thing changed at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

from equal_forgetting import BUDGET
from pieces import Piece, Results
from tofu_small_lab import Lab
from torch import Tensor
from tuning import chosen, lowest

import kfade
from kfade.curvature.curvature import Curvature
from kfade.data.batches import make_batches
from kfade.data.sequences import TokenSequence
from kfade.method.sweep import cut, targets_within

BASES = (4, 2, 8)  # one in so many retain sequences; the others for EK-FAC's eigenvalues
DECADES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
TEMPERATURE = 2.0  # of the softened outputs


def ablations(lab: Lab, results: Results) -> Iterator[Piece]:
    """On the report authors; what needs another fit on one third of the blocks, the one whose step
    cost least KL."""
    damping = chosen(results, "ekfac margin")
    if damping is None:
        return

    def search(curvature: Curvature, d: float, layers: str, like: str) -> dict[str, Any]:
        return lab.search("report", curvature, "margin", d, layers=layers, like=like)

    def sampled() -> dict[str, Any]:
        return search(lab.curvature("ekfac sampled"), damping, "all", "ekfac margin")

    yield "ablation sampled labels", sampled
    for share in BASES:
        yield (
            f"ablation bases from 1/{share}, eigenvalues from the rest",
            lambda n=share: search(lab.split_fit(n), damping, "all", "ekfac margin"),
        )
    parts = thirds(results["full"]["blocks"])
    for layers in parts:
        yield (
            f"ablation blocks {layers}",
            lambda b=layers: search(lab.curvature("ekfac"), damping, b, f"blocks {b}"),
        )
    done = {b: results[f"ablation blocks {b}"] for b in parts if f"ablation blocks {b}" in results}
    best = lowest(done.items())
    if best is not None:
        yield from third_ablations(lab, best, damping, search)
    for d in DECADES:
        if d != damping:
            yield (
                f"ablation damping {d:g}",
                lambda d=d: search(lab.curvature("ekfac"), d, "all", "ekfac margin"),
            )


def third_ablations(
    lab: Lab, layers: str, damping: float, search: Callable[..., dict[str, Any]]
) -> Iterator[Piece]:
    """Those made on the blocks ``layers``."""

    def refit(
        sequences: list[TokenSequence], estimator: kfade.EKFAC = kfade.EKFAC()
    ) -> dict[str, Any]:
        batches = make_batches(sequences, budget=BUDGET)
        targets = targets_within(lab.targets, layers)
        curvature = estimator.fit(lab.model, batches, targets)
        row = search(curvature, damping, layers, f"blocks {layers}")
        return {**row, "layers": layers, "questions": len(sequences)}

    def steps(*, refit: bool) -> dict[str, Any]:
        targets = targets_within(lab.targets, layers)
        part = cut(lab.curvature("ekfac"), targets)
        row = lab.unlearn(part, damping, targets=targets, steps=3, refit=refit)
        return {**row, "layers": layers}

    def fit() -> list[TokenSequence]:
        return lab.slices["fit"]

    yield "ablation forget set in the fit", lambda: refit([*fit(), *lab.group("report").forget])
    yield "ablation retain 1/4", lambda: refit(fit()[::4])
    yield "ablation retain 1/16", lambda: refit(fit()[::16])
    yield "ablation wikitext", lambda: refit(lab.text)
    yield "ablation own text", lambda: refit(lab.own_text)
    yield "ablation softened outputs", lambda: refit(fit(), kfade.EKFAC(softened_draw))
    yield "ablation 3 steps", lambda: steps(refit=False)
    yield "ablation 3 steps, each with its fit", lambda: steps(refit=True)


def softened_draw(p_NV: Tensor, key_N: Tensor) -> Tensor:
    """The square-root draw of outputs at ``TEMPERATURE``: a token that the model is sure of counts
    for more, the curvature is no longer that of its KL."""
    soft_NV = p_NV.pow(1 / TEMPERATURE)
    return kfade.square_root_draw(soft_NV / soft_NV.sum(dim=1, keepdim=True), key_N)


def thirds(blocks: int) -> list[str]:
    """The first, middle and last third of so many blocks."""
    bounds = [round(blocks * part / 3) for part in range(4)]
    return [f"{first}-{end - 1}" for first, end in pairwise(bounds)]
