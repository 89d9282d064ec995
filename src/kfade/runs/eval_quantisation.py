"""Evaluation of quantisation: how much of an update is left after the weights are rounded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kfade.evaluate.quantisation import overall, survival
from kfade.models.weights import digest_weights
from kfade.runs.config import ModelConfig
from kfade.runs.evaluation import Subject, evaluation, settings_of
from kfade.runtime.stages import stage


def evaluate_quantisation(
    model: ModelConfig, update: Path, out: Path, *, resume: bool = False
) -> dict[str, Any]:
    """How much of an update survives rounding to bfloat16, int8 and int4, weight by weight.

    Raises:
        InputError: the update does not exist or does not match the model.
    """
    subject = Subject(model, update=update)
    settings = settings_of(subject)
    del settings["quantise"]
    with evaluation("quantisation", out, resume, settings) as run:
        evaluated = run.load(subject)
        digests = {"weights_sha256": digest_weights(evaluated.model)}
        with run.items(**digests) as log:
            with stage("rounding"):
                found = survival(evaluated.model, evaluated.update)
            for name, figures in found.items():
                if name not in log.items:
                    log.add(name, **figures)
            aggregate = {
                "weights": len(found),
                "lost_in_dtype": evaluated.update.lost_fraction(evaluated.model),
                "rounding": overall(found),
            }
            run.finish(log, aggregate, **digests)
    return run.result
