"""How things are called in tables and legends, and how numbers are written."""

from __future__ import annotations

import math
from typing import Any

from kfade.evaluate.questions import name_of_set
from kfade.report.data import Measured, MeasuredModel

# Header entries that may name the data of an evaluation; the first that is there does.
DATA_KEYS = ("questions", "tasks", "members", "prompts", "data", "split")


def method_of(subject: MeasuredModel) -> str:
    """How a run made its model, as in "K-FADE, ekfac, margin, refined 2"; else the model's name."""
    config = subject.manifest.get("config", {})
    if subject.manifest.get("kind") == "unlearn":
        fit, step = config.get("fit", {}), config.get("step", {})
        refined = refinement(config.get("refinement", {}).get("refine"))
        later = step.get("later_objective")
        then = f"then {later}" if later else None
        made = subject.manifest
        spread = [f"{key} {made[key]:g}" for key in ("bound", "noise") if made.get(key)]
        where = "at prompts" if made.get("at_prompts") else None
        corrections = config.get("correction", {}).get("correct")
        corrected = f"corrected {corrections}" if corrections else None
        objective = [step.get("objective"), then, *spread, where]
        parts = ["K-FADE", fit.get("estimator"), *objective, refined, corrected]
        return ", ".join(str(part) for part in parts if part)
    if subject.manifest.get("kind") == "baseline":
        return str(subject.manifest.get("method", subject.name))
    return subject.name


def refinement(iterations: int | None) -> str | None:
    """How often a direction was refined, in words; None for one that was not."""
    return f"refined {iterations}" if iterations else None


def short(value: Any) -> str:
    """A number in three digits, plainly where that is short: 0.0052, 14.3, 4.6e-7, 12 345."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if not math.isfinite(value):
        return "not finite"
    if isinstance(value, int) or 1000 <= abs(value) < 1e7:
        return f"{value:,.0f}".replace(",", " ")
    text = f"{value:.3g}"
    mantissa, _, exponent = text.partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else text


def set_name(measured: Measured) -> str:
    """What an evaluation's data are called: their file or folder, else the evaluation's folder."""
    header = measured.log.header
    for key in DATA_KEYS:
        if isinstance(header.get(key), str):
            return name_of_set(header[key])
    return measured.path.name.removeprefix("eval-").replace("_", " ")
