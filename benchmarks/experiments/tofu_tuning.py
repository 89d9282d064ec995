"""How many steps, corrections and which damping? Chosen on TOFU-small's tuning authors only.

    python benchmarks/experiments/tofu_tuning.py --data DIR [--only 'steps 3*']

Forgets the tuning authors of ``tofu_small.py``, whose full model it uses. Nothing here is about the
report authors, and nothing reads the report slice. Of the common authors two are shown to no
method; of the others a part of the questions is kept back. KL is judged on both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from lab.forgetting import Group, Ruler
from lab.pieces import Piece, Results
from lab.records import RESULTS, Record
from tofu_data import OF_AUTHOR, encode
from tofu_lab import TofuLab, run_pieces

import kfade
from kfade import Correction, Damping
from kfade.data.examples import Example
from kfade.data.sequences import TokenSequence
from kfade.method.size import StepSize

FILE = RESULTS / "tofu_tuning.jsonl"
STRANGERS = 2  # common authors that no method is shown
JUDGED = 5  # one in so many questions of the other common authors' fit slice is kept back
TARGET = 0.0624  # mean probability of answers about authors that no model was trained on


class TuningLab(TofuLab):
    """Fits on fewer questions; judges on those that were kept back."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.models, self.cache = self.cache, self.cache / "tuning"

    def folder(self, name: str) -> Path:
        return self.models / name

    def group(self, name: str) -> Group:
        return Group(name, self.sequences(name), math.nan, TARGET)

    @cached_property
    def examples(self) -> dict[str, list[Example]]:
        strangers = {id(e) for e in self.data.of("common")[: STRANGERS * OF_AUTHOR]}
        slices = self.data.slices()
        fit, held_out = (
            [e for e in slices[name] if id(e) not in strangers] for name in ("fit", "held_out")
        )
        judged = fit[::JUDGED]
        return {
            "fit": [e for i, e in enumerate(fit) if i % JUDGED],
            "held_out": held_out,
            "same": judged,
            "others": [e for e in self.data.of("common") if id(e) in strangers],
        }

    @cached_property
    def slices(self) -> dict[str, Sequence[TokenSequence]]:
        return {name: encode(own, self.tokenizer) for name, own in self.examples.items()}

    @cached_property
    def judge(self) -> Ruler:
        """KL on questions that no run uses. Made of the unedited model."""
        slices = {name: self.slices[name] for name in ("same", "others")}
        return Ruler(self.model, {**slices, "wikitext": self.text})

    def run(self, steps: int, damping: float, **options: Any) -> Record:
        """``kfade.unlearn`` by one kept fit, to the tuning target."""
        judge, size = self.judge, StepSize(until_probability=TARGET)
        try:
            states, told = self.unlearn("tuning", "ekfac", size, damping, steps=steps, **options)
        except kfade.InputError as error:
            return {"failure": str(error)}
        update = states[-1]
        records = update.provenance["steps"]
        row: Record = {**told, "held_out": records[-1]["retain_kl"]}
        row["forget_probability"] = records[-1]["forget_probability_after"]
        row["records"] = [short(record) for record in records]
        with update.applied_to(self.model):
            row |= {name: judge.kl(name) for name in ("same", "others", "wikitext")}
        return row


def short(record: Record) -> Record:
    """What is kept of a step: where it came out, and its corrections."""
    kept = ("alpha", "exact_kl", "measured_kl", "retain_kl", "forget_probability_after")
    corrections = [
        {**{k: v for k, v in own.items() if k != "probes"}, "trials": len(own["probes"])}
        for own in record["corrections"]
    ]
    return {**{name: record[name] for name in kept}, "corrections": corrections}


def pieces(lab: TuningLab, results: Results) -> Iterator[Piece]:
    """All pieces; the name of each says its settings."""
    yield "full", partial(lab.train_once, "full")
    for fit in ("kfac", "ekfac"):
        yield f"fit {fit}", partial(lab.fit, fit)
    for steps, correct in ((1, 0), (3, 0), (6, 0), (6, 1), (12, 1), (12, 3)):
        yield named(lab, steps, correct, 0.001)
    for damping in (0.01, 0.1):
        yield named(lab, 1, 0, damping)
        yield named(lab, 6, 1, damping)
    for other in (1.0, 10.0, 1000.0):
        yield named(lab, 6, 1, 0.001, other)


def named(
    lab: TuningLab, steps: int, correct: int, damping: float, correct_damping: float = 100.0
) -> Piece:
    """A run by one fit with those settings."""
    name = f"steps {steps} correct {correct} damping {damping:g}"
    if correct_damping != 100:
        name += f", in corrections {correct_damping:g}"
    correction = Correction(correct, Damping(correct_damping))
    return name, partial(lab.run, steps, damping, correction=correction)


if __name__ == "__main__":
    run_pieces(__doc__, pieces, TuningLab, FILE)
