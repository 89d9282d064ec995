"""TOFU-small over several seeds: each is another full model, another retrained one, another run.

A seed's results are in ``tofu_small_seedN.jsonl``; those of seed 0, where settings were chosen, in
``tofu_small.jsonl``. The baseline that is the best at seed 0 has to be there in all. A claim on KL
holds if it holds in every seed with its whole interval.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from lab.intervals import interval
from lab.pieces import Results
from lab.records import NOT_RUN, number, table
from lab.rows import (
    BASELINES,
    MOST_OF_PAPER,
    Claim,
    Row,
    Share,
    share_claim,
    with_interval,
    yes,
)
from lab.tuning import DEFAULT, OWN_DAMPING
from tofu_rows import (
    MOST,
    SLICES,
    figures_of,
    log_of_retrained,
    logs_of,
    measured,
    rival_of,
    rows_of,
)

from kfade.evaluate.tofu_logs import aggregate, choose_row

GOOD, RIVAL_GOOD = 0.8, 0.5  # forget quality; a baseline below the second is no rival in utility
KL_HEADS = " | ".join(f"KL, {title} | the default's share" for title in SLICES.values())


def seeds_table(seeds: Mapping[int, Results]) -> str:
    """The rows of the default; of the run without its bound, of the paper's recipe and of a
    baseline, where it was run in more than one seed."""
    rows = {seed: rows_of(results) for seed, results in seeds.items()}
    lines: dict[str, list[list[str]]] = {}
    for seed, results in seeds.items():
        for row in rows[seed]:
            kls = kl_cells(results, rows[seed], row)
            if row.method not in (*OWN_DAMPING, "paper", *BASELINES) or not kls:
                continue
            quality, utility = figures_of(results, row).get("×1", (None, None))
            cells = [row.title, str(seed), number(quality), number(utility), *kls]
            lines.setdefault(row.method, []).append(cells)
    least = min(len(seeds), 2)
    shown = [
        line
        for method, own in lines.items()
        if len(own) >= least or method == DEFAULT
        for line in own
    ]
    heads = f"method | seed | forget quality | utility | {KL_HEADS}"
    return table(heads, [*retrained_again(seeds), *shown])


def retrained_again(seeds: Mapping[int, Results]) -> Iterator[list[str]]:
    """Lines of the forget quality that retraining itself has: in each seed the retrained model of
    the next one, judged as if it had unlearned."""
    logs = {seed: log_of_retrained(results) for seed, results in seeds.items()}
    made = {seed: log for seed, log in logs.items() if log is not None}
    if len(made) < 2:
        return
    order = [*made]
    for seed, other in zip(order, [*order[1:], order[0]], strict=True):
        told = aggregate(made[other], made[seed])
        quality, utility = number(told["forget_quality"]), number(told["model_utility"])
        title = f"retrained with seed {other}"
        yield [title, str(seed), quality, utility, *[""] * 2 * len(SLICES)]


def kl_cells(results: Results, rows: Sequence[Row], row: Row) -> list[str]:
    """Under ``KL_HEADS``: a row's KL on each slice, and the default's as a share of it; empty if it
    was not measured."""
    cells = []
    for name in SLICES:
        own = measured(results, [row], name).get(row.method)
        if own is None:
            return []
        share = share_of(results, rows, name, row.method) if row.method != DEFAULT else None
        cells += [with_interval(interval(own)), with_interval(share) if share else ""]
    return cells


def seed_claims(seeds: Mapping[int, Results]) -> Iterator[Claim]:
    """What the default has to reach in every seed."""
    yield from kl_claims(seeds)
    yield quality_claim(seeds)


def kl_claims(seeds: Mapping[int, Results]) -> Iterator[Claim]:
    """Bounds on the default's KL as a share of the best baseline's and of the paper's recipe, in
    the seeds in which the default was run."""
    run = {
        seed: own
        for seed, own in seeds.items()
        if measured(own, rows_of(own), "report").get(DEFAULT)
    }
    first, seeds = seeds[0], run or seeds
    count = f"{len(seeds)} seeds" if len(seeds) > 1 else f"seed {min(seeds)}"
    for name, title in SLICES.items():
        rival = rival_of(measured(first, rows_of(first), name))
        named = f"{BASELINES[rival]}, the best at seed 0" if rival else "the best baseline"
        for other, method, most in (
            (named, rival, MOST[name]),
            ("the paper's recipe", "paper", MOST_OF_PAPER),
        ):
            shares = [share_of(own, rows_of(own), name, method) for own in seeds.values()]
            claim = f"{title}: KL at most {most:g} × that of {other} ({count})"
            yield share_claim(claim, shares, most)


def share_of(results: Results, rows: Sequence[Row], name: str, method: str | None) -> Share | None:
    """The default's share of a method's KL on that slice; None if either was not measured."""
    told = measured(results, rows, name)
    if method not in told or DEFAULT not in told:
        return None
    return interval(told[DEFAULT], told[method])


def quality_claim(seeds: Mapping[int, Results]) -> Claim:
    """Forget quality and utility by the honest rule, in most of the seeds."""
    claim = (
        f"forget quality ≥ {GOOD:g} (honest rule) at a utility no lower than that of any baseline "
        f"with a forget quality ≥ {RIVAL_GOOD:g}, in two of three seeds"
    )
    rival = rival_of(measured(seeds[0], rows_of(seeds[0]), "report"))
    held, said = [], []
    for results in seeds.values():
        retrained, rows = log_of_retrained(results), rows_of(results)
        logs = {row.method: logs_of(results, row) for row in rows}
        if retrained is None or not (logs.get(DEFAULT) and logs.get(rival or "")):
            return [claim, NOT_RUN, ""]
        found = {m: choose_row(own, retrained) for m, own in logs.items() if own}
        ours = found[DEFAULT]
        utilities = [
            one.held_out_utility
            for method, one in found.items()
            if method in BASELINES and one.held_out_forget_quality >= RIVAL_GOOD
        ]
        quality, utility = ours.held_out_forget_quality, ours.held_out_utility
        held.append(quality >= GOOD and utility >= max(utilities, default=0.0))
        beside = f", baselines' {max(utilities):.3f}" if utilities else ""
        said.append(f"{quality:.2g} at {utility:.3f}{beside}")
    return [claim, "; ".join(said), yes(3 * sum(held) >= 2 * len(held))]
