"""``kfade unlearn``: the whole method, from files to an update."""

from __future__ import annotations

from typing import Any

from kfade.cli import options as o
from kfade.cli.session import session, show
from kfade.runs.config import RunConfig, override, read_config
from kfade.runs.inputs import SavedFit
from kfade.runs.unlearning import unlearn as run_unlearn

_NOT_SETTINGS = {"out", "curvature", "config", "resume", "export_model", "json"}


def unlearn(
    model: o.Model,
    out: o.Out,
    forget: o.Forget = None,
    retain: o.Retain = None,
    sequence_length: o.SequenceLength = None,
    template: o.Template = None,
    template_file: o.TemplateFile = None,
    template_args: o.TemplateArgs = None,
    template_date: o.TemplateDate = None,
    score_end: o.ScoreEnd = None,
    pack: o.Pack = None,
    truncate: o.Truncate = None,
    holdout: o.Holdout = None,
    batch_tokens: o.BatchTokens = None,
    estimator: o.Estimator = None,
    labels: o.Labels = None,
    layers: o.Layers = None,
    target: o.Target = None,
    joint_bias: o.JointBias = None,
    memory: o.Memory = None,
    recompute: o.Recompute = None,
    curvature: o.CurvatureDir = None,
    objective: o.ObjectiveName = None,
    later_objective: o.LaterObjective = None,
    steps: o.Steps = None,
    forget_batch: o.ForgetBatch = None,
    refit: o.Refit = None,
    damping: o.Damping = None,
    relative_damping: o.RelativeDamping = None,
    exact_norm: o.ExactNorm = None,
    refine: o.Refine = None,
    refine_sequences: o.RefineSequences = None,
    alpha: o.Alpha = None,
    kl: o.Kl = None,
    until: o.Until = None,
    max_kl: o.MaxKl = None,
    dtype: o.Dtype = None,
    device: o.Device = None,
    trust_remote_code: o.TrustRemoteCode = None,
    revision: o.Revision = None,
    tokenizer: o.Tokenizer = None,
    shard: o.Shard = None,
    seed: o.Seed = None,
    config: o.Config = None,
    resume: o.Resume = False,
    export_model: o.ExportModel = False,
    json: o.Json = False,
) -> None:
    """Compute an update that makes MODEL forget one set of texts and keep another.

    Writes `update.safetensors`, `manifest.json`, `metrics.json`, `config.yaml` and `log.jsonl`
    into OUT; MODEL itself is not changed.

    Example: `kfade unlearn HuggingFaceTB/SmolLM2-135M-Instruct --forget forget.jsonl
    --retain retain.jsonl --kl 0.01 --out out/run`
    """
    given = {name: value for name, value in locals().items() if name not in _NOT_SETTINGS}
    run = override(read_config(config) if config else RunConfig(), **given)
    saved = SavedFit.read(curvature) if curvature is not None else None
    run = saved.settled(run, given) if saved is not None else run
    with session():
        result = run_unlearn(run, out, saved=saved, resume=resume, export_model=export_model)
    show(result, json, summary(result))


def summary(result: dict[str, Any]) -> list[str]:
    """What a person wants to see at the end."""
    seconds = ", ".join(f"{k} {v:.0f} s" for k, v in result["seconds"].items())
    loss, probability = result["forget_loss"], result["forget_probability"]
    return [
        f"forget loss {loss['before']:.3f} -> {loss['after']:.3f} nats/token, probability of the "
        f"forget texts {probability['before']:.3g} -> {probability['after']:.3g}",
        f"retain KL {result['retain_kl']:.2e} nats/token on {result['tokens']['held_out']} "
        "held-out tokens",
        f"{100 * result['lost_in_dtype']:.2g} % of the update is lost to rounding in this dtype",
        f"time: {seconds}",
        f"update written to {result['out']}/update.safetensors",
    ]
