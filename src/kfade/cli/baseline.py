"""``kfade baseline``: another unlearning method, from data files to an update."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kfade.cli import options as o
from kfade.cli.session import session, show
from kfade.runs.baseline_config import BaselineRequest
from kfade.runs.baselines import baseline as run_baseline
from kfade.runtime.counts import counted


def baseline(
    request: BaselineRequest = BaselineRequest(),
    *,
    out: o.Out,
    resume: o.Resume = False,
    json: o.Json = False,
) -> None:
    """Unlearn with another METHOD, for comparison: from the same data to the same kind of update.

    Writes `update.safetensors`, `manifest.json`, `metrics.json` and `log.jsonl` into OUT. The files
    of MODEL are not changed. Defaults are those of each method's reference code, for models of
    7 billion parameters; for other sizes try several values of `--lr`.

    Example: `kfade baseline npo HuggingFaceTB/SmolLM2-135M-Instruct --forget forget.jsonl
    --retain retain.jsonl --lr 2e-5 --out out/npo`
    """
    with session():
        result = run_baseline(request, out, resume=resume)
    show(result, json, summary(result, request.training.max_kl))


def summary(result: Mapping[str, Any], max_kl: float | None) -> list[str]:
    """The result as lines of text."""
    loss, seconds = result["forget_loss"], result["seconds"]
    lines = [
        f"kept: step {result['kept_step']} of {result['curve'][-1]['step']}",
        f"forget loss {loss['before']:.3f} -> {loss['after']:.3f} nats/token",
        f"retain KL {result['retain_kl']:.2e} nats/token on "
        f"{counted(result['tokens']['held_out'], 'held-out token')}",
        f"{100 * result['lost_in_dtype']:.2g} % of the update is lost to rounding in this dtype",
        "time: " + ", ".join(f"{k} {v:.0f} s" for k, v in seconds.items()),
        f"update written to {result['out']}/update.safetensors",
    ]
    if max_kl is not None and result["retain_kl"] > max_kl:
        lines.insert(
            0, f"note: no evaluation was within --max-kl {max_kl}; that of the lowest KL is kept"
        )
    return lines
