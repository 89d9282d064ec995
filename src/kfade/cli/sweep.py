"""``kfade sweep``: damping × step size (× objective × blocks) from one saved curvature."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from kfade.cli import options as o
from kfade.cli.session import session, show
from kfade.errors import InputError
from kfade.method.grid import ALL, grid
from kfade.method.settings import DEFAULT_DAMPING
from kfade.method.step import StepSize
from kfade.runs.config import RunConfig, SizeConfig, override, read_config
from kfade.runs.inputs import SavedFit
from kfade.runs.sweeping import Request, point_line
from kfade.runs.sweeping import sweep as run_sweep
from kfade.runs.template import dated

DEFAULT_KLS = "0.001,0.003,0.01,0.03"
DEFAULT_MAX_KL = 0.02  # twice what an unlearn that is told nothing aims at
GRID = "Grid (values parted by commas)"


def _values(text: str, name: str):
    return typer.Option(name, help=text, rich_help_panel=GRID, show_default=False)


CurvatureDir = Annotated[
    Path, typer.Option("--curvature", help="What kfade fit saved.", rich_help_panel=o.FIT)
]
Objectives = Annotated[str | None, _values("margin, ce. [margin]", "--objective")]
Layers = Annotated[
    str | None,
    _values("Blocks; choices parted by semicolons, as in '0-5;6-11;all'. [all]", "--layers"),
]
Dampings = Annotated[str | None, _values("Dampings, absolute.", "--damping")]
RelativeDampings = Annotated[
    str | None,
    _values("Dampings in multiples of a layer's mean eigenvalue. [0.1]", "--relative-damping"),
]
Refines = Annotated[
    str | None,
    _values("Iterations of conjugate gradients on exact products. [0]", "--refine"),
]
Alphas = Annotated[str | None, _values("G-norms of the step.", "--alpha")]
Kls = Annotated[str | None, _values(f"Measured KLs, nats per token. [{DEFAULT_KLS}]", "--kl")]
Budget = Annotated[
    float,
    typer.Option(
        "--max-kl",
        help="A point is picked within this measured KL, nats per token.",
        rich_help_panel=o.RUN,
    ),
]
_SETTINGS = {
    *("model", "forget", "retain", "forget_batch", "sequence_length", "pack"),
    *("template", "template_file", "template_args", "template_date", "score_end"),
    *("truncate", "holdout", "batch_tokens", "dtype", "device", "trust_remote_code", "seed"),
    *("revision", "tokenizer"),
    "refine_sequences",
}


def sweep(
    model: o.Model,
    curvature: CurvatureDir,
    out: o.Out,
    forget: o.Forget = None,
    retain: o.Retain = None,
    objective: Objectives = None,
    layers: Layers = None,
    damping: Dampings = None,
    relative_damping: RelativeDampings = None,
    refine: Refines = None,
    refine_sequences: o.RefineSequences = None,
    alpha: Alphas = None,
    kl: Kls = None,
    max_kl: Budget = DEFAULT_MAX_KL,
    forget_batch: o.ForgetBatch = None,
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
    recompute: o.Recompute = None,
    dtype: o.Dtype = None,
    device: o.Device = None,
    trust_remote_code: o.TrustRemoteCode = None,
    revision: o.Revision = None,
    tokenizer: o.Tokenizer = None,
    seed: o.Seed = None,
    config: o.Config = None,
    resume: o.Resume = False,
    json: o.Json = False,
) -> None:
    """Measure a grid of one-step edits of MODEL, and write the update of the best one.

    The best: the highest forget loss among the points whose measured retain KL is within --max-kl.
    Settings that are not given are those of the fit, or of --config. Writes `points.jsonl`, and
    for the picked point what `kfade unlearn` writes.

    Example: `kfade sweep MODEL --curvature out/fit --forget forget.jsonl
    --relative-damping 0.01,0.1,1 --kl 0.003,0.01,0.03 --out out/sweep`
    """
    given = {name: value for name, value in locals().items() if name in _SETTINGS}
    fitted = read_config(curvature / "config.yaml")
    saved = SavedFit.read(curvature)
    run = override(read_config(config) if config else fitted, **given)
    run = replace(run, step=replace(run.step, steps=1), size=SizeConfig())
    run = saved.settled(override(run, recompute=recompute), {})
    whole = {name: getattr(saved.settings, name) for name in ("layers", "target")}
    run = replace(run, fit=replace(run.fit, **whole))  # points name blocks of their own
    run = replace(run, data=dated(run.data, out, resume=resume))
    dampings, relative = _dampings(damping, relative_damping, run)
    points = grid(
        _words(objective or run.step.objective, ","),
        _words(layers or ALL, ";"),
        dampings,
        _sizes(alpha, kl),
        relative=relative,
        refine=_counts(refine, run),
    )
    if not max_kl > 0:
        raise InputError(f"--max-kl {max_kl}: give a positive number")
    with session():
        result = run_sweep(Request(run, points, saved, max_kl), out, resume=resume)
    show(result, json, _lines(result))


def _words(given: str, separator: str) -> list[str]:
    return [word.strip() for word in given.split(separator) if word.strip()]


def _numbers(given: str, option: str) -> list[float]:
    try:
        return [float(word) for word in _words(given, ",")]
    except ValueError:
        raise InputError(f"{option} {given}: give numbers parted by commas") from None


def _dampings(
    absolute: str | None, relative: str | None, run: RunConfig
) -> tuple[list[float], bool]:
    """(dampings, whether they are relative); the configuration's where none is given."""
    if absolute is not None and relative is not None:
        raise InputError("give --damping or --relative-damping, not both")
    if absolute is not None:
        return _numbers(absolute, "--damping"), False
    if relative is not None:
        return _numbers(relative, "--relative-damping"), True
    if run.step.damping is not None:
        return [run.step.damping], False
    own = run.step.relative_damping
    return [DEFAULT_DAMPING if own is None else own], True


def _counts(given: str | None, run: RunConfig) -> list[int]:
    """Numbers of iterations; the configuration's where none is given."""
    if given is None:
        return [run.refinement.refine]
    try:
        return [int(word) for word in _words(given, ",")]
    except ValueError:
        raise InputError(f"--refine {given}: give whole numbers parted by commas") from None


def _sizes(alpha: str | None, kl: str | None) -> list[StepSize]:
    if alpha is not None and kl is not None:
        raise InputError("give --alpha or --kl, not both")
    if alpha is not None:
        return [StepSize(alpha=value) for value in _numbers(alpha, "--alpha")]
    return [StepSize(kl=value) for value in _numbers(kl or DEFAULT_KLS, "--kl")]


def _lines(result: Mapping[str, Any]) -> list[str]:
    figures = result["sweep"]
    lines = [
        f"{figures['points']} points, {figures['failed']} of them failed; not beaten by any other:",
        *(f"  {point_line(name, result['points'][name])}" for name in figures["pareto"]),
    ]
    budget = f"the KL budget of {figures['max_kl']:.3g} nats/token"
    if figures["picked"] is None:
        told = f"no point is within {budget}: no update written; raise --max-kl or sweep less far"
        return [*lines, told]
    return [
        *lines,
        f"picked, the highest forget loss within {budget}: {figures['picked']}",
        f"its update written to {result['out']}/update.safetensors",
    ]
