"""``kfade fit``: the curvature of a model on a retain set, saved for any number of steps."""

from __future__ import annotations

from kfade.cli import options as o
from kfade.cli.session import session, show
from kfade.runs.config import RunConfig, override, read_config
from kfade.runs.fitting import fit as run_fit

_NOT_SETTINGS = ("out", "config", "resume", "json")


def fit(
    model: o.Model,
    out: o.Out,
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
    dtype: o.Dtype = None,
    device: o.Device = None,
    trust_remote_code: o.TrustRemoteCode = None,
    revision: o.Revision = None,
    tokenizer: o.Tokenizer = None,
    shard: o.Shard = None,
    seed: o.Seed = None,
    config: o.Config = None,
    resume: o.Resume = False,
    json: o.Json = False,
) -> None:
    """Fit the curvature of MODEL on a retain set and save it for `kfade unlearn --curvature`.

    Writes `curvature-000.safetensors` (one file a group of layers), `manifest.json`, `metrics.json`
    and `config.yaml` into OUT. The same examples are held out as in a `kfade unlearn` with the same
    retain set and seed. Under `torchrun --nproc-per-node N -m kfade fit ...` the data are split
    over N processes, and with `--shard` the model's weights too.
    """
    given = {name: v for name, v in locals().items() if name not in _NOT_SETTINGS}
    run = override(read_config(config) if config else RunConfig(), **given)
    with session():
        metrics = run_fit(run, out, resume=resume)
    seconds = ", ".join(f"{k} {v:.0f} s" for k, v in metrics["seconds"].items())
    show(
        metrics,
        json,
        [
            f"{run.fit.estimator} fitted on {metrics['tokens']} loss tokens",
            f"time: {seconds}",
            f"{metrics['curvature_bytes'] / 1e6:.0f} MB in {metrics['groups']} file(s) written to "
            f"{out}",
        ],
    )
