"""How small a change can bfloat16 measure? KL of a bfloat16 model against the float32 model's.

    python benchmarks/bf16_floor.py --model FILE.gguf

SmolLM2-135M-Instruct with its weights rounded to bfloat16, so that both dtypes run the same model;
held-out retain texts of the demo. Ten down_proj weights are multiplied entry by entry by 1 + s ε, ε
normal, with s such that the float32 model's KL is 1e-5 to 1e-2 nats per token. Reported: that KL;
the float32 model's KL where the edited weights are rounded to bfloat16; what the bfloat16 model
measures for the same rounded weights, with the head's product rounded to bfloat16 and with the
product in float32. Then the floor: the KL of a change that is like rounding, of the model in both
dtypes, in bfloat16 also of one weight moved by one unit; and what the head's product costs. Writes
``benchmarks/results/bf16_floor.jsonl`` and prints it.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from experiments.lab.records import RESULTS, write
from torch import Tensor, nn

import kfade
from kfade.curvature.estimators import KFAC
from kfade.data.batches import Batch, make_batches
from kfade.demo.data import data_file
from kfade.demo.run import demo_model
from kfade.method.measure import Reference, hidden_reference, mean_divergence, rounding_changes
from kfade.method.update import Update
from kfade.models.head import Head, read_head
from kfade.models.load import load_model
from kfade.runtime.stages import Clock, timing

FILE = RESULTS / "bf16_floor.jsonl"
AIMS = (1e-5, 1e-4, 1e-3, 1e-2)
CHANGED = [f"model.layers.{i}.mlp.down_proj.weight" for i in range(10, 20)]
LOW = torch.bfloat16


def rounded_product(head: Head, hidden_ND: Tensor) -> Tensor:
    """The head's product as the model itself makes it."""
    return head.linear(hidden_ND).float()


@contextmanager
def rounded_heads(wanted: bool = True):
    """Within the ``with``, if ``wanted``, heads multiply in the model's dtype."""
    product = rounded_product if wanted else Head._product
    with mock.patch.object(Head, "_product", product):
        yield


def kl(model: nn.Module, base: Reference, changes: dict[str, Tensor]) -> float:
    """Mean KL(model ‖ model with ``changes``)."""
    with Update(changes).applied_to(model):
        edited = hidden_reference(model, base.batches, "edited")
    return mean_divergence(read_head(model), base, edited)


def noise(model: nn.Module, scale: float) -> dict[str, Tensor]:
    """ΔW = s ε ∘ W, float32."""
    generator = torch.Generator().manual_seed(0)
    parameters = dict(model.named_parameters())
    return {
        name: scale
        * parameters[name].detach().float()
        * torch.randn(parameters[name].shape, generator=generator)
        for name in CHANGED
    }


def rounded(model: nn.Module, changes: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is left of ``changes`` when the edited weights are rounded."""
    parameters = dict(model.named_parameters())
    return {
        name: (parameters[name].detach() + change).to(LOW).float() - parameters[name].detach()
        for name, change in changes.items()
    }


def small_changes(full: nn.Module, low: nn.Module, batches: Sequence[Batch]) -> list[dict]:
    """One row for each KL aimed at."""
    base, low_base = (hidden_reference(m, batches, "base") for m in (full, low))
    rows, scale = [], 1e-3
    for aim in AIMS:
        for _ in range(4):  # KL grows as s²
            scale *= (aim / kl(full, base, noise(full, scale))) ** 0.5
        changes = noise(full, scale)
        left = rounded(full, changes)
        row = {"scale": scale, "float32": kl(full, base, changes)}
        row["float32, rounded weights"] = kl(full, base, left)
        for name, wanted in (("head in bfloat16", True), ("head in float32", False)):
            with rounded_heads(wanted):
                row[name] = kl(low, low_base, left)
        rows.append(row)
        print(row, flush=True)
    return rows


def floors(full: nn.Module, low: nn.Module, batches: Sequence[Batch]) -> dict[str, float]:
    """KL of changes that are no changes but for rounding."""
    base, low_base = (hidden_reference(m, batches, "base") for m in (full, low))
    names = kfade.models.weights.parameter_names(kfade.find_targets(full))
    every = rounding_changes(low, names)
    one = {name: torch.zeros_like(change) for name, change in every.items()}
    first = one[names[0]]
    moved = every[names[0]].nonzero()[0]
    first[tuple(moved)] = every[names[0]][tuple(moved)]
    found = {
        "like rounding, float32 passes": kl(full, base, {n: c.float() for n, c in every.items()}),
        "one weight by one unit, float32 passes": kl(
            full, base, {n: c.float() for n, c in one.items()}
        ),
        "float32's own rounding": kl(full, base, rounding_changes(full, names)),
    }
    for name, wanted in (("head in bfloat16", True), ("head in float32", False)):
        with rounded_heads(wanted):
            found[f"like rounding, {name}"] = kl(low, low_base, every)
            found[f"one weight by one unit, {name}"] = kl(low, low_base, one)
            found[f"like rounding of the ten weights, {name}"] = kl(
                low, low_base, rounding_changes(low, CHANGED)
            )
    print(found, flush=True)
    return found


def timings(low: nn.Module, batches: Sequence[Batch], rounds: int) -> dict[str, dict[str, float]]:
    """Seconds, median of ``rounds`` in turns, of a KL measurement and a covariance pass."""
    base = hidden_reference(low, batches, "base")
    targets = kfade.find_targets(low)
    work: dict[str, Callable[[], Any]] = {
        "KL of kept hidden states": lambda: mean_divergence(read_head(low), base, base),
        "KL measurement": lambda: kl(low, base, {}),
        "covariance pass": lambda: KFAC().fit(low, batches, targets),
    }
    seconds: dict[str, dict[str, list[float]]] = {name: {} for name in work}
    for turn in range(rounds + 1):
        for name, do in work.items():
            for head, wanted in (("head in bfloat16", True), ("head in float32", False)):
                with rounded_heads(wanted):
                    clock = Clock()
                    with timing(clock):
                        do()
                spent = clock.seconds.get("covariance", clock.total)  # of a fit, that pass alone
                if turn:  # the first warms up
                    seconds[name].setdefault(head, []).append(spent)
    table = {}
    for name, by_head in seconds.items():
        table[name] = {head: statistics.median(s) for head, s in by_head.items()}
        table[name]["ratio"] = table[name]["head in float32"] / table[name]["head in bfloat16"]
    print(table, flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=demo_model())
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    full, tokenizer = load_model(args.model, dtype="float32", device="cpu")
    full.to(LOW).float()
    low, _ = load_model(args.model, dtype="float32", device="cpu")
    low.to(LOW)
    texts = kfade.load_examples(str(data_file("retain.jsonl")))[: 8 * args.sequences]
    tokens = kfade.encode(texts, tokenizer, length=args.length)[: args.sequences]
    batches = make_batches(tokens)
    result = {
        "setting": {
            "sequences": len(tokens),
            "loss_tokens": sum(batch.loss_tokens for batch in batches),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
        "changes": {"rows": small_changes(full, low, batches)},
        "floors": floors(full, low, batches),
        "seconds": timings(low, batches, args.rounds),
    }
    write(FILE, result)


if __name__ == "__main__":
    main()
