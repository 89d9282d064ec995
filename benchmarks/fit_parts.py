"""What each part of the fit's engine is worth: the same work with and without it, in one run.

    python benchmarks/fit_parts.py --model FOLDER --text FILE

On SmolLM2-135M: 4 sequences of 511 positions, two threads. Writes
``benchmarks/results/fit_parts.jsonl`` and prints the table of ``docs/performance.md``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from common import options_of, sequences_of, token_rows
from experiments.lab.records import RESULTS, Record, table, write
from peers.limit import best
from torch import Tensor

import kfade
from kfade.curvature.capture import capture
from kfade.curvature.draws import sampled_labels, square_root_draw, token_keys
from kfade.curvature.factors import CovarianceSum, add_sequence_squares
from kfade.curvature.fit import pseudo_gradients
from kfade.data.batches import make_batches
from kfade.models.head import hidden_states, read_head
from kfade.models.load import frozen, load_model

FILE = RESULTS / "fit_parts.jsonl"
WIDTHS = (576, 1536)


def main() -> None:
    options = options_of(__doc__)
    options.add_argument("--threads", type=int, default=2)
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    model, tokenizer = load_model(str(given.model), dtype="float32", device="cpu")
    sequences = sequences_of(token_rows(tokenizer, given.text, 4, 512))
    parts: dict[str, Record] = {}

    def compare(name: str, without: Callable[[], object], with_: Callable[[], object]) -> None:
        before, after = best(without), best(with_)
        parts[name] = {"without": before, "with": after, "ratio": before / after}
        print(name, parts[name], flush=True)

    with frozen(model):
        of_the_pass(compare, model, make_batches(sequences)[0])
    of_the_products(compare)
    write(FILE, parts)
    rows = [
        [name, f"{p['without']:.3f}", f"{p['with']:.3f}", f"{p['ratio']:.2f}"]
        for name, p in parts.items()
    ]
    print(table("part | without, s | with, s | ratio", rows))


def of_the_pass(compare: Callable[..., None], model: Any, batch: Any) -> None:
    """Parts of forward, backward and head."""
    targets = kfade.find_targets(model)
    upper = kfade.find_targets(model, layers="24-29")
    head = read_head(model)

    def pass_over(some: Any, weight_gradients: bool = False) -> None:
        for target in some:
            target.weight.requires_grad_(weight_gradients)
        with capture(some, on_gradient=lambda *seen: None), torch.enable_grad():
            hidden_BTD = hidden_states(model, batch.input_BT)
            hidden_BTD.backward(hidden_BTD.detach())
        for target in some:
            target.weight.requires_grad_(False)
            target.weight.grad = None

    compare(
        "no weight gradients (90 weights)",
        lambda: pass_over(targets, weight_gradients=True),
        lambda: pass_over(targets),
    )
    compare(
        "backward stops at the lowest target (blocks 24-29)",
        lambda: pass_over(targets),
        lambda: pass_over(upper),
    )
    with torch.no_grad():
        hidden_ND = hidden_states(model, batch.input_BT)[batch.loss_BT]

    def whole_head() -> Tensor:
        with torch.enable_grad():
            h = hidden_ND.detach().requires_grad_()
            logits_NV = head(h)
        labels_N = torch.multinomial(logits_NV.detach().softmax(dim=-1), 1)[:, 0]
        loss = -logits_NV.log_softmax(dim=-1).gather(1, labels_N[:, None]).sum()
        return torch.autograd.grad(loss, h)[0]

    pseudo = pseudo_gradients(sampled_labels, 0, 0)
    compare(
        "head in chunks, labels by one uniform number (against whole logits, multinomial)",
        whole_head,
        lambda: pseudo(head, batch, hidden_ND),
    )
    keys_N = token_keys(0, 0, torch.zeros(511).long(), torch.arange(511))
    p_NV = torch.rand(511, 49152).softmax(dim=-1)
    compare(
        "square-root draw (against sampled labels; the draw alone)",
        lambda: sampled_labels(p_NV, keys_N),
        lambda: square_root_draw(p_NV, keys_N),
    )


def of_the_products(compare: Callable[..., None]) -> None:
    """Parts of the sums."""
    rows = {width: torch.randn(2044, width) for width in WIDTHS}
    sums = {width: torch.zeros(width, width) for width in WIDTHS}

    def factors_of(add: Callable[[int], None], shared: bool = True) -> None:
        for width in (576, 1536, 1536, 1536, 576, *(() if shared else (576,))):
            add(width)

    def panels(width: int) -> None:
        covariance = CovarianceSum.__new__(CovarianceSum)
        covariance.width, covariance.sum_ = width, sums[width]
        covariance.add(rows[width])

    def full(width: int) -> None:
        sums[width].addmm_(rows[width].T, rows[width])

    compare("one triangle in panels", lambda: factors_of(full), lambda: factors_of(panels))
    compare(
        "gate and up share A", lambda: factors_of(panels, shared=False), lambda: factors_of(panels)
    )
    narrow = {width: x.to(torch.bfloat16) for width, x in rows.items()}

    def low(width: int) -> None:
        covariance = CovarianceSum.__new__(CovarianceSum)
        covariance.width, covariance.sum_ = width, sums[width]
        covariance.add(narrow[width])

    compare("bfloat16 rows, float32 sums", lambda: factors_of(panels), lambda: factors_of(low))
    grid = torch.zeros(1536, 576)
    long_g, long_a = torch.randn(4096, 1536), torch.randn(4096, 576)
    whole = [2048, 2048]
    q = torch.linalg.qr(torch.randn(1536, 1536))[0]
    compare(
        "long sequences turned after the product (2 of 2048 tokens, the output side)",
        lambda: add_sequence_squares(grid, long_g @ q, long_a, whole),
        lambda: add_sequence_squares(grid, long_g, long_a, whole, q_out=q),
    )
    matrix = rows[1536].T @ rows[1536]
    compare(
        "eigendecomposition in float32 (against float64)",
        lambda: torch.linalg.eigh(matrix.double()),
        lambda: torch.linalg.eigh(matrix),
    )
    compare(
        "looking for NaN and Inf by a sum (against each entry)",
        lambda: [torch.isfinite(rows[1536]).all() for _ in range(10)],
        lambda: [torch.isfinite(rows[1536].sum()) for _ in range(10)],
    )


if __name__ == "__main__":
    main()
