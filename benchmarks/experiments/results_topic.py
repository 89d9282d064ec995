"""Topic-small's part of the results' page."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pieces import Results
from results_claims import Claim, affordable, against_paper, bounded, whole_seconds, yes
from results_rows import (
    BASELINES,
    ESTIMATORS,
    NOT_RUN,
    number,
    quotient,
    request_seconds,
    seconds,
    table,
    variant_setting,
    variant_title,
    with_interval,
)
from topic_small import (
    BAND_STEPS,
    DAMPINGS,
    OURS_ON_BAND,
    PAPER,
    PAPER_ON_BAND,
    STEPPED,
    best_band,
)
from tuning import chosen

STEPS_3 = ("steps 3", "steps 3 kfac")  # by one fit: TOFU-small's best, with either estimator
COMMAND = "python benchmarks/experiments/topic_small.py --data DIR"


def topic(results: Results) -> Iterator[str]:
    """The whole section."""
    yield "## Topic-small"
    yield from setting(results)
    yield "### The subject, its sisters, and the rest"
    yield from methods_table(results)
    yield "![KL on benign completions](images/topic_small_kl.svg)"
    yield "### Claims on Topic-small"
    lines = [f"| {claim} | {measured} | {holds} |" for claim, measured, holds in claims(results)]
    yield table("claim | measured | holds?", lines)
    yield "### Tuning on Topic-small"
    yield from tuning_table(results)


def setting(results: Results) -> Iterator[str]:
    sizes, base = results["settings"], results.get("base")
    yield (
        f"{sizes['model']} as it is shipped forgets astronomy: "
        f"{sizes['tune_questions'] + sizes['questions']} passages of an OpenStax book, each of "
        f"{sizes['tokens']} tokens from the first sentence that uses a term of its glossary. "
        f"Retained are {sizes['passages']} such passages of psychology and sociology and as many "
        f"paragraphs of WikiText; {sizes['held_out']} more of each kind are held out to steer and "
        "to choose by, and as many are looked at by nothing but the table. Questions (*Which term "
        "means ...?*, four terms of a chapter; the likeliest in all wins) on "
        f"{sizes['tune_questions']} of the terms choose settings; those on the other "
        f"{sizes['questions']} are in the table, with questions on terms of the sister subjects of "
        "which no passage is used, ARC's easy questions without those of the sky, and the KL on "
        f"completions that the base model wrote to {sizes['completions']} Alpaca instructions. "
        f"*Equal forgetting*: the mean probability of the right choice among the four is "
        f"{sizes['target']:g} (chance 0.25"
        + (f", the base model's {base['topic']['probability']:.2f}" if base else "")
        + "): each method's update is lengthened or shortened to that, on the tune questions where "
        "settings are chosen and on the subject's other questions for the table. One seed."
    )


@dataclass(frozen=True)
class Row:
    """A method at the setting that was chosen for it."""

    name: str
    """As its pieces begin: ``ekfac``, ``band 3-6``, ``rmu``."""
    title: str
    setting: str
    tuned: dict[str, Any]
    reported: dict[str, Any] | None
    """What was measured for the table; None where that was not run, or the target not reached."""
    failure: str

    @property
    def kl(self) -> dict[str, float] | None:
        """On benign completions, with its interval."""
        return self.reported["completions"]["kl_per_token"] if self.reported else None

    @property
    def value(self) -> float | None:
        return self.kl["value"] if self.kl else None

    @property
    def kept(self) -> float | None:
        """KL on retain text that nothing else looks at."""
        return self.reported["retain_kl"] if self.reported else None


def rows_of(results: Results) -> list[Row]:
    """All rows that were tuned."""

    def row(name: str, title: str, setting: str, piece: str) -> Row:
        tuned, told = results[f"tune {piece}"], results.get(f"report {piece}")
        failure = (told or tuned).get("failure", NOT_RUN)
        return Row(
            name, title, setting, tuned, None if "failure" in (told or {}) else told, failure
        )

    rows = []
    for name, title in {**ESTIMATORS, **BASELINES}.items():
        best = chosen(results, name)
        if best is not None:
            ours = name in ESTIMATORS
            setting = f"{'damping' if ours else 'learning rate'} {best:g}"
            rows.append(
                row(name, f"K-FADE, {title}" if ours else title, setting, f"{name} {best:g}")
            )
        rows += [
            row(*way, way[0]) for way in other_ways(results, name) if f"tune {way[0]}" in results
        ]
    return rows


def other_ways(results: Results, estimator: str) -> Iterator[tuple[str, str, str]]:
    """(row, title, setting) of K-FADE by that estimator in another way than one step on all."""
    if estimator == "ekfac":
        fixed = f"sampled labels, damping {PAPER:g} (absolute), one step on all blocks"
        yield "paper", "K-FADE, the paper's recipe", fixed
    for row, options in STEPPED.items():
        if options["estimator"] == estimator:
            setting = variant_setting(options, results.get(f"tune {row}", {}))
            yield row, variant_title(options), setting
    best = best_band(results)
    if estimator == "kfac" and best is not None:
        title, setting = f"K-FADE, K-FAC, blocks {best}", f"damping {chosen(results, 'kfac'):g}"
        ways = f"blocks {best}, {BAND_STEPS} steps, each with its fit"
        yield f"band {best}", title, setting
        yield OURS_ON_BAND, f"K-FADE, K-FAC, {ways}", setting
        fixed = f"sampled labels, damping {PAPER:g} (absolute)"
        yield PAPER_ON_BAND, f"K-FADE, the paper's recipe, {ways}", fixed


def methods_table(results: Results) -> Iterator[str]:
    lines = []
    if "base" in results:
        lines.append(f"| base model | | {accuracies(results['base'])} 0 | 0 | 0 | | `base` |")
    for row in rows_of(results):
        cells = accuracies(row.reported) if row.reported else f"{row.failure} | | |"
        held_out = number(row.reported["kl"]) if row.reported else NOT_RUN
        kl = with_interval(row.kl) if row.kl else ""
        only = f"`'tune {row.name}*' 'report {row.name}*'`"
        lines.append(
            f"| {row.title} | {row.setting} | {cells} {held_out} | "
            f"{number(row.kept) if row.reported else ''} | {kl} | "
            f"{seconds(request_seconds(row.tuned))} | {only} |"
        )
    yield table(
        "method | setting | astronomy, % | sisters, % | general, % | KL, held out | "
        "KL, other retain text | KL, Alpaca (95 %) | seconds | `--only`",
        lines,
    )
    yield (
        "Accuracies ± standard error; KLs in nats per token, intervals by resampling completions. "
        "Seconds: a run, or gradient, solve and search, without the fit. Command of a row:"
    )
    yield f"    {COMMAND} --only PIECES"


def specificity(results: Results) -> dict[str, dict[str, float]]:
    """KL on benign completions, with its interval, of each row that was measured, by its title."""
    return {row.title: row.kl for row in rows_of(results) if row.kl}


def accuracies(told: dict[str, Any]) -> str:
    return "".join(
        f"{100 * told[name]['accuracy']:.0f} ± {100 * told[name]['standard_error']:.0f} | "
        for name in ("topic", "sisters", "general")
    ).rstrip()


def claims(results: Results) -> Iterator[Claim]:
    """All claims, of rows that were measured."""
    by = {row.name: row for row in rows_of(results) if row.reported}
    yield from specificity_claims(results, by)
    for name, bound in (("diagonal", 5.0), ("identity", 20.0)):
        claim = f"{name} needs at least {bound:g} × K-FAC's KL"
        yield bounded(claim, value_ratio(by.get(name), by.get("kfac")), least=bound)
    yield from paper_claims(results, by)


def specificity_claims(results: Results, by: Mapping[str, Row]) -> Iterator[Claim]:
    """Of K-FADE's row and the best baseline's."""
    on_band = (f"band {best_band(results)}", OURS_ON_BAND)
    ours = least_tuned(by, (*estimators(), *on_band))
    others = [row for name, row in by.items() if name in BASELINES]
    rival = min(others, key=lambda row: row.value or math.inf, default=None)
    claim = "KL on Alpaca below every baseline's, the intervals apart"
    if ours and ours.kl and rival and rival.kl:
        apart = ours.kl["high"] < rival.kl["low"]
        measured = f"{ours.kl['value'] / rival.kl['value']:.3g} × {rival.title}'s"
        yield f"{ours.title}: {claim}", measured, yes(apart)
        yield kept_claim(others, ours)
    else:
        yield claim, NOT_RUN, ""


def paper_claims(results: Results, by: Mapping[str, Row]) -> Iterator[Claim]:
    """Half the KL of the paper's recipe, in one step on all blocks and in several on a band."""
    paper = by.get("paper")
    spent = whole_of(results, paper, "ekfac")
    costs = {
        name: quotient(whole_of(results, by[name], estimator), spent)
        for name, estimator in estimators().items()
        if name in by
    }
    cheap = affordable(costs)
    stepped = [name for name in cheap if name in STEPS_3]
    rules = {"": cheap, "the way that TOFU-small chooses: ": stepped}
    for rule, names in rules.items():
        best = least_tuned(by, names)
        claim = against_paper(best.title, costs[best.name]) if best else against_paper()
        yield from half_claims(f"{rule}{claim}", best, paper)
    ours, paper = by.get(OURS_ON_BAND), by.get(PAPER_ON_BAND)
    cost = quotient(whole_of(results, ours, "kfac"), whole_of(results, paper, "ekfac"))
    claim = "the same on one band, in several steps with refits"
    if ours and cost:
        claim = f"{ours.title}, at {cost:.2g} × the cost of the paper's recipe done likewise"
    yield from half_claims(claim, ours, paper)


def half_claims(claim: str, ours: Row | None, paper: Row | None) -> Iterator[Claim]:
    """At most half of that row's KL, on both texts."""
    most = "at most 0.5 × its"
    yield bounded(f"{claim}: KL on Alpaca {most}", value_ratio(ours, paper), most=0.5)
    kept = quotient(*(row.kept if row else None for row in (ours, paper)))
    yield bounded(f"that: KL on other retain text {most}", kept, most=0.5)


def estimators() -> dict[str, str]:
    """The estimator of each row of ours on all blocks."""
    stepped = {name: options["estimator"] for name, options in STEPPED.items()}
    return {**stepped, "ekfac": "ekfac", "kfac": "kfac"}


def least_tuned(by: Mapping[str, Row], names: Iterable[str]) -> Row | None:
    """Of those the row of the lowest KL held out on the tune questions, which no claim is of."""
    measured = [by[name] for name in names if name in by]
    return min(measured, key=lambda row: row.tuned["kl"], default=None)


def value_ratio(one: Row | None, other: Row | None) -> float | None:
    return quotient(*(row.value if row else None for row in (one, other)))


def whole_of(results: Results, row: Row | None, estimator: str) -> float | None:
    """Seconds of a request and of the fit on all blocks."""
    if row is None:
        return None
    return whole_seconds(results, row.name, request_seconds(row.tuned), estimator)


def kept_claim(others: Sequence[Row], ours: Row) -> Claim:
    """That no baseline answers more of the other questions, beyond what the sample may do."""
    more, leads = [], []
    for row in others:
        for kind in ("sisters", "general"):
            pair = [own.reported[kind]["correct"] for own in (row, ours) if own.reported]
            lead, half = paired(*pair)
            leads.append((lead - half, f"{row.title}, {kind}: {lead:+.0f} ± {half:.0f} %"))
            if lead > half:
                more.append(leads[-1][1])
    claim = "no baseline keeps more of the sisters or of general knowledge (paired, 95 %)"
    return claim, "; ".join(more) or f"at most {max(leads)[1]}", yes(not more)


def paired(one: str, other: str) -> tuple[float, float]:
    """Lead of ``one`` over ``other`` in right answers to the same questions, in per cent, and half
    of its 95 % interval: 1.96 standard errors of the mean difference."""
    differences = [int(a) - int(b) for a, b in zip(one, other, strict=True)]
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return 100 * statistics.fmean(differences), 196 * error


def tuning_table(results: Results) -> Iterator[str]:
    lines, singles = [], (*STEPPED, "paper", OURS_ON_BAND, PAPER_ON_BAND)
    for name, told in results.items():
        if name.startswith("tune "):
            row, _, value = name.removeprefix("tune ").rpartition(" ")
            if name.removeprefix("tune ") in singles:
                row, value, best = name.removeprefix("tune "), "", None
            else:
                best = best_band(results) if row == "band" else f"{chosen(results, row):g}"
            mark = "chosen" if value and value == best else ""
            reached = told.get("failure") or number(told["kl"])
            lines.append(f"| {row} | {value} | {reached} | {mark} | `'{name}'` |")
    yield (
        "KL on held-out retain text at the target; the lowest is chosen. Of K-FADE's steps the "
        f"value is the damping ({', '.join(f'{d:g}' for d in DAMPINGS)}) or the band of blocks, of "
        "a baseline the learning rate. Several steps go as far as the one step before them went, "
        "then to the target."
    )
    yield table("method | value | KL | | `--only`", lines)
