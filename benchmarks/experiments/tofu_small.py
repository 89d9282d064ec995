"""TOFU-small: a model learns invented authors, some are unlearned, by K-FADE and by baselines.

    python benchmarks/experiments/tofu_small.py --data DIR [--model FOLDER] [--only 'tune gd*']

A *full* model is fine-tuned on all authors, a *retrained* one without those to forget. Every method
starts from the full model, sees the same retain questions, and is compared at equal forgetting:
where the mean probability of the forgotten answers is the retrained model's. Settings are chosen
on other authors (*tuning*) than those that are reported. The target there is the probability of
answers about two authors that nobody was trained on.

Results go to ``benchmarks/results/tofu_small.json`` piece by piece, in order of importance; a piece
that is there is not computed again, and the run may be stopped at any time. ``--list`` names the
pieces. ``results_page.py`` makes ``docs/results.md`` of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from pieces import Piece, Results, opened, options_of, run
from tofu_small_ablations import ablations
from tofu_small_attacks import CONTROLS, attacked
from tofu_small_baselines import start_rate
from tofu_small_data import Data, Models, Sizes
from tofu_small_lab import Lab
from tuning import VARIANTS, chosen, lowest, rates

RESULTS = Path(__file__).parents[1] / "results" / "tofu_small.json"
BASELINES = ("gd", "npo", "simnpo", "rmu", "kl-min", "ga")
LAST_BASELINES = ("soul",)
DAMPINGS = (0.1, 0.01, 0.001)  # times the mean eigenvalue
MOST_RATES = 4  # runs that a baseline is tuned by, at most: one more than K-FADE has dampings
PAPER = 1e-8  # the paper's damping on TOFU, absolute, with sampled labels
LENGTHS = (1.25, 1.5, 2.0, 3.0)  # updates at other lengths, so that a row can be chosen among them


def pieces(lab: Lab, results: Results) -> Iterator[Piece]:
    """All pieces, the most important first; what was chosen is read from the results so far."""
    yield "full", lambda: lab.models.train("full")
    yield "retrained", lambda: lab.models.train("retrained")
    yield "targets", lab.targets_piece
    for name in ("kfac", "ekfac"):
        yield f"fit {name}", lambda name=name: lab.fit(name)
    yield from tuned_kfade(lab, "ekfac", DAMPINGS)
    yield from reported_kfade(lab, results, "ekfac", "margin")
    for name in BASELINES[:2]:
        yield from compared(lab, results, name)
    yield "tofu retrained x1", lambda: lab.tofu("retrained")
    yield from bettered(lab, results)
    for factor in (1.0, LENGTHS[0]):
        yield from judged(lab, results, "ekfac margin", factor)
    for name in BASELINES[:2]:
        yield from judged(lab, results, name)
    for name in ("diagonal", "identity"):
        yield f"fit {name}", lambda name=name: lab.fit(name)
    for name in ("kfac", "diagonal"):
        yield from tuned_kfade(lab, name, DAMPINGS)
    for name in ("kfac", "diagonal", "identity"):
        yield from reported_kfade(lab, results, name, "margin")
    yield from tuned_kfade(lab, "ekfac", DAMPINGS[:1], "ce")
    for name in ("ekfac", "kfac"):
        yield from reported_kfade(lab, results, name, "ce")
    for name in BASELINES[2:]:
        yield from compared(lab, results, name)
        yield from judged(lab, results, name)
    yield from spread(lab, results)
    yield "tofu full x1", lambda: lab.tofu("full")
    for factor in LENGTHS:
        for row in ("ekfac margin", *BASELINES):
            yield from judged(lab, results, row, factor)
    yield from relearned(lab, results)
    yield from ablations(lab, results)
    for row in ("ekfac margin", "kfac margin", "diagonal margin", "identity margin", "ekfac ce"):
        yield from drawn(lab, results, row)
    for row in ("kfac margin", "ekfac ce", "diagonal margin", "identity margin"):
        yield from judged(lab, results, row)
    for name in LAST_BASELINES:
        yield from compared(lab, results, name)
        yield from judged(lab, results, name)
    for name in ("diagonal", "identity"):
        yield from reported_kfade(lab, results, name, "ce")


def tuned_kfade(
    lab: Lab, estimator: str, dampings: tuple[float, ...], objective: str = "margin"
) -> Iterator[Piece]:
    like = f"{estimator} {objective}"
    for damping in dampings:
        yield (
            f"tune {like} {damping:g}",
            lambda d=damping: lab.search(
                "tuning", lab.curvature(estimator), objective, d, like=like
            ),
        )


def best_damping(results: Results, estimator: str) -> float | None:
    """Chosen for the margin; identity's direction does not depend on it."""
    return 0.0 if estimator == "identity" else chosen(results, f"{estimator} margin")


def reported_kfade(lab: Lab, results: Results, estimator: str, objective: str) -> Iterator[Piece]:
    like = f"{estimator} {objective}"
    damping = best_damping(results, estimator)
    if damping is not None:
        row = f"{like} {damping:g}"
        yield (
            f"report {row}",
            lambda: lab.search(
                "report", lab.curvature(estimator), objective, damping, like=like, keep=row
            ),
        )


def compared(lab: Lab, results: Results, name: str) -> Iterator[Piece]:
    """A baseline: tuned over learning rates, then reported at the best."""
    for rate in rates(results, name, start_rate(name), MOST_RATES):
        yield f"tune {name} {rate:g}", lambda r=rate: lab.baseline(name, r, "tuning", None)
    best = chosen(results, name)
    if best is not None:
        row = f"{name} {best:g}"
        yield f"report {row}", lambda: lab.baseline(name, best, "report", row)


def named(results: Results, row: str) -> str | None:
    """A method with the setting that was chosen for it, as its pieces are called."""
    words = row.split()
    setting = best_damping(results, words[0]) if len(words) == 2 else chosen(results, row)
    return f"{row} {setting:g}" if setting is not None else None


def judged(lab: Lab, results: Results, row: str, factor: float = 1.0) -> Iterator[Piece]:
    """TOFU's figures of a reported row."""
    name = named(results, row)
    told = results.get(f"report {name}", {"failure": "not run"})
    if name is not None and lab.has(name) and (factor == 1 or "failure" not in told):
        yield f"tofu {name} x{factor:g}", lambda: lab.tofu(name, factor)


def drawn(lab: Lab, results: Results, row: str) -> Iterator[Piece]:
    """More points for a figure."""
    name = named(results, row)
    if name is not None and lab.has(name):
        yield f"curve {name}", lambda: lab.curve(name)


def bettered(lab: Lab, results: Results) -> Iterator[Piece]:
    """The paper's own recipe, and what may beat it at the damping that was chosen: several steps
    by one fit; the exact Gauss-Newton system by conjugate gradients, EK-FAC as the
    preconditioner."""
    damping = chosen(results, "ekfac margin")
    if damping is None:
        return
    for name in ("kfac sampled", "ekfac sampled"):
        yield f"fit {name}", lambda name=name: lab.fit(name)
    yield (
        "report paper",
        lambda: lab.search(
            *("report", lab.curvature("ekfac sampled"), "margin", PAPER),
            relative=False,
            like="ekfac margin",
            keep="paper",
        ),
    )
    yield "report part", lambda: lab.economical(damping)
    for row, options in VARIANTS.items():
        yield (
            f"report {row}",
            lambda row=row, o=options: lab.unlearn(lab.curvature("ekfac"), damping, row, **o),
        )
    for factor in (1.0, *LENGTHS):
        for row in VARIANTS:
            if lab.has(row):
                yield f"tofu {row} x{factor:g}", lambda row=row, f=factor: lab.tofu(row, f)


def best_baseline(results: Results) -> str | None:
    """Of those that were reported the one of the lowest held-out KL, as its pieces are called."""
    names = [named(results, row) for row in (*BASELINES, *LAST_BASELINES)]
    return lowest((n, results[f"report {n}"]) for n in names if f"report {n}" in results)


def spread(lab: Lab, results: Results) -> Iterator[Piece]:
    """How the KL lies on questions: a few may make most of a mean."""
    reported = [named(results, row) for row in ("ekfac margin", *BASELINES, *LAST_BASELINES)]
    for row in ("retrained", "paper", *VARIANTS, *reported):
        if row is not None and lab.has(row):
            yield f"by question {row}", lambda row=row: lab.by_question(row)


def relearned(lab: Lab, results: Results) -> Iterator[Piece]:
    """Attacks by fine-tuning on K-FADE, on the best baseline, and on a model without an update."""
    for kind, control in CONTROLS.items():
        for row in (named(results, "ekfac margin"), best_baseline(results), control):
            if row is not None and lab.has(row):
                yield f"attack {row} {kind}", lambda r=row, k=kind: attacked(lab, r, k)


def main() -> None:
    options = options_of(__doc__, RESULTS)
    default = Sizes()
    for name, value in asdict(default).items():
        if name != "model":
            options.add_argument(f"--{name}", type=type(value), default=value)
    arguments = options.parse_args()
    given = {name: getattr(arguments, name) for name in asdict(default) if name != "model"}
    sizes = replace(default, model=Path(arguments.model).name, **given)
    results = opened(arguments.results, asdict(sizes))
    data = Data(arguments.data, sizes)
    trained = (sizes.authors, sizes.questions, sizes.rate, sizes.epochs, sizes.seed)
    name = f"tofu-small-{sizes.model}-{'-'.join(f'{x:g}' for x in trained)}"
    cache = arguments.cache / name
    models = Models(data, sizes, arguments.model, cache)
    run(pieces(Lab(data, models, sizes, cache, results), results), results, arguments)


if __name__ == "__main__":
    main()
