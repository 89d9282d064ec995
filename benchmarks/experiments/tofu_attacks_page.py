"""What the results' page says of the attacks on TOFU-small."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lab.pieces import Results
from lab.records import NOT_RUN, number, table
from lab.rows import Row
from tofu_attacks import (
    AT,
    BATCH,
    CONTROLS,
    GIVEN,
    PLAIN,
    PROBES,
    ROUNDINGS,
    attacked_rows,
    named_attack,
    probed_rows,
    rates,
)

from kfade.evaluate.relearning import BATCH as PAPER_BATCH
from kfade.evaluate.relearning import LEARNING_RATE, STEPS

LAST = AT[-1]
Measurements = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Best:
    """Relearning of one model on one kind of data, at the rate that has brought back most at the
    last step."""

    kind: str
    row: str
    rate: str = ""
    """Empty if no rate was run."""
    measurements: Measurements = ()
    missing: str = NOT_RUN
    """What is said where there is no figure."""

    def figure(self, key: str, step: int, state: str = "attacked") -> float | None:
        """None if it was not measured."""
        own = [m for m in self.measurements if (m["state"], m["step"]) == (state, step)]
        return own[0].get(key) if own else None

    def shown(self, key: str, step: int, state: str = "attacked") -> str:
        """The figure, or why there is none. Of a control nothing can be applied again."""
        value = self.figure(key, step, state)
        if value is None and state == "reapplied" and self.row in CONTROLS.values():
            return ""
        return self.missing if value is None else number(value)


def bests(results: Results) -> Iterator[Best]:
    """Each kind of data with each model."""
    for kind, names in attacked_rows(results).items():
        for name in names:
            yield best_of(results, kind, name)


def best_of(results: Results, kind: str, row: str) -> Best:
    told = {f"{r:.2g}": results.get(named_attack(row, kind, r), {}) for r in rates(results)}
    tried = [
        Best(kind, row, rate, own["measurements"])
        for rate, own in told.items()
        if "measurements" in own
    ]
    if not tried:
        failures = [own["failure"] for own in told.values() if "failure" in own]
        return Best(kind, row, missing=failures[0] if failures else NOT_RUN)
    best = max(tried, key=lambda one: one.figure("forget_probability", LAST) or 0.0)
    return replace(best, rate=f"{best.rate} (of {len(tried)})")


def titles_of(rows: Sequence[Row], short: bool = False) -> dict[str, str]:
    """Of what is attacked, by its name among the pieces."""
    titles = {"full": "full model, no update", "retrained": "retrained model, no update"}
    for row in rows:
        titles[row.name or row.method] = row.title if short else row.label
    return titles


def measured(results: Results, rows: Sequence[Row]) -> dict[str, dict[str, Measurements]]:
    """The measurements by kind and short title."""
    titles = titles_of(rows, short=True)
    found: dict[str, dict[str, Measurements]] = {}
    for one in bests(results):
        if one.measurements:
            found.setdefault(one.kind, {})[titles[one.row]] = one.measurements
    return found


def slots(results: Results, rows: Sequence[Row]) -> dict[str, Any]:
    """What the template says of the attacks."""
    titles = titles_of(rows)
    return {
        "attack_batch": BATCH,
        "attack_steps": LAST,
        "attack_rates": ", ".join(f"{rate:.2g}" for rate in rates(results)),
        "paper_attack_steps": STEPS,
        "paper_attack_rate": f"{LEARNING_RATE:.0e}",
        "paper_attack_batch": PAPER_BATCH,
        "attack_share": GIVEN,
        "tofu_attacks": attacks_table(results, titles),
        "tofu_probes": probes_table(results, titles),
    }


def attacks_table(results: Results, titles: Mapping[str, str]) -> str:
    """Relearning, each at the attacker's best rate."""
    lines = []
    for one in bests(results):
        tokens = [one.shown("exact_memorisation", step) for step in (0, LAST)]
        lines.append(
            [
                *(one.kind, titles[one.row], one.rate),
                *(one.shown("forget_probability", step) for step in AT),
                *(came_back(results, one), *tokens),
                one.shown("forget_probability", LAST, "reapplied"),
                *(one.shown("retain_kl", step) for step in (0, LAST)),
                one.shown("retain_kl", LAST, "reapplied"),
                f"`'attack {one.row} {one.kind} *'`",
            ]
        )
    steps = " | ".join(f"step {step}" for step in AT)
    return table(
        f"attack | method | best rate | forget probability, {steps} | comes back | "
        f"tokens still predicted, step 0 | step {LAST} | re-applied | KL, step 0 | step {LAST} | "
        "re-applied | `--only`",
        lines,
    )


def came_back(results: Results, one: Best) -> str:
    """The rise of the forget probability, as a share of what the full model's lies above it."""
    if one.row == "full":
        return ""
    known = results.get("probe full", {}).get(PLAIN, {}).get("forget_probability")
    start, end = (one.figure("forget_probability", step) for step in (0, LAST))
    if known is None or start is None or end is None:
        return NOT_RUN
    return f"{(end - start) / (known - start):.2f}"


def probes_table(results: Results, titles: Mapping[str, str]) -> str:
    """Rounding and prompting: the forget probability, the share of tokens predicted, and the KL."""
    lines = []
    for row in probed_rows(results):
        told = results.get(f"probe {row}", {})
        probabilities, tokens = (
            [number(told.get(name, {}).get(key)) for name in PROBES]
            for key in ("forget_probability", "exact_memorisation")
        )
        kls = [number(told.get(name, {}).get("retain_kl")) for name in (PLAIN, *ROUNDINGS)]
        lines.append([titles[row], *probabilities, *tokens, *kls, f"`'probe {row}'`"])
    first, *others = PROBES.values()
    heads = [f"forget probability, {first}", *others, f"tokens still predicted, {first}", *others]
    heads += [f"KL, {first}", *ROUNDINGS]
    return table(f"method | {' | '.join(heads)} | `--only`", lines)
