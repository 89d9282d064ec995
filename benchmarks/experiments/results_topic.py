"""Topic-small's part of the results' page."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
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
from topic_small import DAMPINGS, PAPER, STEPPED
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
        if name == "ekfac":
            if "tune paper" in results:
                fixed = f"sampled labels, damping {PAPER:g} (absolute)"
                told = results["tune paper"]
                title = "K-FADE, the paper's recipe"
                yield "paper", title, fixed, told, results.get("report paper")
            for row, options in STEPPED.items():
                if f"tune {row}" in results:
                    told = results[f"tune {row}"]
                    setting = variant_setting(options, told)
                    yield row, variant_title(options), setting, told, results.get(f"report {row}")


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
    found = {name: told for name, _, _, _, told in rows(results) if told and "failure" not in told}
    titles = {name: title for name, title, _, _, _ in rows(results)}
    kls = {name: told["completions"]["kl_per_token"] for name, told in found.items()}
    ours = kls.get("ekfac")
    others = {name: kl for name, kl in kls.items() if name in BASELINES}
    rival = min(others, key=lambda name: others[name]["value"], default=None)
    claim = "KL on Alpaca below every baseline's, the intervals apart"
    if ours and rival:
        ratio = quotient(ours["value"], others[rival]["value"])
        apart = ours["high"] < others[rival]["low"]
        yield claim, f"{ratio:.3g} × {titles[rival]}'s", yes(apart)
        yield kept_claim({name: found[name] for name in others}, found["ekfac"], titles)
    else:
        yield claim, NOT_RUN, ""

    def ratio_of(one: str | None, other: str) -> float | None:
        values = [kls[name]["value"] if name in kls else None for name in (one, other)]
        return quotient(*values)

    for name, least in (("diagonal", 5.0), ("identity", 20.0)):
        claim = f"{name} needs at least {least:g} × K-FAC's KL"
        yield bounded(claim, ratio_of(name, "kfac"), least=least)
    tuned = {name: told for name, _, _, told, _ in rows(results)}
    estimators = {name: options["estimator"] for name, options in STEPPED.items()}
    estimators |= {"paper": "ekfac", "ekfac": "ekfac", "kfac": "kfac"}
    whole = {
        name: whole_seconds(results, name, request_seconds(tuned[name]), estimator)
        for name, estimator in estimators.items()
        if name in kls
    }
    costs = {name: quotient(whole[name], whole.get("paper")) for name in whole if name != "paper"}
    best = min(affordable(costs), key=lambda name: tuned[name]["kl"], default=None)
    claim = against_paper(titles[best], costs[best]) if best else against_paper()
    kept = {name: told["retain_kl"] for name, told in found.items()}
    yield bounded(f"{claim}: KL on Alpaca at most 0.5 × its", ratio_of(best, "paper"), most=0.5)
    claim = "that: KL on other retain text at most 0.5 × its"
    yield bounded(claim, quotient(kept.get(best), kept.get("paper")), most=0.5)


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
    lines = []
    for name, told in results.items():
        if name.startswith("tune "):
            row, _, value = name.removeprefix("tune ").rpartition(" ")
            single = name.removeprefix("tune ") in (*STEPPED, "paper")
            if single:
                row, value = name.removeprefix("tune "), ""
            mark = "chosen" if not single and chosen(results, row) == float(value) else ""
            reached = told.get("failure") or number(told["kl"])
            lines.append(f"| {row} | {value} | {reached} | {mark} | `'{name}'` |")
    yield (
        "KL on held-out retain text at the target; the lowest is chosen. Of K-FADE's steps the "
        f"value is the damping ({', '.join(f'{d:g}' for d in DAMPINGS)}), of a baseline the "
        "learning rate."
    )
    yield table("method | value | KL | | `--only`", lines)
