"""Do float32 and bfloat16 fits give the step that a float64 fit of the same tokens gives?

    python benchmarks/fit_accuracy.py --model FOLDER --text FILE --forget FILE.jsonl

SmolLM2-135M with its weights rounded to bfloat16, so that all dtypes run the same model; blocks
24-29 (18 weights), K-FAC and EK-FAC. All fits draw the same pseudo-labels up to rounding, and solve
for the same float32 forget gradient. Reported: the cosine of the directions in the float64 fit's
G-norm, and the forget loss at equal measured KL; as a yardstick the same of a float32 fit with
other pseudo-labels. Writes
``benchmarks/results/fit_accuracy.jsonl`` and prints a table.

A processor without bfloat16 products takes a hundred times longer for them than for float32:
there, each product's bfloat16 inputs are multiplied in float32 and its result rounded to bfloat16,
which is what the hardware does.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import options_of, sequences_of, token_rows
from experiments.lab.records import RESULTS, Record, table, write
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kfade
from kfade import Damping
from kfade.curvature.curvature import Curvature
from kfade.curvature.vectors import Vector
from kfade.data.batches import make_batches
from kfade.data.chat import ChatTemplate
from kfade.method.gauge import Gauge, parameter_changes
from kfade.method.gradient import forget_gradient
from kfade.method.objectives import margin
from kfade.method.size import StepSize, choose_alpha
from kfade.method.step import gauss_newton_step
from kfade.method.update import Update
from kfade.models.load import load_model

FILE = RESULTS / "fit_accuracy.jsonl"
LAYERS, DAMPING, KL = "24-29", 0.1, 0.01
FITS = {  # name -> dtype, seed of the pseudo-labels
    "float64": (torch.float64, 0),
    "float32": (torch.float32, 0),
    "bfloat16": (torch.bfloat16, 0),
    "float32, other labels": (torch.float32, 1),
}
aten = torch.ops.aten
PRODUCTS = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
}


class RoundedProducts(TorchDispatchMode):
    """bfloat16 products as hardware makes them: sums in float32, the result rounded once."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        low = [a for a in args if isinstance(a, Tensor) and a.dtype == torch.bfloat16]
        if func not in PRODUCTS or not low:
            return func(*args, **(kwargs or {}))
        raised = [a.float() if isinstance(a, Tensor) else a for a in args]
        found = func(*raised, **(kwargs or {}))
        if isinstance(found, Tensor):
            return found.bfloat16()
        if func is aten._scaled_dot_product_flash_attention_for_cpu.default:
            return found[0].bfloat16(), found[1]  # the second is a logarithm of sums, in float32
        return tuple(part.bfloat16() for part in found)


def has_bfloat16_products() -> bool:
    """Whether a bfloat16 product is not far slower than a float32 one."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(256, 256, dtype=dtype)
        x @ x
        start = time.perf_counter()
        x @ x
        seconds[dtype] = time.perf_counter() - start
    return seconds[torch.bfloat16] < 5 * seconds[torch.float32]


@contextlib.contextmanager
def computing_in(dtype: torch.dtype) -> Iterator[None]:
    """Products of ``dtype``, rounded by hand where the machine has none."""
    if dtype != torch.bfloat16 or has_bfloat16_products():
        yield
        return
    with RoundedProducts():
        yield


def main() -> None:
    options = options_of(__doc__)
    options.add_argument("--forget", type=Path, required=True)
    options.add_argument("--sequences", type=int, default=16)
    given = options.parse_args()
    model, tokenizer = rounded_model(given.model)
    length, count = 257, given.sequences
    packed = sequences_of(token_rows(tokenizer, given.text, count + 4, length))
    fitted, held_out = make_batches(packed[:count], budget=1024), packed[count:]
    forget = kfade.encode(
        kfade.load_examples(str(given.forget)), tokenizer, template=ChatTemplate(enabled=False)
    )[:48]
    targets = kfade.find_targets(model, layers=LAYERS)
    gradient = forget_gradient(model, make_batches(forget), targets, margin)
    gauge = Gauge(model, make_batches(held_out), make_batches(forget))
    base = gauge.measure(Update({}), margin)
    exact: dict[str, tuple[Curvature, Vector]] = {}
    rows: list[Record] = []
    for name, (dtype, seed) in FITS.items():
        for estimator, curvature in fits(given.model, fitted, dtype, seed):
            print(f"{estimator}, {name}", flush=True)
            raised = {k: v.to(curvature.blocks[k].eigenvalues.dtype) for k, v in gradient.items()}
            step = gauss_newton_step(curvature, raised, damping=Damping(DAMPING))
            direction = {k: v.double() for k, v in step.direction.items()}
            reference, wanted = exact.setdefault(estimator, (curvature, direction))
            lengths = inner(reference, direction, direction) * inner(reference, wanted, wanted)
            changes = parameter_changes(targets, {k: v.float() for k, v in direction.items()})
            probes = choose_alpha(
                lambda alpha: gauge.measure(Update({}).plus(changes, alpha), margin, alpha),  # noqa: B023
                StepSize(kl=KL),
                share=1.0,
                start=base,
                guess=0.02,
            )
            cosine = inner(reference, direction, wanted) / lengths**0.5
            row = {"estimator": estimator, "fit in": name, "cosine": cosine}
            row |= {"kl": probes[-1].retain_kl, "forget_loss": probes[-1].forget_loss}
            rows.append(row)
    rows.sort(key=lambda row: row["estimator"], reverse=True)
    setting = {
        "loss_before": base.forget_loss,
        "tokens": count * (length - 1),
        "bfloat16 products by hand": not has_bfloat16_products(),
    }
    named = {f"{row['estimator']}, {row['fit in']}": row for row in rows}
    write(FILE, {"setting": setting, **named})
    lines = []
    for row in rows:
        cosine, kl, loss = f"{row['cosine']:.6f}", f"{row['kl']:.4f}", f"{row['forget_loss']:.2f}"
        lines.append([row["estimator"], row["fit in"], cosine, kl, loss])
    print(table("fit | in | cosine in the G-norm | KL | forget loss", lines))


def rounded_model(folder: Path) -> tuple[Any, Any]:
    """The model in float32, its weights such as bfloat16 holds, and its tokenizer."""
    model, tokenizer = load_model(str(folder), dtype="float32", device="cpu")
    return model.to(torch.bfloat16).to(torch.float32), tokenizer


def fits(
    folder: Path, batches: list[Any], dtype: torch.dtype, seed: int
) -> Iterator[tuple[str, Curvature]]:
    """K-FAC, then EK-FAC, of the model in ``dtype``."""
    model, _ = rounded_model(folder)
    targets = kfade.find_targets(model.to(dtype), layers=LAYERS)
    with computing_in(dtype):
        kfac = kfade.KFAC().fit(model, batches, targets, seed=seed)
        ekfac = kfade.EKFAC().correct(kfac, model, batches, targets, seed=seed)
    yield "K-FAC", kfac
    yield "EK-FAC", ekfac


def inner(curvature: Curvature, first: Vector, second: Vector) -> float:
    """xᵀ G̃ y over all layers."""
    product = curvature.matvec(second)
    return sum((first[name] * product[name]).sum().item() for name in product)


if __name__ == "__main__":
    main()
