"""Attacks by relearning on TOFU-small (after the paper's Figure 4).

    python benchmarks/experiments/tofu_attacks.py --data DIR [--only 'attack * benign']

Fine-tuning shows what comes back; applying the same update again shows what it still removes.
Attacked are K-FADE by default and in one step, the best baseline, and as a control a model without
an update. Needs the reported rows of ``tofu_small.py``, and adds to the same results.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from lab.forgetting import BUDGET
from lab.pieces import Piece, Results
from lab.records import Record, number, table
from lab.rows import Row
from lab.tuning import DEFAULT
from tofu_lab import TofuLab, run_pieces
from tofu_small import best_baseline, named

from kfade.data.sequences import TokenSequence
from kfade.evaluate.relearning import LEARNING_RATE, STEPS, Examination, Tuning, attack

AT = (0, 5, 10, 30)  # steps before which the model is measured
BATCH = 4  # sequences a step
RATE_SHARE = 1 / 3  # of the rate at which the models were trained
GIVEN = 5  # the attack "forget" trains on one forgotten question in so many
CONTROLS = {"benign": "full", "related": "full", "forget": "retrained"}
"""Kind of attack -> the model without an update. For ``forget`` it has never seen the questions."""
Measurements = Sequence[dict[str, Any]]


def pieces(lab: TofuLab, results: Results) -> Iterator[Piece]:
    for kind, rows in attacked_rows(results).items():
        for row in rows:
            if lab.has(row):
                yield f"attack {row} {kind}", partial(attacked, lab, row, kind)


def attacked_rows(results: Results) -> dict[str, list[str]]:
    """What each kind of attack is made on, as its pieces are called."""
    updates = (DEFAULT, named(results, "ekfac margin"), best_baseline(results))
    return {
        kind: [row for row in (*updates, control) if row is not None]
        for kind, control in CONTROLS.items()
    }


def attacked(lab: TofuLab, row: str, kind: str) -> Record:
    """A model fine-tuned on data of that kind, measured before some of the steps.

    Args:
        row: ``full``, ``retrained``, or the row whose update the full model has.

    Returns:
        ``measurements``: ``forget_probability`` and ``forget_loss`` of the forgotten questions that
        no attack trains on, ``retain_kl`` from the full model on the report slice (nats per token);
        each with its ``state`` (attacked, reapplied) and ``step``.
    """
    model, update = lab.edited(row)
    forget = lab.group("report").forget
    shared = {"batch_tokens": BUDGET, "seed": lab.sizes.seed}
    examine = Examination(
        lab.model,
        forget=[question for i, question in enumerate(forget) if i % GIVEN],
        held_out=lab.slices["report"],
        **shared,
    )
    rate = RATE_SHARE * lab.sizes.rate
    tuning = Tuning(steps=max(AT), learning_rate=rate, batch=BATCH, **shared)
    sequences = trained_on(lab, kind)
    found = attack(model, update, sequences, examine, tuning=tuning, at=AT)
    return {
        "sequences": len(sequences),
        "measurements": [{"state": m.state, "step": m.step, **m.figures.values} for m in found],
    }


def trained_on(lab: TofuLab, kind: str) -> Sequence[TokenSequence]:
    """Other text; questions about authors that are kept; some of the forgotten questions."""
    match kind:
        case "benign":
            return lab.text
        case "related":
            return [*lab.slices["fit"], *lab.sequences("tuning")]
    return lab.group("report").forget[::GIVEN]


def slots(results: Results, rows: Sequence[Row]) -> dict[str, Any]:
    """What the template says of the attacks."""
    rate, last = RATE_SHARE * results["settings"]["rate"], AT[-1]
    first_columns = " | ".join(f"step {step}" for step in AT)
    return {
        "attack_batch": BATCH,
        "attack_steps": last,
        "attack_rate": rate,
        "attack_length": last * rate,
        "paper_attack_length": STEPS * LEARNING_RATE,
        "attack_share": GIVEN,
        "tofu_attacks": table(
            f"attack | method | forget probability, {first_columns} | re-applied | "
            f"KL, step {AT[0]} | step {last} | re-applied | `--only`",
            [cells(*found) for found in attacks(results, rows)],
        ),
    }


def attacks(results: Results, rows: Sequence[Row]) -> Iterator[tuple[str, str, str, Measurements]]:
    """(kind, title, piece, measurements) of all attacks; no measurements if it was not run."""
    titles = {row.name: row.label for row in rows}
    for kind, names in attacked_rows(results).items():
        for name in names:
            piece = f"attack {name} {kind}"
            title = titles.get(name, f"{name} model, no update")
            yield kind, title, piece, results.get(piece, {}).get("measurements", ())


def measured(results: Results, rows: Sequence[Row]) -> dict[str, dict[str, Measurements]]:
    """The measurements by kind and title."""
    found: dict[str, dict[str, Measurements]] = {}
    for kind, title, _, measurements in attacks(results, rows):
        if measurements:
            found.setdefault(kind, {})[title] = measurements
    return found


def cells(kind: str, title: str, piece: str, found: Measurements) -> list[str]:
    by = {(one["state"], one["step"]): one for one in found}
    attacked = [("attacked", step) for step in AT]
    again = ("reapplied", AT[-1])

    def shown(key: str, states: Sequence[tuple[str, int]]) -> list[str]:
        # A control has no update that could be applied again.
        return ["" if found and s not in by else number(by.get(s, {}).get(key)) for s in states]

    probabilities = shown("forget_probability", [*attacked, again])
    kls = shown("retain_kl", [attacked[0], attacked[-1], again])
    return [kind, title, *probabilities, *kls, f"`'{piece}'`"]


if __name__ == "__main__":
    run_pieces(__doc__, pieces)
