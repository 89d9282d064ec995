"""Relearning in TOFU-small: what fine-tuning brings back, and what the same update, added again,
takes away once more (the paper's Figure 4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from equal_forgetting import BUDGET
from tofu_small_lab import Lab

from kfade.data.sequences import TokenSequence
from kfade.evaluate.relearning import Examination, Tuning, attack

AT = (0, 5, 10, 30)  # steps before which is measured
BATCH = 4  # sequences a step
RATE_SHARE = 1 / 3  # of the rate at which the models were trained
GIVEN = 5  # every fifth of the forgotten questions is trained on by the attack "forget"
# What is attacked beside updates: for "forget" the model that has never seen the questions.
CONTROLS = {"benign": "full", "related": "full", "forget": "retrained"}


def attacked(lab: Lab, row: str, kind: str) -> dict[str, Any]:
    """A model fine-tuned on data of that kind, measured on the way.

    Args:
        row: ``full``, ``retrained``, or the row whose update the full model has.

    Returns:
        ``measurements``: ``forget_probability`` and ``forget_loss`` of the forgotten questions that
        no attack trains on, ``retain_kl`` from the full model on the report slice (nats a token);
        each by ``state`` (attacked, reapplied) and ``step``.
    """
    model, update = lab.edited(row)
    forget = lab.group("report").forget
    examine = Examination(
        lab.model,
        forget=[question for i, question in enumerate(forget) if i % GIVEN],
        held_out=lab.slices["report"],
        batch_tokens=BUDGET,
        seed=lab.sizes.seed,
    )
    tuning = Tuning(
        steps=max(AT),
        learning_rate=RATE_SHARE * lab.sizes.rate,
        batch=BATCH,
        batch_tokens=BUDGET,
        seed=lab.sizes.seed,
    )
    sequences = trained_on(lab, kind)
    found = attack(model, update, sequences, examine, tuning=tuning, at=AT)
    return {
        "sequences": len(sequences),
        "measurements": [
            {"state": one.state, "step": one.step, **one.figures.values} for one in found
        ],
    }


def trained_on(lab: Lab, kind: str) -> Sequence[TokenSequence]:
    """Other text; questions about authors that are kept; some of the forgotten ones."""
    match kind:
        case "benign":
            return lab.text
        case "related":
            return [*lab.slices["fit"], *lab.sequences("tuning")]
    return lab.group("report").forget[::GIVEN]
