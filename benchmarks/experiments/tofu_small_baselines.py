"""A baseline's run on TOFU-small, and what it did where the target is."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from competitors import method_of
from equal_forgetting import Curve, Group, Ruler, nats
from fine_tune import block_weights
from tofu_small_data import Sizes
from torch.optim import AdamW

from kfade.baselines.loop import Settings, train
from kfade.baselines.weights import Dense
from kfade.data.sequences import TokenSequence
from kfade.errors import InputError
from kfade.method.update import Update

# Rates are constant: a run ends where it has forgotten enough, which nobody knows beforehand.
START_RATE, RMU_START_RATE = 2e-4, 1e-3
RMU_STEPS = 3  # as many times the steps: its passes end at a third of the blocks


def start_rate(name: str) -> float:
    """Learning rate that the tuning of a baseline begins with."""
    return RMU_START_RATE if name == "rmu" else START_RATE


def steps_of(name: str, rate: float, sizes: Sizes) -> int:
    """Of a baseline's run when it is tuned, at most; it has twice as many when it is reported.

    A lower rate than the first has more of them, in proportion.
    """
    longer = max(1.0, start_rate(name) / rate) * (RMU_STEPS if name == "rmu" else 1)
    return round(sizes.steps * longer)


def baseline(
    name: str,
    rate: float,
    model: Any,
    ruler: Ruler,
    group: Group,
    fit: Sequence[TokenSequence],
    held_out: Sequence[TokenSequence],
    sizes: Sizes,
    report: Callable[[], float] | None = None,
) -> tuple[dict[str, Any], Update | None]:
    """Train until the forget probability is at the target or below and the KL, which training on
    retain data may bring down again, no longer falls; or until the steps are over.

    Args:
        report: KL on the report slice of the model as it is, measured at each evaluation.

    Returns:
        What was measured, with ``kl`` and ``report_kl`` as :func:`at_target` says, and the update
        of the evaluation of the lowest KL at the target or below; of the last where none is.
    """
    method = method_of(name, model, group.forget)
    steps = steps_of(name, rate, sizes)
    given = method.defaults
    reports, best, least_kl = [0.0], Update({}), math.inf

    def enough(checkpoint: Any, update: Update) -> bool:
        nonlocal best, least_kl
        reports.append(report() if report else math.nan)
        *_, before, now = (point["retain_kl"] for point in checkpoint.curve)
        if checkpoint.curve[-1]["forget_probability"] > group.target:
            return False
        if now < least_kl:
            best, least_kl = update, now
        return now >= before

    settings = Settings(
        lr=rate,
        steps=steps * (2 if report else 1),
        batch=sizes.batch,
        weight_decay=given.weight_decay,
        clip=given.clip,
        # Fused, a step over all weights takes a seventh of the time on a CPU.
        optimizer=partial(AdamW, fused=True) if given.optimizer is AdamW else given.optimizer,
        evaluate_every=sizes.every * steps // sizes.steps,
        batch_tokens=400,
        seed=sizes.seed,
    )
    start = time.perf_counter()
    try:
        update = train(
            model,
            method.terms,
            Dense(model, method.trains or block_weights(model)),
            {"forget": group.forget, "retain": fit, "held_out": held_out},
            settings,
            on_evaluation=enough,
        )
    except InputError as error:  # the loss is not finite
        return {"failure": str(error), "curve": []}, None
    kept = ("step", "forget_loss", "forget_probability", "retain_loss")
    curve: Curve = []
    for told, report_kl in zip(update.provenance["curve"], reports, strict=True):
        curve.append({**{key: told[key] for key in kept}, "kl": told["retain_kl"]})
        if report:
            curve[-1]["report_kl"] = report_kl
    row: dict[str, Any] = {"curve": curve, "run_seconds": time.perf_counter() - start}
    found = at_target(curve, group.target)
    if found is None:
        least = min(point["forget_probability"] for point in curve)
        return {**row, "failure": f"not reached: {least:.3f} in {settings.steps} steps"}, update
    return {**row, **found}, best


def at_target(curve: Curve, target: float) -> dict[str, float] | None:
    """Each KL where the held-out one is lowest of all points of the curve at ``target`` or below;
    None where there are none.

    Where the curve passes ``target`` between two evaluations √KL is taken as linear in −log p.
    """
    found: list[dict[str, float]] = []
    for before, after in pairwise(curve):
        if after["forget_probability"] > target:
            continue
        reached = {name: after[name] for name in ("kl", "report_kl") if name in after}
        found.append(reached)
        if before["forget_probability"] > target:
            first, last = nats(before["forget_probability"]), nats(after["forget_probability"])
            share = (nats(target) - first) / (last - first)
            starts = {name: before.get(name, 0.0) for name in reached}
            passing = {
                name: ((1 - share) * starts[name] ** 0.5 + share * end**0.5) ** 2
                for name, end in reached.items()
            }
            found.append(passing)
    return min(found, key=lambda kls: kls["kl"], default=None)
