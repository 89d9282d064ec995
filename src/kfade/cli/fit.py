"""``kfade fit``: fit the curvature of a model on a retain set and save it."""

from __future__ import annotations

from kfade.cli import options as o
from kfade.cli.plan_page import size
from kfade.cli.session import session, show
from kfade.runs.config import FitRequest
from kfade.runs.fitting import fit as run_fit
from kfade.runtime.counts import counted


def fit(
    request: FitRequest = FitRequest(),
    *,
    out: o.Out,
    config: o.ConfigFile = None,
    resume: o.Resume = False,
    json: o.Json = False,
) -> None:
    """Fit the curvature of MODEL on a retain set and save it for `kfade unlearn --curvature`.

    Writes `curvature-000.safetensors` (one file for each group of layers), `manifest.json`,
    `metrics.json` and `config.yaml` into OUT. `kfade unlearn` with the same retain set and seed
    holds out the same examples. `torchrun --nproc-per-node N -m kfade fit` splits the data over N
    processes, and with `--shard` the model's weights too.
    """
    with session():
        metrics = run_fit(request, out, resume=resume)
    seconds = ", ".join(f"{k} {v:.0f} s" for k, v in metrics["seconds"].items())
    lines = [
        f"{request.fit.estimator} fitted on {counted(metrics['tokens'], 'loss token')}",
        f"time: {seconds}",
        f"{size(metrics['curvature_bytes'])} in {counted(metrics['groups'], 'file')} "
        f"written to {out}",
    ]
    show(metrics, json, lines)
