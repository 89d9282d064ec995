"""Relearning's part of the results' page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pieces import Results
from results_rows import NOT_RUN, Row, number, table
from tofu_small import best_baseline, named
from tofu_small_attacks import AT, BATCH, CONTROLS, GIVEN, RATE_SHARE

from kfade.evaluate.relearning import LEARNING_RATE, STEPS

Measurements = Sequence[dict[str, Any]]


def relearning(results: Results, rows: Sequence[Row]) -> Iterator[str]:
    """The whole section."""
    rate, last = RATE_SHARE * results["settings"]["rate"], AT[-1]
    yield "### Relearning"
    yield (
        "After the paper's Figure 4. The full model with a method's update is fine-tuned "
        f"(*attacked*): all weights, AdamW, {BATCH} sequences a step, {last} steps at a rate of "
        f"{rate:.2g} (steps × rate {last * rate:.2g}, the paper's {STEPS * LEARNING_RATE:.2g}). "
        "*benign*: as many sequences of WikiText as there are retain questions; *related*: the "
        "retain questions and those of the tuning authors; *forget*: every "
        f"{GIVEN}th of the forgotten questions. Measured after some of the steps are the "
        "probability of the other forgotten answers, the same ones in all three, and the KL from "
        "the full model on the report slice. *Re-applied*: the update is added once more to what "
        "the attack has made of the model. Beside them is a model without an update: the full one, "
        "and for *forget* the retrained one, which shows how much of the others a few questions "
        "teach a model that has never seen any. The baseline is the one of the lowest held-out KL "
        "at the target; its update is the one it ended with, which may lie beyond the target."
    )
    heads = [f"step {step}" for step in AT]
    yield table(
        f"attack | method | forget probability, {' | '.join(heads)} | re-applied | KL, {heads[0]} "
        f"| {heads[-1]} | re-applied | `--only`",
        [line(*found) for found in attacks(results, rows)],
    )
    if curves(results, rows):
        yield "![forget probability while attacked](images/tofu_small_attacks.svg)"


def attacks(
    results: Results, rows: Sequence[Row]
) -> Iterator[tuple[str, str, str, Measurements | None]]:
    """(kind, title, piece, measurements or None) of all that are to be run."""
    titles = {row.piece.removeprefix("report "): row.name for row in rows if row.piece}
    for kind, control in CONTROLS.items():
        for name in (named(results, "ekfac margin"), best_baseline(results), control):
            if name is not None:
                piece = f"attack {name} {kind}"
                title = titles.get(name, f"{name} model, no update")
                yield kind, title, piece, results.get(piece, {}).get("measurements")


def line(kind: str, title: str, piece: str, found: Measurements | None) -> str:
    by = {(one["state"], one["step"]): one for one in found or ()}
    again = ("reapplied", AT[-1])

    def at(state: str, step: int, name: str) -> str:
        missing = "" if found and state == again[0] else NOT_RUN  # a control has no update
        return number(by[state, step][name]) if (state, step) in by else missing

    cells = [at("attacked", step, "forget_probability") for step in AT]
    cells.append(at(*again, "forget_probability"))
    cells += [at("attacked", step, "retain_kl") for step in (AT[0], AT[-1])]
    cells.append(at(*again, "retain_kl"))
    return f"| {kind} | {title} | {' | '.join(cells)} | `'{piece}'` |"


def curves(results: Results, rows: Sequence[Row]) -> dict[str, dict[str, Measurements]]:
    """Measurements by kind and title of those that were run; empty where none was."""
    made: dict[str, dict[str, Measurements]] = {}
    for kind, title, _, found in attacks(results, rows):
        if found:
            made.setdefault(kind, {})[title] = found
    return made
