"""Attacks on TOFU-small: what brings the forgotten answers back?

    python benchmarks/experiments/tofu_attacks.py --data DIR [--only 'attack * forget *' 'probe *']

*Relearning* fine-tunes the model (after the paper's Figure 4), at several learning rates, of which
the attacker takes the best. *Probes* train nothing: weights are rounded to few bits, or a prompt
shows some of the forgotten answers. Each update is scaled to the target, so that all begin at the
same forget probability. Attacked are K-FADE, the best baseline, RepSelect, and as a control a model
without an update. Needs the reported rows of ``tofu_small.py``, and adds to the same results.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

from lab.forgetting import BUDGET, EVERY
from lab.pieces import Piece, Results
from lab.records import Record, number, table
from lab.rows import Row
from lab.tuning import DEFAULT, SPREAD
from tofu_lab import TofuLab, run_pieces
from tofu_small import best_baseline, named

from kfade.data.sequences import TokenSequence
from kfade.evaluate.quantisation import quantised, rounding_of
from kfade.evaluate.relearning import (
    LEARNING_RATE,
    STEPS,
    Examination,
    Measurement,
    Tuning,
    attack,
)

AT = (0, 5, 20, 60)  # steps before which the model is measured
BATCH = 4  # sequences a step
RATE_SHARES = (0.1, 1 / 3, 1.0)  # learning rates: shares of the one the models were trained at
GIVEN = 5  # the attacker has one forgotten question in so many
CONTROLS = {"forget": "retrained", "related": "full", "benign": "full"}
"""Kind of attack -> the model without an update. For ``forget`` it has never seen the questions."""
PLAIN, PROMPTED = "plain", "prompted"
ROUNDINGS = ("int8", "int4")
PROBES = {PLAIN: "as it is", **{word: word for word in ROUNDINGS}, PROMPTED: "prompted"}
"""What a model is measured as in a probe -> its title."""
Measurements = Sequence[dict[str, Any]]


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
    rivals = (best_baseline(results), named(results, "repselect"))
    return list(dict.fromkeys((DEFAULT, SPREAD, "paper", *(row for row in rivals if row))))


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
        reapplied) and ``step``.
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
    found = attack(model, update, sequences, examination(lab), tuning=tuning, at=AT)
    return {"sequences": len(sequences), "measurements": [recorded(m) for m in found]}


def recorded(found: Measurement) -> dict[str, Any]:
    return {"state": found.state, "step": found.step, **found.figures.values}


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
    return {name: own.values for name, own in found.items()}


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


@dataclass(frozen=True)
class Attack:
    """A kind of relearning of one model, at the learning rate that brings back most."""

    kind: str
    row: str
    title: str
    rate: float | None = None
    """None if no rate was run."""
    measurements: Measurements = ()

    def figure(self, key: str, step: int, state: str = "attacked") -> float | None:
        """None if it was not measured."""
        own = [m for m in self.measurements if (m["state"], m["step"]) == (state, step)]
        return own[0].get(key) if own else None


def attacks(results: Results, rows: Sequence[Row]) -> Iterator[Attack]:
    """All kinds of relearning of all models."""
    titles, last = titles_of(rows), AT[-1]
    for kind, names in attacked_rows(results).items():
        for name in names:
            tried = [Attack(kind, name, titles[name])]
            for rate in rates(results):
                told = results.get(named_attack(name, kind, rate), {})
                if "measurements" in told:
                    measurements = told["measurements"]
                    tried.append(replace(tried[0], rate=rate, measurements=measurements))
            yield max(tried, key=lambda one: one.figure("forget_probability", last) or 0.0)


def titles_of(rows: Sequence[Row]) -> dict[str, str]:
    controls = {name: f"{name} model, no update" for name in ("full", "retrained")}
    return {row.name: row.label for row in rows if row.name} | controls


def measured(results: Results, rows: Sequence[Row]) -> dict[str, dict[str, Measurements]]:
    """The measurements by kind and title."""
    found: dict[str, dict[str, Measurements]] = {}
    for one in attacks(results, rows):
        if one.measurements:
            found.setdefault(one.kind, {})[one.title] = one.measurements
    return found


def slots(results: Results, rows: Sequence[Row]) -> dict[str, Any]:
    """What the template says of the attacks."""
    return {
        "attack_batch": BATCH,
        "attack_steps": AT[-1],
        "attack_rates": ", ".join(f"{rate:.2g}" for rate in rates(results)),
        "paper_attack_steps": STEPS,
        "paper_attack_rate": LEARNING_RATE,
        "attack_share": GIVEN,
        "tofu_attacks": attacks_table(results, rows),
        "tofu_probes": probes_table(results, rows),
    }


def attacks_table(results: Results, rows: Sequence[Row]) -> str:
    """Relearning, each at the attacker's best rate."""
    last, lines = AT[-1], []
    for one in attacks(results, rows):
        # Of a control there is nothing to take back, and no update that could be applied again.
        control = one.row in CONTROLS.values() and one.measurements
        back = "" if control else number(came_back(results, one), ".2f")
        tokens = [one.figure("exact_memorisation", step) for step in (0, last)]
        again = [one.figure(key, last, "reapplied") for key in ("forget_probability", "retain_kl")]
        shown = ["" if control else number(value) for value in again]
        lines.append(
            [
                *(one.kind, one.title, f"{one.rate:.2g}" if one.rate is not None else ""),
                *(number(one.figure("forget_probability", step)) for step in AT),
                *(back, " to ".join(f"{share:.2f}" for share in tokens if share is not None)),
                *(shown[0], *(number(one.figure("retain_kl", step)) for step in (0, last))),
                *(shown[1], f"`'attack {one.row} {one.kind} *'`"),
            ]
        )
    steps = " | ".join(f"step {step}" for step in AT)
    return table(
        f"attack | method | best rate | forget probability, {steps} | comes back | "
        f"tokens still predicted, step 0 to {last} | re-applied | KL, step 0 | step {last} | "
        "re-applied | `--only`",
        lines,
    )


def came_back(results: Results, one: Attack) -> float | None:
    """The rise of the forget probability, as a share of what was taken from the full model."""
    start, end = (one.figure("forget_probability", step) for step in (0, AT[-1]))
    if start is None or end is None:
        return None
    return (end - start) / (results["targets"]["report"]["forget_probability"] - start)


def probes_table(results: Results, rows: Sequence[Row]) -> str:
    """Rounding and prompting: the forget probability, the share of tokens predicted, and the KL."""
    titles, lines = titles_of(rows), []
    for row in probed_rows(results):
        told = results.get(f"probe {row}", {})
        by_probe = [told.get(name, {}) for name in PROBES]
        probabilities = [number(own.get("forget_probability")) for own in by_probe]
        tokens = [number(own.get("exact_memorisation"), ".2f") for own in by_probe]
        kls = [number(told.get(name, {}).get("retain_kl")) for name in (PLAIN, *ROUNDINGS)]
        lines.append([titles[row], *probabilities, *tokens, *kls, f"`'probe {row}'`"])
    names = list(PROBES.values())
    heads = [f"forget probability, {names[0]}", *names[1:]]
    heads += [f"tokens still predicted, {names[0]}", *names[1:], f"KL, {names[0]}", *ROUNDINGS]
    return table(f"method | {' | '.join(heads)} | `--only`", lines)


if __name__ == "__main__":
    run_pieces(__doc__, pieces)
