"""``kfade fit``: the curvature of a model on a retain set, saved for any number of steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from kfade.cli import options as o
from kfade.cli.inputs import inputs
from kfade.cli.session import (
    Loaded,
    load,
    read_retain,
    session,
    show,
    source_of,
    spread,
    to_tokens,
    with_length,
)
from kfade.cli.template import as_used, dated
from kfade.cli.unlearn import curvature_bytes, git_sha
from kfade.curvature.store import Store
from kfade.data.batches import make_batches
from kfade.data.sequences import TokenSequence, digest_sequences
from kfade.method.preflight import preflight
from kfade.method.unlearn import versions
from kfade.models.layers import digest_weights, parameter_names, weight_digests
from kfade.models.lengths import length_class
from kfade.models.load import provenance
from kfade.runs.config import RunConfig, deciding, override, read_config, write_config
from kfade.runtime import distributed
from kfade.runtime.run_dir import RunDir
from kfade.runtime.stages import Clock, stage

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
    run = replace(run, data=dated(run.data, out, resume=resume))
    fit_function, draw = o.fit_of(run.fit.estimator), o.draw_of(run.fit.labels)
    examples, _ = read_retain(run.data, run.seed)
    with session() as clock, RunDir(out, deciding(run), resume=resume) as folder:
        loaded = load(run.model, run.fit)
        run = replace(run, data=as_used(with_length(run.data, loaded), loaded.tokenizer))
        budget = curvature_bytes(run, loaded)
        spread(run.model, loaded.model)
        with stage("load"):
            preflight(loaded.model, loaded.targets, recompute=run.fit.recompute)
        sequences = to_tokens(examples, loaded, run.data)
        digests = weight_digests(loaded.model, "model")
        folder.reads(inputs(digests["model_sha256"], {"retain": sequences}))
        weight = loaded.targets[0].weight
        batches = make_batches(
            sequences,
            budget=run.data.batch_tokens,
            device=weight.device,
            group=length_class(loaded.model),
        )
        with stage("fit"):
            curvature = fit_function(
                loaded.model,
                batches,
                loaded.targets,
                draw=draw,
                seed=run.seed,
                recompute=run.fit.recompute,
                memory=budget,
                store=Store(folder.state, {**_made_for(run, loaded, sequences), **digests}),
            )
        files = sorted(folder.state.glob("curvature-*.safetensors"))
        metrics = _metrics(clock, sequences, files)
        distributed.barrier()
        for path in files:
            folder.publish(path.name)
        manifest = {
            "kind": "fit",
            **curvature.provenance,
            "git_sha": git_sha(),
            "config": asdict(run),
        }
        folder.finish(manifest, metrics, write_config(run))
    seconds = ", ".join(f"{k} {v:.0f} s" for k, v in metrics["seconds"].items())
    show(
        {"out": str(out), **metrics},
        json,
        [
            f"{run.fit.estimator} fitted on {metrics['tokens']} loss tokens",
            f"time: {seconds}",
            f"{metrics['curvature_bytes'] / 1e6:.0f} MB in {len(files)} file(s) written to {out}",
        ],
    )


def _made_for(run: RunConfig, loaded: Loaded, sequences: Sequence[TokenSequence]) -> dict[str, Any]:
    """What the curvature belongs to, kept with it."""
    return {
        "model": run.model.model,
        **provenance(source_of(run.model)),
        "dtype": str(loaded.targets[0].weight.dtype).removeprefix("torch."),
        "settings": deciding(run)["fit"],
        "weights_sha256": {
            t.name: digest_weights(loaded.model, parameter_names([t])) for t in loaded.targets
        },
        "retain_sha256": digest_sequences(sequences),
        "versions": versions(),
    }


def _metrics(
    clock: Clock, sequences: Sequence[TokenSequence], files: Sequence[Path]
) -> dict[str, Any]:
    """What ``metrics.json`` tells of a fit that is written to ``files``."""
    stages = ("load", "covariance", "eigh", "lambda", "save")
    seconds = {name: clock.seconds.get(name, 0.0) for name in stages}
    return {
        "seconds": {**seconds, "total": clock.total},
        "peak_bytes": max(clock.peak_bytes.values()),
        "peak_bytes_by_stage": clock.peak_bytes,
        "tokens": sum(s.loss_tokens for s in sequences),
        "curvature_bytes": sum(path.stat().st_size for path in files),
        "groups": len(files),
        "processes": distributed.count(),
    }
