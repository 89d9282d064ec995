"""``kfade unlearn``: the complete method, from data files to an update."""

from __future__ import annotations

from typing import Any

from kfade.cli import options as o
from kfade.cli.session import session, show
from kfade.runs.config import RunConfig
from kfade.runs.inputs import SavedFit
from kfade.runs.unlearning import unlearn as run_unlearn
from kfade.runtime.counts import counted


def unlearn(
    run: RunConfig = RunConfig(),
    *,
    out: o.Out,
    curvature: o.CurvatureFolder = None,
    config: o.ConfigFile = None,
    resume: o.Resume = False,
    export_model: o.ExportModel = False,
    json: o.Json = False,
) -> None:
    """Compute an update that makes MODEL forget one set of texts and keep another.

    Writes `update.safetensors`, `manifest.json`, `metrics.json`, `config.yaml` and `log.jsonl`
    into OUT. The files of MODEL are not changed.

    Example: `kfade unlearn HuggingFaceTB/SmolLM2-135M-Instruct --forget forget.jsonl
    --retain retain.jsonl --kl 0.01 --out out/run`
    """
    saved = SavedFit.read(curvature) if curvature is not None else None
    with session():
        result = run_unlearn(run, out, saved=saved, resume=resume, export_model=export_model)
    show(result, json, summary(result))


def summary(result: dict[str, Any]) -> list[str]:
    """The result as lines of text."""
    seconds = ", ".join(f"{k} {v:.0f} s" for k, v in result["seconds"].items())
    loss, probability = result["forget_loss"], result["forget_probability"]
    why = result["steps"][-1].get("ended_by")  # steps of an older version have none
    notes = [f"note: the run ended short of its size: {why}"] if why else []
    return [
        *notes,
        f"forget loss {loss['before']:.3f} -> {loss['after']:.3f} nats/token, probability of the "
        f"forget texts {probability['before']:.3g} -> {probability['after']:.3g}",
        f"retain KL {result['retain_kl']:.2e} nats/token on "
        f"{counted(result['tokens']['held_out'], 'held-out token')}",
        f"{100 * result['lost_in_dtype']:.2g} % of the update is lost to rounding in this dtype",
        f"time: {seconds}",
        f"update written to {result['out']}/update.safetensors",
    ]
