"""Do float32 and bfloat16 fits give the step that a float64 fit of the same tokens gives?

    python benchmarks/fit_accuracy.py --model FOLDER --text FILE --forget FILE.jsonl

SmolLM2-135M, blocks 10-15 (18 weights), K-FAC and EK-FAC. All fits draw the same pseudo-labels up
to rounding, and solve for the same float32 forget gradient. Reported: the cosine of the directions
in the float64 fit's G-norm, and the forget loss at equal measured KL. Writes
``benchmarks/results/fit_accuracy.json`` and prints a table.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import kfade
from kfade.batches import Sequence, make_batches
from kfade.curvature.curvature import Curvature, Matrices
from kfade.gradient import forget_gradient
from kfade.models import load_model
from kfade.objectives import margin
from kfade.step import StepSize, choose_alpha, gauss_newton_step
from kfade.unlearn import Gauge, parameter_changes
from kfade.update import Update

RESULT = Path(__file__).parent / "results" / "fit_accuracy.json"
LAYERS, DAMPING, KL = "10-15", 0.1, 0.01
FITS = {"K-FAC": kfade.fit_kfac, "EK-FAC": kfade.fit_ekfac}
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--model", type=Path, required=True)
    options.add_argument("--text", type=Path, required=True)
    options.add_argument("--forget", type=Path, required=True)
    options.add_argument("--sequences", type=int, default=8)
    given = options.parse_args()
    model, tokenizer = load_model(str(given.model), dtype="float32", device="cpu")
    length, count = 257, given.sequences
    ids = tokenizer(given.text.read_text(encoding="utf-8")[: 16 * length * count]).input_ids
    scored = (False,) + (True,) * (length - 1)
    packed = [
        Sequence(tuple(ids[i : i + length]), scored) for i in range(0, (count + 4) * length, length)
    ]
    fitted, held_out = packed[:count], packed[count:]
    forget = kfade.encode(kfade.load_examples(str(given.forget)), tokenizer, chat=False)[:48]
    targets = kfade.find_targets(model, layers=LAYERS)
    gradient = forget_gradient(model, make_batches(forget), targets, margin)
    gauge = Gauge(model, make_batches(held_out), make_batches(forget), margin)
    base = gauge.measure(Update({}))
    rows: list[dict[str, Any]] = []
    for estimator, fit in FITS.items():
        exact: Curvature | None = None
        reference: Matrices = {}
        for name, dtype in DTYPES.items():
            print(f"{estimator}, {name}", flush=True)
            other, _ = load_model(str(given.model), dtype="float32", device="cpu")
            other.to(dtype)
            batches = make_batches(fitted, budget=1024)
            found = fit(other, batches, kfade.find_targets(other, layers=LAYERS))
            curvature = Curvature(dict(found.blocks))
            raised = {k: v.to(curvature.blocks[k].eigenvalues.dtype) for k, v in gradient.items()}
            step = gauss_newton_step(curvature, raised, damping=DAMPING, relative=True)
            direction = {k: v.double() for k, v in step.direction.items()}
            if exact is None:
                exact, reference = curvature, direction
            cosine = (
                inner(exact, direction, reference)
                / (inner(exact, direction, direction) * inner(exact, reference, reference)) ** 0.5
            )
            changes = parameter_changes(targets, {k: v.float() for k, v in direction.items()})
            probes = choose_alpha(
                lambda alpha: gauge.measure(Update({}).plus(changes, alpha), alpha),  # noqa: B023
                StepSize(kl=KL),
                share=1.0,
                start=base,
                guess=0.02,
            )
            row = {"estimator": estimator, "fit in": name, "cosine": cosine}
            row |= {"kl": probes[-1].retain_kl, "forget_loss": probes[-1].forget_loss}
            rows.append(row)
    result = {"loss_before": base.forget_loss, "tokens": count * (length - 1), "rows": rows}
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print("| fit | in | cosine in the G-norm | KL | forget loss |\n| --- | --- | --- | --- | --- |")
    for row in rows:
        print(
            f"| {row['estimator']} | {row['fit in']} | {row['cosine']:.6f} | {row['kl']:.4f} "
            f"| {row['forget_loss']:.2f} |"
        )


def inner(curvature: Curvature, first: Matrices, second: Matrices) -> float:
    """xᵀ G̃ y over all layers."""
    product = curvature.matvec(second)
    return sum((first[name] * product[name]).sum().item() for name in product)


if __name__ == "__main__":
    main()
