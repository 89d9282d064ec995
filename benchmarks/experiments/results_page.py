"""Make ``docs/results.md`` and its figures of what the experiments have measured.

    python benchmarks/experiments/results_page.py [--results FILE] [--topic FILE] [--anew FILE]
                                                 [--docs DIR]

Nothing is computed but ratios, TOFU's aggregates and choices of rows; what was not measured is
shown as *not run*.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import results_figures
from pieces import Results
from results_attack import curves, relearning
from results_claims import claims, least_kl
from results_questions import by_question
from results_rows import (
    BASELINES,
    ESTIMATORS,
    NOT_RUN,
    Row,
    better_objective,
    cell,
    figures_of,
    number,
    probability_of,
    quotient,
    retrained_log,
    rows_of,
    seconds,
    table,
)
from results_topic import specificity, topic
from tofu_small import LENGTHS, RESULTS
from topic_small import RESULTS as TOPIC_RESULTS
from tuning import chosen, lowest

from kfade.evaluate.tofu_logs import aggregate, choose_row

DOCS, NOTES = Path(__file__).parents[2] / "docs", Path(__file__).parent / "notes"
ANEW_RESULTS = RESULTS.with_name("tofu_small_anew.json")
COMMAND = "python benchmarks/experiments/tofu_small.py --data DIR"


def page(
    results: Results, topic_results: Results | None = None, anew: Results | None = None
) -> str:
    rows = rows_of(results)
    parts = [
        "# Results",
        "Made by `benchmarks/experiments/results_page.py` from what the experiments beside it "
        "wrote into `benchmarks/results/`; only what is said of claims that do not hold is written "
        "by hand, in `benchmarks/experiments/notes/`.",
        "## TOFU-small",
        *setting(results),
        *(trained_anew(results, anew) if anew else ()),
        "### Methods at equal forgetting",
        *methods_table(results, rows),
        "![KL against forget probability](images/tofu_small_kl.svg)",
        *by_question(results, rows),
        "### Which row stands in a table",
        *choices_table(results, rows),
        "![forget quality against utility](images/tofu_small_utility.svg)",
        "### Claims",
        *claims_table(results, rows),
        notes("tofu_small"),
        *relearning(results, rows),
        "### Ablations",
        *ablations_table(results),
        "### Tuning",
        *tuning_table(results),
        "### Answers before and after",
        *answers_table(results, rows),
        *((*topic(topic_results), notes("topic_small")) if topic_results else ()),
    ]
    return "\n\n".join(parts) + "\n"


def notes(experiment: str) -> str:
    """What was tried where a claim does not hold: written by hand."""
    return (NOTES / f"{experiment}.md").read_text(encoding="utf-8").rstrip()


def setting(results: Results) -> Iterator[str]:
    sizes = results["settings"]
    yield (
        f"Model {sizes['model']}, fine-tuned on {sizes['authors']} invented authors of TOFU, "
        f"{sizes['questions']} questions each (all weights of the blocks; embeddings and head are "
        f"frozen; AdamW, rate {sizes['rate']:g}; chat template without system prompt). A fifth of "
        "the authors is forgotten here (*report*), another fifth where settings are chosen "
        "(*tuning*; in the tables they are kept, but no method is shown them), the rest is kept in "
        "both: three quarters of their questions are every method's retain data, a tenth is held "
        "out to steer and to choose by, and 15 % (the *report slice*) is looked at by nothing but "
        f"these tables. One seed ({sizes['seed']})."
    )
    trained = [
        f"| {name} | {told['questions']} | {len(told['epochs'])} | {told['loss']:.3f} | "
        f"{told['train_seconds']:.0f} |"
        for name in ("full", "retrained")
        if (told := results.get(name))
    ]
    yield table("model | questions | epochs | answer loss | seconds", trained)
    told = results.get("targets")
    if told is None:
        yield f"Targets: {NOT_RUN}."
        return
    again = told["retrained"]
    yield (
        "*Equal forgetting*: the mean probability of the report authors' answers (per token, "
        "geometric; of every second question) is the retrained model's, "
        f"{again['forget_probability']:.3f}; the full model's is "
        f"{told['report']['forget_probability']:.3f}. On the tuning authors no retrained model was "
        "made: there the target is what the full model gives answers about two authors that "
        f"nobody was trained on, {told['unseen']['forget_probability']:.3f}. The retrained model's "
        f"own KL from the full one is {number(again['kl'])} held out and "
        f"{number(again['report_kl'])} on the report slice (nats per token)."
    )


def trained_anew(results: Results, anew: Results) -> Iterator[str]:
    """The same figures of models that were trained again elsewhere."""

    def line(name: str, piece: str, *keys: str) -> str:
        cells = []
        for told in (results.get(piece, {}), anew.get(piece, {})):
            for key in keys:
                told = told.get(key) if isinstance(told, dict) else None
            cells.append(number(told))
        return f"| {name} | {cells[0]} | {cells[1]} |"

    paces = [told["pace"] for told in results.values() if "pace" in told]
    yield (
        "Rows were computed on two machines. The models were trained anew on the second, from the "
        "same seed, and some figures measured again there:"
    )
    reported = [piece for piece in anew if piece.startswith("report ")]
    yield table(
        "what | first machine | second machine",
        [
            line("full model: answer loss", "full", "loss"),
            line(
                "retrained model: forget probability", "targets", "retrained", "forget_probability"
            ),
            line("retrained model: KL, report slice", "targets", "retrained", "report_kl"),
            *(line(f"`{name}`: KL, report slice", name, "report_kl") for name in reported),
        ],
    )
    if paces:
        yield (
            f"Both trainings took {max(paces):.2g} times as long on the first; seconds of rows "
            "that were computed on the second are multiplied by that."
        )


def methods_table(results: Results, rows: Sequence[Row]) -> Iterator[str]:
    retrained = retrained_log(results)
    again = results.get("targets", {}).get("retrained", {})
    train = results.get("retrained", {}).get("train_seconds")
    lines = []
    if retrained is not None:
        utility = aggregate(retrained)["model_utility"]
        lines.append(
            f"| retrained | | 1 | {utility:.3f} | {number(again.get('forget_probability'))} | "
            f"{number(again.get('kl'))} | {number(again.get('report_kl'))} | {seconds(train)} | "
            "`'*retrained*'` |"
        )
    for row in rows:
        told = row.told or {}
        quality, utility = figures_of(row, retrained).get("×1", (None, None))
        reached = told.get("failure", "")
        kls = f"{reached} | " if reached else f"{number(told.get('kl'))} | {number(row.kl)}"
        only = f"`'{row.piece}' 'tofu {row.piece[7:]} x1'`" if row.piece else ""
        probability = probability_of(told)
        lines.append(
            f"| {row.title} | {row.setting} | {number(quality)} | {number(utility)} | "
            f"{number(probability)} | {kls} | {seconds(row.seconds)} | {only} |"
        )
    yield table(
        "method | setting | forget quality | utility | forget probability | KL, held out | "
        "KL, report slice | seconds | `--only`",
        lines,
    )
    yield (
        "Forget quality is the p-value of TOFU's KS test against the retrained model, utility the "
        "harmonic mean of its nine parts "
        f"({results['settings']['utility']} questions of each set, answers of at most 48 tokens), "
        "both of the update as it stands: of a baseline that of the evaluation of the lowest KL at "
        "the target or beyond it. KLs are those at the target, in nats per token: K-FADE's step "
        "ends there (within 3 %, in nats of forgetting); of a baseline it is the lowest at the "
        "target or beyond it, and between two evaluations √KL is taken as linear in −log p. "
        "Seconds: what a request takes, without the fit of a curvature; "
        "K-FADE's are gradient, solve and search for the size. Baselines train all weights of the "
        "blocks (RMU three feed-forward maps) at a constant rate and stop at the target when KL no "
        "longer falls. Command of a row:"
    )
    yield f"    {COMMAND} --only PIECES"
    fits = [
        f"{ESTIMATORS[name]} {told['fit_seconds']:.0f} s"
        for name in ESTIMATORS
        if (told := results.get(f"fit {name}"))
    ]
    yield f"Fits, on the retain data: {', '.join(fits) or NOT_RUN}."


def choices_table(results: Results, rows: Sequence[Row]) -> Iterator[str]:
    retrained = retrained_log(results)
    lines = []
    for row in rows:
        if retrained is not None and row.logs:
            best = choose_row(row.logs, retrained)
            lines.append(
                f"| {row.title} | {row.setting} | {len(row.logs)} | {best.best} | "
                f"{best.best_forget_quality:.2g} | {best.best_utility:.3f} | "
                f"{best.held_out} | {best.held_out_forget_quality:.2g} | "
                f"{best.held_out_utility:.3f} |"
            )
    lengths = ", ".join(f"{factor:g}" for factor in LENGTHS)
    yield (
        f"Each method's update at its own length and, where run, {lengths} times as long. The "
        "paper's rule takes the largest forget quality × utility, on the questions that are "
        "then reported; the honest one chooses on half of the forget questions and reports on the "
        "other."
    )
    yield table(
        "method | setting | rows | chosen | forget quality | utility | chosen on half | "
        "forget quality, other half | utility",
        lines,
    )


def claims_table(results: Results, rows: Sequence[Row]) -> Iterator[str]:
    lines = [
        f"| {claim} | {measured} | {holds} |" for claim, measured, holds in claims(results, rows)
    ]
    yield table("claim | measured | holds?", lines)
    yield (
        "KLs of claims are those of the report slice, at the retrained model's forget probability. "
        "K-FADE is EK-FAC with the objective that was better on the tuning authors."
    )


def ablations_table(results: Results) -> Iterator[str]:
    damping = chosen(results, "ekfac margin")
    base = results.get(f"report ekfac margin {damping:g}") if damping is not None else None
    third = lowest(
        (name.removeprefix("ablation "), told)
        for name, told in results.items()
        if name.startswith("ablation blocks ")
    )
    lines = [ablation_line("as reported (all blocks)", base, base, "")] if base else []
    for name, told in results.items():
        if name.startswith("ablation "):
            own = results.get(f"ablation {third}") if "layers" in told else base
            short = name.removeprefix("ablation ")
            lines.append(ablation_line(short, told, own, f"`'{name}'`"))
    yield (
        "EK-FAC and margin on the report authors, at equal forgetting, one thing changed at a "
        "time. What needs another fit, and the several steps, were made on one third of the blocks "
        f"({third or NOT_RUN}) and are compared with one step on it; the others with the row above."
    )
    yield table("what | KL, held out | KL, report slice | × as much | `--only`", lines)


def ablation_line(name: str, told: dict[str, Any], base: dict[str, Any] | None, only: str) -> str:
    if "failure" in told:
        return f"| {name} | {told['failure']} | | | {only} |"
    more = quotient(told["report_kl"], (base or {}).get("report_kl"))
    return (
        f"| {name} | {number(told['kl'])} | {number(told['report_kl'])} | {number(more)} | {only} |"
    )


def tuning_table(results: Results) -> Iterator[str]:
    lines = []
    for name, told in results.items():
        if name.startswith("tune "):
            reached = told.get("failure") or number(told["kl"])
            row, _, value = name.removeprefix("tune ").rpartition(" ")
            mark = "chosen" if chosen(results, row) == float(value) else ""
            lines.append(f"| {row} | {value} | {reached} | {mark} | `'{name}'` |")
    yield (
        "On the tuning authors: KL held out where the target is reached; the lowest is chosen. Of "
        "K-FADE the value is the damping, times each layer's mean eigenvalue; what is chosen for "
        "the margin is used for ce too. Of a baseline it is the learning rate: half of it is tried "
        "for as long as the KL falls, and double where the first does not get there."
    )
    yield table("method | value | KL | | `--only`", lines)


def answers_table(results: Results, rows: Sequence[Row]) -> Iterator[str]:
    ours = next(row for row in rows if row.method == f"ekfac {better_objective(results)}")
    shown = {"full": "tofu full x1", "retrained": "tofu retrained x1"}
    rival = least_kl(row for row in rows if row.method in BASELINES)
    for row in (ours, rival):
        if row is not None and row.piece is not None:
            shown[row.name] = f"tofu {row.piece.removeprefix('report ')} x1"
    shown = {title: piece for title, piece in shown.items() if piece in results}
    if not shown:
        yield f"{NOT_RUN}."
        return
    lines = []
    for texts in zip(*(results[piece]["answers"] for piece in shown.values()), strict=True):
        said = " | ".join(cell(text["generated"]) for text in texts)
        lines.append(f"| {cell(texts[0]['question'])} | {cell(texts[0]['answer'])} | {said} |")
    yield "Of the report authors (TOFU, MIT licence); greedy, cut after 48 tokens."
    yield table(f"question | truth | {' | '.join(shown)}", lines)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--results", type=Path, default=RESULTS)
    options.add_argument("--topic", type=Path, default=TOPIC_RESULTS)
    options.add_argument("--anew", type=Path, default=ANEW_RESULTS)
    options.add_argument("--docs", type=Path, default=DOCS)
    arguments = options.parse_args()
    results = json.loads(arguments.results.read_text())
    topic_results, anew = (
        json.loads(path.read_text()) if path.is_file() else None
        for path in (arguments.topic, arguments.anew)
    )
    rows = rows_of(results)
    images = arguments.docs / "images"
    images.mkdir(parents=True, exist_ok=True)
    retrained = retrained_log(results)
    qualities = {row.name: figures_of(row, retrained) for row in rows if row.logs}
    results_figures.draw_utility(qualities, retrained, images / "tofu_small_utility.svg")
    ways = {row.name: row.told["curve"] + row.more_points for row in rows if row.told}
    told = results.get("targets", {}).get("retrained")
    results_figures.draw_kl(ways, told, images / "tofu_small_kl.svg")
    if attacked := curves(results, rows):
        results_figures.draw_attacks(attacked, images / "tofu_small_attacks.svg")
    if topic_results:
        results_figures.draw_specificity(specificity(topic_results), images / "topic_small_kl.svg")
    text = page(results, topic_results, anew)
    (arguments.docs / "results.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
