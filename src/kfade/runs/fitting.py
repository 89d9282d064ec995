"""Fit: the curvature of a model on a retain set, from a configuration to a folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from kfade.curvature.store import Store
from kfade.data.batches import make_batches
from kfade.data.sequences import TokenSequence, digest_sequences
from kfade.errors import InputError
from kfade.method.preflight import preflight
from kfade.models.lengths import length_class
from kfade.models.load import provenance
from kfade.models.weights import digest_weights, parameter_names, weight_digests
from kfade.runs.choices import draw_of, estimator_of, top_of
from kfade.runs.config import FitRequest, result_settings, write_config
from kfade.runs.experts import leave_out_rare
from kfade.runs.inputs import input_digests
from kfade.runs.memory import make_room
from kfade.runs.session import (
    Loaded,
    complete_data,
    load,
    read_retain,
    say_sets,
    source_of,
    to_tokens,
)
from kfade.runs.template import with_date
from kfade.runtime import distributed
from kfade.runtime.provenance import git_sha, versions
from kfade.runtime.run_dir import RunDir
from kfade.runtime.stages import Clock, stage, timing


def fit(run: FitRequest, out: Path, *, resume: bool = False) -> dict[str, Any]:
    """Fit the curvature on the retain set and write it to the folder ``out``; returns the metrics.

    Raises:
        InputError: a setting or a file is wrong, or a resumed fit has other settings than the
            interrupted one in ``out``.
    """
    run = replace(run, data=with_date(run.data, out, resume=resume))
    estimator = estimator_of(run.fit.estimator, draw_of(run.fit.labels))
    if top_of(run.fit.experts):
        raise InputError(
            f"--experts {run.fit.experts}: the forget gradient chooses these; leave it out here, "
            "and give it to kfade unlearn with the curvature"
        )
    examples, _ = read_retain(run.data, run.seed)
    clock = Clock()
    with timing(clock), RunDir(out, result_settings(run), resume=resume) as folder:
        loaded = load(run.model, run.fit, shard=run.shard)
        run = replace(run, data=complete_data(run.data, loaded))
        room = make_room(run, loaded, estimator, "fit", folder)
        with stage("load"):
            head = preflight(loaded.model, loaded.targets, recompute=run.fit.recompute)
        sequences = to_tokens(examples, loaded, run.data)
        loaded = leave_out_rare(loaded, sequences, run.fit, run.data.batch_tokens)
        digests = weight_digests(loaded.model, "model")
        say_sets({"retain": sequences}, [examples], run.data)
        folder.reads(input_digests(digests["model_sha256"], {"retain": sequences}))
        batches = make_batches(
            sequences,
            budget=run.data.batch_tokens,
            device=loaded.targets[0].device,
            group=length_class(loaded.model),
        )
        with stage("fit"):
            curvature = estimator.fit(
                loaded.model,
                batches,
                loaded.targets,
                seed=run.seed,
                recompute=room.recompute,
                memory=room.memory,
                store=Store(folder.state, {**_made_for(run, loaded, sequences), **digests}),
                head=head,
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
    return {"out": str(out), **metrics}


def _made_for(
    run: FitRequest, loaded: Loaded, sequences: Sequence[TokenSequence]
) -> dict[str, Any]:
    """The provenance of the curvature: model, weights, settings and data."""
    return {
        "model": run.model.model,
        **provenance(source_of(run.model)),
        "dtype": str(loaded.targets[0].dtype).removeprefix("torch."),
        "settings": result_settings(run)["fit"],
        "weights_sha256": {
            t.name: digest_weights(loaded.model, parameter_names([t])) for t in loaded.targets
        },
        "retain_sha256": digest_sequences(sequences),
        "versions": versions(),
    }


def _metrics(
    clock: Clock, sequences: Sequence[TokenSequence], files: Sequence[Path]
) -> dict[str, Any]:
    """The metrics of a fit whose curvature is in ``files``."""
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
