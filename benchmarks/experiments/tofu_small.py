"""TOFU-small: a model learns invented authors and unlearns some, by K-FADE and by baselines.

    python benchmarks/experiments/tofu_small.py --data DIR [--model FOLDER] [--only 'tune gd*']

A *full* model is fine-tuned on all authors, a *retrained* one on all but those to forget. Every
method starts from the full model and sees the same retain questions. Methods are compared at equal
forgetting: where the mean probability of the forgotten answers is the retrained model's. Settings
are chosen on other authors (*tuning*) than those that are reported. The target there is the
probability of answers about two authors that no model was trained on.

Each result is added to ``benchmarks/results/tofu_small.jsonl`` when it is done and is not computed
again, so a run may be stopped at any time. ``--list`` names the pieces. ``tofu_ablations.py`` and
``tofu_attacks.py`` need the rows of this script. ``make results`` draws the page.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from lab.pieces import Piece, Results
from lab.tuning import DEFAULT_FIT, OWN_DAMPING, VARIANTS, chosen, lowest, rates
from tofu_lab import TofuLab, run_pieces, start_rate

ESTIMATORS = ("ekfac", "kfac", "diagonal", "identity")
BASELINES = (
    *("gd", "npo", "simnpo", "rmu", "kl-min", "ga", "soul"),
    *("repselect", "npo-sam", "undial", "wga", "satimp"),
)
DAMPINGS = (0.1, 0.01, 0.001)  # times the mean eigenvalue
MOST_RATES = 4  # learning rates tried for a baseline: one more than dampings for K-FADE
PAPER_DAMPING = 1e-8  # the paper's on TOFU: absolute, with sampled labels
LENGTHS = (1.25, 1.5, 2.0, 3.0)  # multiples of an update among which the best is chosen


def pieces(lab: TofuLab, results: Results) -> Iterator[Piece]:
    """All pieces. Each part reads from the results so far what was chosen."""
    yield "full", partial(lab.train_once, "full")
    yield "retrained", partial(lab.train_once, "retrained")
    yield "targets", lab.measure_targets
    for fit in ("kfac", "ekfac", "diagonal", "identity", "kfac sampled", "ekfac sampled"):
        yield f"fit {fit}", partial(lab.fit, fit)
    yield from tuned(lab)
    yield from single_steps(lab, results)
    yield from variants(lab, results)
    for name in BASELINES:
        yield from baseline(lab, results, name)
    rows = reported_rows(results)
    yield from judged(lab, results, ["retrained", "full"], 1.0)
    for factor in (1.0, *LENGTHS):
        yield from judged(lab, results, rows, factor)
    for row in ("retrained", *rows):
        if lab.has(row):
            yield f"by question {row}", partial(lab.by_question, row)
    for row in ("full", "retrained", *rows):
        if lab.has(row):
            yield f"by token {row}", partial(lab.by_token, row)
    if {"by token full", "by token retrained"} <= set(results):
        for row in filter(lab.has, rows):
            yield f"by memorisation {row}", partial(lab.by_memorisation, row)


def plain_pieces(lab: TofuLab, results: Results) -> Iterator[Piece]:
    """All but those about TOFU's own questions, for settings like this one."""
    return (piece for piece in pieces(lab, results) if not piece[0].startswith("tofu "))


def tuned(lab: TofuLab) -> Iterator[Piece]:
    """K-FADE's single step on the tuning authors, by damping."""
    grid = {"ekfac margin": DAMPINGS, "kfac margin": DAMPINGS, "diagonal margin": DAMPINGS}
    for row, dampings in {**grid, "ekfac ce": DAMPINGS[:1]}.items():
        fit, objective = row.split()
        for damping in dampings:
            yield (
                f"tune {row} {damping:g}",
                partial(lab.one_step, "tuning", fit, damping, objective=objective, like=row),
            )


def single_steps(lab: TofuLab, results: Results) -> Iterator[Piece]:
    """K-FADE's single step on the report authors, by each estimator and objective."""
    for objective in ("margin", "ce"):
        for fit in ESTIMATORS:
            like = f"{fit} {objective}"
            row = named(results, like)
            if row is not None:
                damping = best_damping(results, fit)
                step = partial(lab.one_step, "report", fit, damping, objective=objective)
                yield f"report {row}", partial(step, like=like, keep=row)


def variants(lab: TofuLab, results: Results) -> Iterator[Piece]:
    """The paper's own recipe, the default, and what may improve the single step at its damping."""
    paper = partial(lab.one_step, "report", "ekfac sampled", PAPER_DAMPING, relative=False)
    yield "report paper", partial(paper, like="ekfac margin", keep="paper")
    damping = chosen(results, "ekfac margin")
    for row, options in VARIANTS.items():
        fit, given = (DEFAULT_FIT, None) if row in OWN_DAMPING else ("ekfac", damping)
        if row in OWN_DAMPING or damping is not None:
            yield f"report {row}", partial(lab.several_steps, fit, given, row, **options)
    if damping is not None:
        yield "report part", partial(lab.cheap_request, damping)


def baseline(lab: TofuLab, results: Results, name: str) -> Iterator[Piece]:
    """A baseline, tuned over learning rates and reported at the best one."""
    for rate in rates(results, name, start_rate(name), MOST_RATES):
        yield f"tune {name} {rate:g}", partial(lab.baseline, name, rate, "tuning")
    row, best = named(results, name), chosen(results, name)
    if row is not None and best is not None:
        yield f"report {row}", partial(lab.baseline, name, best, "report", row)


def judged(lab: TofuLab, results: Results, rows: list[str], factor: float) -> Iterator[Piece]:
    """TOFU's figures; at other lengths than its own only if the row reached the target."""
    for row in rows:
        if lab.has(row) and (factor == 1 or "failure" not in results.get(f"report {row}", {})):
            yield f"tofu {row} x{factor:g}", partial(lab.tofu, row, factor)


def best_damping(results: Results, fit: str) -> float | None:
    """The damping that was chosen for the margin; identity's direction does not depend on it."""
    return 0.0 if fit == "identity" else chosen(results, f"{fit} margin")


def named(results: Results, method: str) -> str | None:
    """A method with the setting that was chosen for it, as its pieces are called."""
    fit = method.split()[0]
    setting = best_damping(results, fit) if fit in ESTIMATORS else chosen(results, method)
    return f"{method} {setting:g}" if setting is not None else None


def reported_rows(results: Results) -> list[str]:
    """The rows that may have been reported, as their pieces are called."""
    steps = [f"{fit} {objective}" for objective in ("margin", "ce") for fit in ESTIMATORS]
    single, trained = ([named(results, m) for m in methods] for methods in (steps, BASELINES))
    return [row for row in (*single, "paper", *VARIANTS, *trained) if row is not None]


def best_baseline(results: Results) -> str | None:
    """The reported baseline of the lowest held-out KL, as its pieces are called."""
    names = [named(results, name) for name in BASELINES]
    return lowest((n, results[f"report {n}"]) for n in names if f"report {n}" in results)


if __name__ == "__main__":
    run_pieces(__doc__, pieces)
