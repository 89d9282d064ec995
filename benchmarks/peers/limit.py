"""What the arithmetic of a covariance pass costs on this machine, part by part: one line of JSON.

    python benchmarks/peers/limit.py --model FOLDER --tokens FILE.safetensors --batch 4

Seconds a token of: the model's forward pass, the backward pass of activations alone, the two
products of the head, and the symmetric products at the rate of a matrix product of their shape
(D² multiplications a row: one triangle). No sampling, no copies, no sums: a pass cannot be faster.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

import kfade
from kfade.curvature.capture import capture
from kfade.models.head import hidden_states, read_head
from kfade.models.load import DTYPES, frozen, load_model


def best(work: Callable[[], object], repeats: int = 3) -> float:
    """Seconds of the fastest of some runs, after one that is not counted."""
    work()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--model", type=Path, required=True)
    options.add_argument("--tokens", type=Path, required=True)
    options.add_argument("--batch", type=int, default=4)
    options.add_argument("--length", type=int, default=512)
    options.add_argument("--dtype", choices=DTYPES, default="float32")
    options.add_argument("--threads", type=int, default=2)
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    model, _ = load_model(str(given.model), dtype=given.dtype, device="cpu")
    targets = kfade.find_targets(model)
    tokens_ST = load_file(given.tokens)["tokens"][: given.batch, : given.length]
    input_BT = tokens_ST[:, :-1].contiguous()
    count = input_BT.numel()

    def there_and_back() -> None:
        with capture(targets, on_gradient=lambda *seen: None):
            with torch.enable_grad():
                hidden_BTD = hidden_states(model, input_BT)
            hidden_BTD.backward(hidden_BTD.detach())

    with frozen(model), torch.no_grad():
        head = read_head(model)
        hidden_ND = hidden_states(model, input_BT).flatten(0, 1)
        weight_VD = head.linear.weight
        forward = best(lambda: hidden_states(model, input_BT))
        both = best(there_and_back)
        products = best(
            lambda: [hidden_ND[p] @ weight_VD.T @ weight_VD for p in head.chunks(hidden_ND)]
        )
        widths = {t.input_of: t.shape[1] for t in targets}
        symmetric, rates = 0.0, {}
        for width in [*widths.values(), *(t.shape[0] for t in targets)]:
            if width not in rates:
                rows = torch.randn(count, width).to(hidden_ND.dtype)
                rates[width] = best(lambda rows=rows: rows.T @ rows)
            symmetric += rates[width] / 2
    parts = {
        "forward": forward,
        "backward": both - forward,
        "head products": products,
        "symmetric products": symmetric,
    }
    result = {name: seconds / count for name, seconds in parts.items()}
    print(json.dumps({"dtype": given.dtype, "tokens": count, "seconds_per_token": result}))


if __name__ == "__main__":
    main()
