"""``kfade sweep``: damping × step size (× objective × blocks) from one saved curvature."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kfade.cli import options as o
from kfade.cli.session import session, show
from kfade.runs.sweep_config import SweepRequest
from kfade.runs.sweeping import point_line
from kfade.runs.sweeping import sweep as run_sweep
from kfade.runtime.counts import counted


def sweep(
    request: SweepRequest,
    *,
    out: o.Out,
    config: o.ConfigFile = None,
    resume: o.Resume = False,
    json: o.Json = False,
) -> None:
    """Measure a grid of one-step edits of MODEL and write the update of the best one.

    The best point has the highest forget loss of all points with a measured retain KL up to
    --max-kl. Settings that are not given are those of the fit, or of --config. Writes
    `points.jsonl`, and for the best point the files of `kfade unlearn`.

    Example: `kfade sweep MODEL --curvature out/fit --forget forget.jsonl
    --relative-damping 0.01,0.1,1 --kl 0.003,0.01,0.03 --out out/sweep`
    """
    with session():
        result = run_sweep(request, out, resume=resume)
    show(result, json, _lines(result))


def _lines(result: Mapping[str, Any]) -> list[str]:
    figures = result["sweep"]
    lines = [
        f"{counted(figures['points'], 'point')}, {figures['failed']} of them failed; on the Pareto "
        "front:",
        *(f"  {point_line(name, result['points'][name])}" for name in figures["pareto"]),
    ]
    budget = f"the KL budget of {figures['max_kl']:.3g} nats/token"
    if figures["picked"] is None:
        note = (
            f"no point is within {budget}: no update written; raise --max-kl or use smaller steps"
        )
        return [*lines, note]
    return [
        *lines,
        f"picked, the highest forget loss within {budget}: {figures['picked']}",
        f"its update written to {result['out']}/update.safetensors",
    ]
