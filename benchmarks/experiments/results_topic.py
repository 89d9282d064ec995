"""Topic-small's part of the results' page."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping
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
)
from topic_small import BAND_STEPS, DAMPINGS, PAPER, STEPPED, best_band
from tuning import chosen

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


def rows(results: Results) -> Iterator[tuple[str, str, str, dict[str, Any], dict[str, Any] | None]]:
    """(method, title, setting, tuned, reported) of those that were tuned."""
    for name, title in {**ESTIMATORS, **BASELINES}.items():
        best = chosen(results, name)
        if best is not None:
            row, ours = f"{name} {best:g}", name in ESTIMATORS
            title = f"K-FADE, {title}" if ours else title
            yield (
                name,
                title,
                f"{'damping' if ours else 'learning rate'} {best:g}",
                results[f"tune {row}"],
                results.get(f"report {row}"),
            )
        for row, title, setting in other_ways(results, name):
            if f"tune {row}" in results:
                yield row, title, setting, results[f"tune {row}"], results.get(f"report {row}")


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
        title, damping = f"K-FADE, K-FAC, blocks {best}", chosen(results, "kfac")
        yield f"band {best}", title, f"damping {damping:g}"
        row = f"steps {BAND_STEPS} band"
        yield row, f"{title}, {BAND_STEPS} steps, each with its fit", f"damping {damping:g}"


def methods_table(results: Results) -> Iterator[str]:
    lines = []
    if "base" in results:
        lines.append(f"| base model | | {accuracies(results['base'])} 0 | 0 | 0 | | `base` |")
    for name, title, given, tuned, told in rows(results):
        failure = (told or tuned).get("failure", NOT_RUN)
        told = told if told and "failure" not in told else None
        cells = accuracies(told) if told else f"{failure} | | |"
        kl = interval(told["completions"]["kl_per_token"]) if told else ""
        kept = number(told["retain_kl"]) if told else ""
        only = f"`'tune {name}*' 'report {name}*'`"
        lines.append(
            f"| {title} | {given} | {cells} {number((told or {}).get('kl'))} | {kept} | {kl} | "
            f"{seconds(request_seconds(tuned))} | {only} |"
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
    return {
        title: told["completions"]["kl_per_token"]
        for _, title, _, _, told in rows(results)
        if told and "failure" not in told
    }


def accuracies(told: dict[str, Any]) -> str:
    return "".join(
        f"{100 * told[name]['accuracy']:.0f} ± {100 * told[name]['standard_error']:.0f} | "
        for name in ("topic", "sisters", "general")
    ).rstrip()


def interval(figure: dict[str, float]) -> str:
    return f"{figure['value']:.3g} ({figure['low']:.3g} to {figure['high']:.3g})"


def claims(results: Results) -> Iterator[Claim]:
    """K-FADE is the row of the lowest KL held out on the tune questions, which no claim is of."""
    found = {name: told for name, _, _, _, told in rows(results) if told and "failure" not in told}
    titles = {name: title for name, title, _, _, _ in rows(results)}
    tuned = {name: told for name, _, _, told, _ in rows(results)}
    kls = {name: told["completions"]["kl_per_token"] for name, told in found.items()}
    estimators = {name: options["estimator"] for name, options in STEPPED.items()}
    estimators |= {"ekfac": "ekfac", "kfac": "kfac"}

    def least(names: Iterable[str]) -> str | None:
        return min(names, key=lambda name: tuned[name]["kl"], default=None)

    banded = (f"band {best_band(results)}", f"steps {BAND_STEPS} band")
    ours = least(name for name in (*estimators, *banded) if name in kls)
    others = {name: kl for name, kl in kls.items() if name in BASELINES}
    rival = min(others, key=lambda name: others[name]["value"], default=None)
    claim = "KL on Alpaca below every baseline's, the intervals apart"
    if ours and rival:
        ratio = quotient(kls[ours]["value"], others[rival]["value"])
        apart = kls[ours]["high"] < others[rival]["low"]
        yield f"{titles[ours]}: {claim}", f"{ratio:.3g} × {titles[rival]}'s", yes(apart)
        yield kept_claim({name: found[name] for name in others}, found[ours], titles)
    else:
        yield claim, NOT_RUN, ""

    def ratio_of(one: str | None, other: str) -> float | None:
        values = [kls[name]["value"] if name in kls else None for name in (one, other)]
        return quotient(*values)

    for name, bound in (("diagonal", 5.0), ("identity", 20.0)):
        claim = f"{name} needs at least {bound:g} × K-FAC's KL"
        yield bounded(claim, ratio_of(name, "kfac"), least=bound)
    paper = whole_of(results, "paper", tuned, "ekfac")
    # On all blocks, as the paper's recipe was run here: a band and refits are its own, too.
    costs = {
        name: quotient(whole_of(results, name, tuned, estimator), paper)
        for name, estimator in estimators.items()
        if name in kls
    }
    best = least(affordable(costs))
    claim = against_paper(titles[best], costs[best]) if best else against_paper()
    kept = {name: told["retain_kl"] for name, told in found.items()}
    yield bounded(f"{claim}: KL on Alpaca at most 0.5 × its", ratio_of(best, "paper"), most=0.5)
    claim = "that: KL on other retain text at most 0.5 × its"
    yield bounded(claim, quotient(kept.get(best), kept.get("paper")), most=0.5)


def whole_of(
    results: Results, name: str, tuned: Mapping[str, dict[str, Any]], estimator: str
) -> float | None:
    """Seconds of a request and of the fit on all blocks."""
    told = tuned.get(name)
    return whole_seconds(results, name, request_seconds(told), estimator) if told else None


def kept_claim(
    others: Mapping[str, dict[str, Any]], ours: dict[str, Any], titles: Mapping[str, str]
) -> Claim:
    """That no baseline answers more of the other questions, beyond what the sample may do."""
    more, leads = [], []
    for name, told in others.items():
        for kind in ("sisters", "general"):
            lead, half = paired(told[kind]["correct"], ours[kind]["correct"])
            leads.append((lead - half, f"{titles[name]}, {kind}: {lead:+.0f} ± {half:.0f} %"))
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
    lines, singles = [], (*STEPPED, "paper", f"steps {BAND_STEPS} band")
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
