"""Ablations on TOFU-small: EK-FAC and margin, one thing changed at a time.

    python benchmarks/experiments/tofu_ablations.py --data DIR [--only 'ablation damping*']

Needs the ``tune ekfac margin`` pieces of ``tofu_small.py``, and adds to the same results. What
needs another fit, and the several steps, are made on one third of the blocks: the one whose step
has the lowest held-out KL.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import pairwise

from lab.forgetting import BUDGET
from lab.pieces import Piece, Results
from lab.records import Record, number, table
from lab.rows import quotient
from lab.tuning import chosen, lowest
from tofu_lab import TofuLab, run_pieces
from torch import Tensor

import kfade
from kfade.data.sequences import TokenSequence
from kfade.method.sweep import targets_within
from kfade.models.lengths import batches_for

BASES = (4, 2, 8)  # bases from one in so many retain sequences, eigenvalues from the others
DECADES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
TEMPERATURE = 2.0  # of the softened outputs


def pieces(lab: TofuLab, results: Results) -> Iterator[Piece]:
    """All pieces; none before EK-FAC was tuned."""
    damping = chosen(results, "ekfac margin")
    if damping is None:
        return
    search = partial(lab.one_step, "report", like="ekfac margin")
    yield "ablation sampled labels", partial(search, "ekfac sampled", damping)
    for share in BASES:
        yield (
            f"ablation bases from 1/{share}, eigenvalues from the rest",
            lambda n=share: search(lab.split_fit(n), damping),
        )
    for blocks in thirds(results["full"]["blocks"]):
        on_third = partial(search, layers=blocks, like=f"blocks {blocks}")
        yield f"ablation blocks {blocks}", partial(on_third, "ekfac", damping)
    third = best_third(results)
    if third is not None:
        yield from on_best_third(lab, third, damping)
    for other in DECADES:
        if other != damping:
            yield f"ablation damping {other:g}", partial(search, "ekfac", other)


def on_best_third(lab: TofuLab, layers: str, damping: float) -> Iterator[Piece]:
    """The ablations that are made on these blocks only."""

    def refit(sequences: list[TokenSequence], estimator: kfade.EKFAC = kfade.EKFAC()) -> Record:
        batches = batches_for(lab.model, sequences, BUDGET)
        targets = targets_within(lab.targets, layers)
        curvature = estimator.fit(lab.model, batches, targets)
        row = lab.one_step("report", curvature, damping, layers=layers, like=f"blocks {layers}")
        return {**row, "layers": layers, "questions": len(sequences)}

    def three_steps(*, refit: bool) -> Record:
        row = lab.several_steps("ekfac", damping, layers=layers, steps=3, refit=refit)
        return {**row, "layers": layers}

    def fit() -> list[TokenSequence]:
        return list(lab.slices["fit"])

    yield "ablation forget set in the fit", lambda: refit([*fit(), *lab.group("report").forget])
    yield "ablation retain 1/4", lambda: refit(fit()[::4])
    yield "ablation retain 1/16", lambda: refit(fit()[::16])
    yield "ablation wikitext", lambda: refit(lab.text)
    yield "ablation own text", lambda: refit(lab.own_text())
    yield "ablation softened outputs", lambda: refit(fit(), kfade.EKFAC(softened_draw))
    yield "ablation 3 steps", lambda: three_steps(refit=False)
    yield "ablation 3 steps, each with its fit", lambda: three_steps(refit=True)


def softened_draw(p_NV: Tensor, key_N: Tensor) -> Tensor:
    """The square-root draw from outputs at ``TEMPERATURE``.

    A token that the model is sure of counts for more. The curvature is no longer that of the KL.
    """
    soft_NV = p_NV.pow(1 / TEMPERATURE)
    return kfade.square_root_draw(soft_NV / soft_NV.sum(dim=1, keepdim=True), key_N)


def thirds(blocks: int) -> list[str]:
    """The first, middle and last third of so many blocks."""
    bounds = [round(blocks * part / 3) for part in range(4)]
    return [f"{first}-{end - 1}" for first, end in pairwise(bounds)]


def best_third(results: Results) -> str | None:
    """The third of the blocks whose step has the lowest held-out KL, as in ``10-19``."""
    prefix = "ablation blocks "
    return lowest((n.removeprefix(prefix), r) for n, r in results.items() if n.startswith(prefix))


def ablations_table(results: Results) -> str:
    damping = chosen(results, "ekfac margin")
    base = results.get(f"report ekfac margin {damping:g}") if damping is not None else None
    on_third = results.get(f"ablation blocks {best_third(results)}")
    rows = [cells("as reported (all blocks)", base, base, "")] if base else []
    for name, told in results.items():
        if name.startswith("ablation "):
            against = on_third if "layers" in told else base
            rows.append(cells(name.removeprefix("ablation "), told, against, f"`'{name}'`"))
    return table("change | KL, held out | KL, report slice | ratio | `--only`", rows)


def cells(name: str, told: Record, base: Record | None, only: str) -> list[str]:
    if "failure" in told:
        return [name, told["failure"], "", "", only]
    more = quotient(told["report_kl"], (base or {}).get("report_kl"))
    return [name, number(told["kl"]), number(told["report_kl"]), number(more), only]


if __name__ == "__main__":
    run_pieces(__doc__, pieces)
