"""What a run is asked to do: frozen dataclasses, one per stage, to and from YAML.

Only the command line reads these; library functions take tensors, models and numbers.
"""

from __future__ import annotations

import contextlib
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from kfade.errors import InputError


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and how it is loaded."""

    model: str = ""
    """Hub id, local folder, GGUF file, or LoRA adapter."""
    revision: str | None = None
    """Branch, tag or commit of the hub; its main branch when unset."""
    tokenizer: str | None = None
    """Where the tokenizer is: hub id or folder; with the model when unset."""
    dtype: str | None = None
    """float32 or bfloat16; the checkpoint's own when unset."""
    device: str | None = None
    """As PyTorch spells it; the GPU if there is one when unset."""
    trust_remote_code: bool = False
    """Let code that comes with a hub model run."""
    shard: bool = False
    """Spread the weights of its blocks over the processes of ``torchrun``."""


@dataclass(frozen=True)
class DataConfig:
    """What to forget, what to keep, and how text becomes sequences."""

    forget: str | None = None
    """JSONL file or hf:NAME[:CONFIG][:SPLIT]."""
    retain: str | None = None
    """The same; a part of it is held out to measure on."""
    sequence_length: int | None = None
    """Tokens of a packed sequence; 512, or the model's window if it is shorter, when unset."""
    template: str = "auto"
    """chat, plain, or auto: the tokenizer's chat template if it has one."""
    template_file: str | None = None
    """A chat template in Jinja, in place of the tokenizer's own."""
    template_args: list = field(default_factory=list)
    """What the template is told, each as name=value."""
    template_sha256: str | None = None
    """Digest of the text of ``template_file``, set when a run begins."""
    template_date: str | None = None
    """The date that a template is told that asks for it; when the run began, when unset."""
    score_end: bool = False
    """Score the EOS that closes a text, too."""
    pack: bool = True
    """Join texts end to end; no-pack keeps one a sequence."""
    truncate: bool = False
    """Cut what is longer than the model's window instead of refusing it."""
    holdout: int | None = None
    """Retain examples held out; a tenth, at least 1 and at most 64, when unset."""
    batch_tokens: int = 4096
    """Positions in one forward pass: the first thing to lower when memory is short."""


@dataclass(frozen=True)
class FitConfig:
    """The curvature and the weights it covers."""

    estimator: str = "ekfac"
    """ekfac, kfac, diagonal or identity."""
    labels: str = "sqrt"
    """sqrt (square-root draw) or sampled pseudo-labels."""
    layers: str | None = None
    """Blocks as in 3-6 or 0,2,8-11, from 0; all when unset."""
    target: str | None = None
    """Glob over parameter names; every feed-forward weight when unset."""
    joint_bias: bool = False
    """Treat a layer's bias as one more column of its weight."""
    memory: str | None = None
    """What a device holds at most, as in 20GB; layers are then fitted in groups."""
    recompute: bool = False
    """Run blocks again in backward passes, of the gradient too, instead of keeping what they
    made."""


@dataclass(frozen=True)
class StepConfig:
    """The direction of each step."""

    objective: str = "margin"
    """margin or ce."""
    later_objective: str | None = None
    """Of all steps after the first; the same when unset."""
    steps: int = 1
    """Number of Gauss-Newton steps."""
    forget_batch: int | None = None
    """Forget sequences a step, without replacement; all when unset."""
    refit: bool = True
    """Fit the curvature anew at each step."""
    damping: float | None = None
    """λ in absolute terms (the paper's)."""
    relative_damping: float | None = None
    """λ as a multiple of each layer's mean eigenvalue; 0.1 when neither is set."""
    exact_norm: bool = False
    """Measure a step's length by the exact Gauss-Newton form instead of the fitted one."""


@dataclass(frozen=True)
class RefinementConfig:
    """How the direction of each step is improved by exact Gauss-Newton products."""

    refine: int = 0
    """Iterations of conjugate gradients; each costs a product."""
    refine_sequences: int = 64
    """Retain sequences in a product, drawn anew for each step; all if there are fewer."""


@dataclass(frozen=True)
class SizeConfig:
    """How far to go: one of alpha, kl and until; a measured KL of 0.01 when none is set."""

    alpha: float | None = None
    """G-norm of each step: predicts a KL of ½α² nats per token."""
    kl: float | None = None
    """Measured KL on held-out retain data, nats per token, of the whole run."""
    until: str | None = None
    """Forgetting target, as in forget_loss=2.7 or forget_probability=0.1."""
    max_kl: float | None = None
    """Cap on the measured KL of the whole run."""


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run's result."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """Which model."""
    data: DataConfig = field(default_factory=DataConfig)
    """Which data."""
    fit: FitConfig = field(default_factory=FitConfig)
    """Which curvature."""
    step: StepConfig = field(default_factory=StepConfig)
    """Which direction."""
    refinement: RefinementConfig = field(default_factory=RefinementConfig)
    """What is done to better it."""
    size: SizeConfig = field(default_factory=SizeConfig)
    """How far."""
    seed: int = 0
    """Keys the draws, the order of forget batches and the held-out split."""


def read_config(path: Path) -> RunConfig:
    """A configuration from YAML; what is not said keeps its default.

    Raises:
        InputError: no such file, not YAML, an unknown key, a value of the wrong type.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such configuration file")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    return _build(RunConfig, data, str(path))


def write_config(config: RunConfig) -> str:
    """The YAML that :func:`read_config` reads back to an equal configuration."""
    return yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)


def deciding(config: RunConfig) -> dict[str, Any]:
    """What a resumed run must ask for again: all of ``config`` but what changes numbers by no more
    than rounding, so that one that ran out of memory can go on with less."""
    values = asdict(config)
    for stage, name in (
        ("fit", "recompute"),
        ("data", "batch_tokens"),
        ("model", "device"),
        ("model", "trust_remote_code"),
    ):
        del values[stage][name]
    return values


def override(config: RunConfig, **given: Any) -> RunConfig:
    """``config`` with every value that is not None put where its name belongs."""
    values = {name: value for name, value in given.items() if value is not None}
    parts: dict[str, Any] = {}
    for stage in fields(RunConfig):
        part: Any = getattr(config, stage.name)
        if is_dataclass(part):
            own = {f.name: values.pop(f.name) for f in fields(part) if f.name in values}
            parts[stage.name] = replace(part, **own)  # type: ignore[type-var]
        else:
            parts[stage.name] = values.pop(stage.name, part)
    assert not values, f"no such setting: {', '.join(values)}"
    return RunConfig(**parts)


def _build(kind: type, data: Any, where: str) -> Any:
    if not isinstance(data, Mapping):
        raise InputError(f"{where}: expected settings as 'name: value', found {data!r}")
    hints = typing.get_type_hints(kind)
    arguments = {}
    for key, value in data.items():
        if key not in hints:
            raise InputError(f"{where}: unknown key '{key}'; known are {', '.join(hints)}")
        hint = hints[key]
        if hasattr(hint, "__dataclass_fields__"):
            arguments[key] = _build(hint, value, f"{where}, {key}")
        else:
            arguments[key] = _checked(hint, value, f"{where}, {key}")
    return kind(**arguments)


def _checked(hint: Any, value: Any, where: str) -> Any:
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if isinstance(value, int) and not isinstance(value, bool) and float in allowed:
        value = float(value)
    if isinstance(value, str) and float in allowed:
        with contextlib.suppress(ValueError):
            value = float(value)  # YAML reads 1e-8 as text
    if type(value) not in allowed:
        names = " or ".join("nothing" if t is types.NoneType else t.__name__ for t in allowed)
        raise InputError(f"{where}: {value!r} is not {names}")
    return value
