"""TOFU-small's tables and figures on the results' page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tofu_ablations
import tofu_attacks_page
from lab import figures
from lab.pieces import Results
from lab.records import number, read_seeds, table
from lab.rows import BASELINES, Row, least, request_seconds
from lab.tuning import chosen
from tofu_claims import claims
from tofu_rows import (
    best_objective,
    figures_of,
    log_of_retrained,
    logs_of,
    memorisation_table,
    questions_table,
    rows_of,
    tokens_table,
)
from tofu_seeds import seed_claims, seeds_table
from tofu_small import LENGTHS

from kfade.evaluate.tofu_logs import aggregate, choose_row


def slots(results: Results, folder: Path) -> dict[str, Any]:
    """What the template says of TOFU-small beside single results, by the names of its slots.

    Args:
        folder: of the results of other seeds.
    """
    rows = rows_of(results)
    questions = results.get("by question retrained", {"report": (), "others": ()})
    seeds = {0: results, **read_seeds(folder, "tofu_small")}
    return {
        "full_epochs": len(results["full"]["epochs"]),
        "retrained_epochs": len(results["retrained"]["epochs"]),
        "pace": max(told.get("pace", 1.0) for told in results.values()),
        "tofu_methods": methods_table(results, rows),
        "report_questions": len(questions["report"]),
        "other_questions": len(questions["others"]),
        "tofu_questions": questions_table(results, rows),
        "tofu_tokens": tokens_table(results, rows),
        "tofu_memorisation": memorisation_table(results, rows),
        "tofu_seeds": seeds_table(seeds),
        "tofu_seed_claims": table("claim | measured, by seed | holds?", seed_claims(seeds)),
        "lengths": ", ".join(f"{factor:g}" for factor in LENGTHS),
        "tofu_choices": choices_table(results, rows),
        "tofu_claims": table("claim | measured | holds?", claims(results, rows)),
        **tofu_attacks_page.slots(results, rows),
        "third": f"blocks {tofu_ablations.best_third(results)}",
        "tofu_ablations": tofu_ablations.ablations_table(results),
        "tofu_tuning": tuning_table(results),
        "tofu_answers": answers_table(results, rows),
    }


def draw(results: Results, images: Path) -> None:
    """The figures."""
    rows = rows_of(results)
    qualities = {row.label: figures_of(results, row) for row in rows if logs_of(results, row)}
    retrained = log_of_retrained(results)
    utility = aggregate(retrained)["model_utility"] if retrained else None
    figures.draw_utility(qualities, utility, images / "tofu_small_utility.svg")
    curves = {row.label: row.told["curve"] for row in rows if row.told}
    target = results.get("targets", {}).get("retrained")
    figures.draw_kl(curves, target, images / "tofu_small_kl.svg")
    if attacks := tofu_attacks_page.measured(results, rows):
        figures.draw_attacks(attacks, images / "tofu_small_attacks.svg")


def methods_table(results: Results, rows: Sequence[Row]) -> str:
    retrained = log_of_retrained(results)
    lines = []
    if retrained is not None:
        again = results["targets"]["retrained"]
        utility = number(aggregate(retrained)["model_utility"], ".3f")
        kls = [number(again[key]) for key in ("forget_probability", "kl", "report_kl")]
        seconds = number(results["retrained"]["train_seconds"], ".0f")
        lines.append(["retrained", "", "1", utility, *kls, seconds, "`'*retrained*'`"])
    for row in rows:
        told = row.told
        quality, utility = figures_of(results, row).get("×1", (None, None))
        # K-FADE's is at the target, a baseline's at its last evaluation.
        last = (told.get("curve") or [{}])[-1]
        probability = told.get("forget_probability", last.get("forget_probability"))
        kls = [number(told.get("kl")), number(told.get("report_kl"))]
        if "failure" in told:
            kls = [told["failure"], ""]
        seconds = number(request_seconds(told), ".0f")
        only = f"`'report {row.name}' 'tofu {row.name} x1'`" if row.name else ""
        measured = [number(value) for value in (quality, utility, probability)]
        lines.append([row.title, row.setting, *measured, *kls, seconds, only])
    return table(
        "method | setting | forget quality | utility | forget probability | KL, held out | "
        "KL, report slice | seconds | `--only`",
        lines,
    )


def choices_table(results: Results, rows: Sequence[Row]) -> str:
    """The length that each rule chooses for a method's update."""
    retrained, lines = log_of_retrained(results), []
    for row in rows:
        logs = logs_of(results, row)
        if retrained is not None and logs:
            best = choose_row(logs, retrained)
            paper = [best.best, f"{best.best_forget_quality:.2g}", f"{best.best_utility:.3f}"]
            honest = [best.held_out, f"{best.held_out_forget_quality:.2g}"]
            honest.append(f"{best.held_out_utility:.3f}")
            lines.append([row.title, row.setting, str(len(logs)), *paper, *honest])
    return table(
        "method | setting | lengths | paper's rule | forget quality | utility | honest rule | "
        "forget quality, other half | utility",
        lines,
    )


def tuning_table(results: Results) -> str:
    lines = []
    for name, told in results.items():
        if name.startswith("tune "):
            row, _, value = name.removeprefix("tune ").rpartition(" ")
            mark = "chosen" if chosen(results, row) == float(value) else ""
            kl = told.get("failure") or number(told["kl"])
            lines.append([row, value, kl, mark, f"`'{name}'`"])
    return table("method | value | KL | choice | `--only`", lines)


def answers_table(results: Results, rows: Sequence[Row]) -> str:
    """Answers of the full and the retrained model, of K-FADE and of the best baseline."""
    by = {row.method: row for row in rows}
    rival = least((row for row in rows if row.method in BASELINES), "told")
    names = {"full": "full", "retrained": "retrained"}
    for row in (by[f"ekfac {best_objective(results)}"], rival):
        if row is not None and row.name is not None:
            names[row.label] = row.name
    shown = {
        title: results[f"tofu {name} x1"]["answers"]
        for title, name in names.items()
        if f"tofu {name} x1" in results
    }
    lines = [
        [cell(text) for text in (asked[0]["question"], asked[0]["answer"])]
        + [cell(one["generated"]) for one in asked]
        for asked in zip(*shown.values(), strict=True)
    ]
    return table(f"question | right answer | {' | '.join(shown)}", lines)


def cell(text: str) -> str:
    """Text for a cell of a table: one line, with its bars escaped."""
    return " ".join(text.replace("|", "\\|").split())
