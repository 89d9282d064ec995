"""Attacks on TOFU-small: what brings the forgotten answers back?

    python benchmarks/experiments/tofu_attacks.py --data DIR [--only 'attack * forget *' 'probe *']

*Relearning* fine-tunes the model (after the paper's Figure 4), at several learning rates, of which
the attacker takes the best. *Probes* train nothing: weights are rounded to few bits, or a prompt
shows some of the forgotten answers. Each update is scaled to the target, so that all begin near the
same forget probability. Attacked are K-FADE, the best baseline, RepSelect, and as a control a model
without an update. Needs the reported rows of ``tofu_small.py``, and adds to the same results.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any

from lab.forgetting import BUDGET, EVERY
from lab.pieces import Piece, Results
from lab.records import Record
from lab.tuning import DEFAULT, NARROW
from tofu_lab import TofuLab, run_pieces
from tofu_small import best_baseline, named

import kfade
from kfade.data.sequences import TokenSequence
from kfade.evaluate.quantisation import quantised, rounding_of
from kfade.evaluate.relearning import Examination, Figures, Tuning, attack

AT = (0, 5, 20, 60)  # steps before which the model is measured
BATCH = 4  # sequences a step
RATE_SHARES = (0.1, 1 / 3, 1.0)  # learning rates: shares of the one the models were trained at
GIVEN = 5  # the attacker has one forgotten question in so many
CONTROLS = {"forget": "retrained", "related": "full", "benign": "full"}
"""Kind of attack -> the model without an update. For ``forget`` it has never seen the questions."""
REPSELECT = "repselect"  # which was made to withstand relearning
PLAIN, PROMPTED = "plain", "prompted"
ROUNDINGS = ("int8", "int4")
PROBES = {PLAIN: "as it is", **{word: word for word in ROUNDINGS}, PROMPTED: "prompted"}
"""What a model is measured as in a probe -> its title."""


def pieces(lab: TofuLab, results: Results) -> Iterator[Piece]:
    for kind, rows in attacked_rows(results).items():
        for row, rate in product(filter(lab.has, rows), rates(results)):
            yield named_attack(row, kind, rate), partial(relearned, lab, row, kind, rate)
    for row in probed_rows(results):
        if lab.has(row):
            yield f"probe {row}", partial(probed, lab, row)


def named_attack(row: str, kind: str, rate: float) -> str:
    return f"attack {row} {kind} {rate:.2g}"


def rates(results: Results) -> list[float]:
    """The learning rates of relearning."""
    return [share * results["settings"]["rate"] for share in RATE_SHARES]


def updates_of(results: Results) -> list[str]:
    """The updates that are attacked, as their pieces are called."""
    rivals = (best_baseline(results), named(results, REPSELECT) or REPSELECT)
    return list(dict.fromkeys((DEFAULT, NARROW, "paper", *(row for row in rivals if row))))


def attacked_rows(results: Results) -> dict[str, list[str]]:
    """What each kind of attack is made on, as its pieces are called."""
    return {kind: [*updates_of(results), control] for kind, control in CONTROLS.items()}


def probed_rows(results: Results) -> list[str]:
    return [*updates_of(results), "retrained", "full"]


def relearned(lab: TofuLab, row: str, kind: str, rate: float) -> Record:
    """A model fine-tuned on data of that kind, measured before some of the steps.

    Args:
        row: ``full``, ``retrained``, or the row whose update the full model has.

    Returns:
        ``measurements``: what :func:`examination` gives, each with its ``state`` (attacked,
        reapplied) and ``step``; or ``failure``.
    """
    model, update, told = lab.at_target(row)
    if update is None:
        return told
    tuning = Tuning(
        steps=max(AT),
        learning_rate=rate,
        batch=BATCH,
        batch_tokens=BUDGET,
        seed=lab.sizes.seed,
    )
    sequences = trained_on(lab, kind)
    try:
        found = attack(model, update, sequences, examination(lab), tuning=tuning, at=AT)
    except kfade.InputError as error:  # the loss is not finite
        return {"failure": str(error)}
    measurements = [{"state": m.state, "step": m.step, **recorded(m.figures)} for m in found]
    return {"sequences": len(sequences), "measurements": measurements}


def recorded(figures: Figures) -> dict[str, Any]:
    """The values, and the interval of the forget probability."""
    return {**figures.values, "interval": figures.intervals["forget_probability"]}


def probed(lab: TofuLab, row: str) -> Record:
    """Figures of a row's model as it is, rounded, and prompted, by the names of ``PROBES``."""
    model, update, told = lab.at_target(row)
    if update is None:
        return told
    measure, measure_prompted = examination(lab), examination(lab, prompted=True)
    with update.applied_to(model) as edited:
        found = {PLAIN: measure(edited), PROMPTED: measure_prompted(edited)}
        for word in ROUNDINGS:
            with quantised(edited, rounding_of(word)) as rounded:
                found[word] = measure(rounded)
    return {name: recorded(own) for name, own in found.items()}


def examination(lab: TofuLab, prompted: bool = False) -> Examination:
    """Measures a model on the forgotten questions that the attacker does not have, and its KL from
    the full model on the report slice.

    Args:
        prompted: each question comes after those about the same author that the attacker has, with
            their answers; no KL.
    """
    return Examination(
        lab.model,
        forget=untaught(lab, prompted),
        held_out=() if prompted else lab.slices["report"],
        batch_tokens=BUDGET,
        seed=lab.sizes.seed,
    )


def untaught(lab: TofuLab, prompted: bool) -> list[TokenSequence]:
    """Of the forgotten questions by which the target is measured, those that the attacker does not
    have, each alone or after a prompt."""
    forget, of_author = lab.group("report").forget, lab.sizes.questions
    found = []
    for place in range(0, len(forget), EVERY):
        if place % GIVEN:
            first = place - place % of_author
            mates = range(first, min(first + of_author, len(forget)))
            shown = [forget[i] for i in mates if prompted and i % GIVEN == 0]
            before = [token for mate in shown for token in mate.tokens]
            marks = (False,) * len(before) + forget[place].scored
            found.append(TokenSequence((*before, *forget[place].tokens), marks))
    return found


def trained_on(lab: TofuLab, kind: str) -> Sequence[TokenSequence]:
    """Other text; questions about authors that are kept; some of the forgotten questions."""
    match kind:
        case "benign":
            return lab.text
        case "related":
            return [*lab.slices["fit"], *lab.sequences("tuning")]
    return lab.group("report").forget[::GIVEN]


if __name__ == "__main__":
    run_pieces(__doc__, pieces)
