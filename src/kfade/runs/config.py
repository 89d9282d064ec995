"""What a run is asked to do: frozen dataclasses, one per stage, to and from YAML.

Only ``runs/`` and ``cli/`` read these; library functions take tensors, models and numbers.
A class extends another where a command reads more of the same kind than a second command does.
"""

from __future__ import annotations

import contextlib
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from cyclopts import Parameter

from kfade.errors import InputError
from kfade.runs import options as o


@o.settings(o.RUN)
@dataclass(frozen=True)
class ModelSource:
    """Which model, and in which precision."""

    model: Annotated[str, o.argument("model")] = ""
    """Hub id, local folder, GGUF file, or LoRA adapter."""
    revision: str | None = field(default=None, kw_only=True)
    """Branch, tag or commit of the model on the hub. Unset: its main branch."""
    dtype: str | None = field(default=None, kw_only=True)
    """float32 or bfloat16. Unset: the checkpoint's own."""
    trust_remote_code: Annotated[bool, o.FLAG] = field(default=False, kw_only=True)
    """Let code that comes with a hub model run."""


@o.settings(o.RUN)
@dataclass(frozen=True)
class ModelConfig(ModelSource):
    """Which model, and how it is loaded."""

    tokenizer: str | None = field(default=None, kw_only=True)
    """Hub id or folder of the tokenizer. Unset: it is with the model."""
    device: str | None = field(default=None, kw_only=True)
    """Device in PyTorch's spelling: cpu, cuda, cuda:1. Unset: the GPU if there is one."""


@o.settings(o.DATA)
@dataclass(frozen=True, kw_only=True)
class TemplateConfig:
    """How conversations are rendered."""

    template: str = "auto"
    """chat, plain or auto. auto uses the tokenizer's chat template if it has one."""
    template_file: str | None = None
    """File with a chat template in Jinja. Unset: the tokenizer's own."""
    template_args: Annotated[list[str], Parameter(name="--template-arg"), o.REPEATED] = field(
        default_factory=list
    )
    """Argument of the template, as in enable_thinking=false. May be given several times."""
    template_sha256: Annotated[str | None, o.HIDDEN] = None
    """Digest of the text of ``template_file``, set when a run begins."""
    template_date: str | None = None
    """Date for templates that ask for it. Unset: when the run, or that of --update, began."""

    @property
    def enabled(self) -> bool | None:
        """Whether conversations go through the chat template; None: if there is one.

        Raises:
            InputError: ``template`` is another word.
        """
        match self.template:
            case "auto":
                return None
            case "chat":
                return True
            case "plain":
                return False
        raise InputError(f"--template {self.template}: give auto, chat or plain")


@o.settings(o.DATA)
@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """Sizes of sequences and batches."""

    sequence_length: int | None = None
    """Tokens of a packed sequence. Unset: 512, or the model's window if it is shorter."""
    batch_tokens: int = 4096
    """Positions in one forward pass. Lower it to save memory."""


@o.settings(o.DATA)
@dataclass(frozen=True, kw_only=True)
class RetainConfig(TemplateConfig, BatchConfig):
    """What to keep, and how text becomes sequences."""

    retain: Annotated[str | None, Parameter(group=o.SETS)] = None
    """What must not change: a JSONL file, a folder, or hf:NAME[:CONFIG][:SPLIT], where SPLIT may
    be a slice as in train[:1000]. A part of it is held out to measure on."""
    score_end: bool = False
    """Score the EOS that closes a text, too."""
    pack: bool = True
    """Join texts end to end. With --no-pack each text is a sequence of its own."""
    truncate: bool = False
    """Cut sequences that are longer than the model's window instead of refusing them."""
    holdout: Annotated[int | None, Parameter(group=o.SETS)] = None
    """Retain examples held out to measure on. Unset: a tenth, at least 1 and at most 64."""


@o.settings(o.DATA)
@dataclass(frozen=True, kw_only=True)
class DataConfig(RetainConfig):
    """What to forget, what to keep, and how text becomes sequences."""

    forget: Annotated[str | None, Parameter(group=o.SETS)] = None
    """What to forget, in the same forms as --retain."""


@o.settings(o.FIT)
@dataclass(frozen=True, kw_only=True)
class EstimatorConfig:
    """Which curvature, of which weights."""

    estimator: str = "ekfac"
    """ekfac, kfac, diagonal or identity."""
    layers: str | None = None
    """Blocks, counted from 0, as in 3-6 or 0,2,8-11. Unset: all."""
    target: str | None = None
    """Glob over parameter names. Unset: every feed-forward weight."""
    joint_bias: bool = False
    """Change biases too: a layer's bias becomes one more column of its weight."""
    recompute: bool = False
    """Run each block again in a backward pass instead of keeping its activations: less memory,
    more work, the same result."""


@o.settings(o.FIT)
@dataclass(frozen=True, kw_only=True)
class CurvatureConfig(EstimatorConfig):
    """How the curvature is sampled."""

    labels: str = "sqrt"
    """Pseudo-labels: sqrt (square-root draw) or sampled."""


@o.settings(o.FIT)
@dataclass(frozen=True, kw_only=True)
class FitConfig(CurvatureConfig):
    """The curvature and the weights it covers."""

    memory: str | None = None
    """What a device may hold, as in 20GB; layers are then fitted in groups that fit. Unset: all
    layers at once."""


@o.settings(o.STEP)
@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """The direction of each step."""

    objective: str = "margin"
    """margin or ce (cross-entropy)."""
    later_objective: str | None = None
    """Objective of all steps after the first: ce where a step of the margin has made the text
    unlikely. Unset: as --objective."""
    steps: int = 1
    """Number of Gauss-Newton steps."""
    forget_batch: int | None = None
    """Forget sequences in a step, drawn without replacement. Unset: all."""
    refit: bool = True
    """Fit the curvature anew at each step."""
    damping: float | None = None
    """Damping λ, absolute (as in the paper)."""
    relative_damping: float | None = None
    """Damping λ as a multiple of each layer's mean eigenvalue. Unset, and --damping too: 0.1."""
    exact_norm: Annotated[bool, Parameter(negative="--fitted-norm")] = False
    """Measure a step's length by the exact Gauss-Newton form instead of the fitted one."""


@o.settings(o.STEP)
@dataclass(frozen=True, kw_only=True)
class RefinementConfig:
    """How the direction of each step is improved by exact Gauss-Newton products."""

    refine: int = 0
    """Iterations of conjugate gradients on exact Gauss-Newton products for each direction; the
    best direction on held-out retain data is taken."""
    refine_sequences: int = 64
    """Retain sequences in each of those products, drawn anew for each step."""


@o.settings(o.SIZE)
@dataclass(frozen=True, kw_only=True)
class SizeConfig:
    """How far to go: one of alpha, kl and until; a measured KL of 0.01 when none is set."""

    alpha: float | None = None
    """G-norm α of each step: predicts a KL of ½α² nats per token."""
    kl: float | None = None
    """Measured KL on held-out retain data, nats per token, of the whole run. Unset, and the
    others too: 0.01."""
    until: str | None = None
    """Forgetting target, as in forget_loss=2.7 or forget_probability=0.1."""
    max_kl: float | None = None
    """Upper limit of the measured KL of the whole run, in addition."""


@o.settings()
@dataclass(frozen=True)
class FitRequest:
    """Everything that decides a fit."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """Which model."""
    data: RetainConfig = field(default_factory=RetainConfig, kw_only=True)
    """Which data."""
    fit: FitConfig = field(default_factory=FitConfig, kw_only=True)
    """Which curvature."""
    shard: Annotated[bool, o.FLAG, Parameter(group=o.RUN)] = field(default=False, kw_only=True)
    """Spread the weights of the model's blocks over the processes of torchrun."""
    seed: Annotated[int, Parameter(group=o.RUN)] = field(default=0, kw_only=True)
    """Seed of the draws, the order of forget batches and the held-out split."""


@o.settings()
@dataclass(frozen=True)
class RunConfig(FitRequest):
    """Everything that decides a run's result."""

    data: DataConfig = field(default_factory=DataConfig, kw_only=True)
    """Which data."""
    step: StepConfig = field(default_factory=StepConfig, kw_only=True)
    """Which direction."""
    refinement: RefinementConfig = field(default_factory=RefinementConfig, kw_only=True)
    """How the direction is improved."""
    size: SizeConfig = field(default_factory=SizeConfig, kw_only=True)
    """How far."""


def read_config(path: Path) -> RunConfig:
    """A configuration from YAML; what the file leaves out keeps its default.

    Raises:
        InputError: no such file, not YAML, an unknown key, a value of the wrong type.
    """
    return _build(RunConfig, _read_yaml(path), str(path))


def settings_in(path: Path) -> dict[tuple[str, ...], Any]:
    """What a YAML file says, and nothing else: by stage and name, as in ``("size", "kl")``.

    Raises:
        InputError: as :func:`read_config`.
    """
    config, said = read_config(path), _read_yaml(path)
    found: dict[tuple[str, ...], Any] = {}
    for stage, value in said.items():
        own = getattr(config, stage)
        if is_dataclass(own):
            found.update({(stage, name): getattr(own, name) for name in value})
        else:
            found[stage,] = own
    return found


def _read_yaml(path: Path) -> Any:
    if not path.is_file():
        raise InputError(f"{path}: no such configuration file")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None


def write_config(config: FitRequest) -> str:
    """The YAML that :func:`read_config` reads back to an equal configuration."""
    return yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)


def deciding(config: FitRequest) -> dict[str, Any]:
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


def _build(kind: type, data: Any, where: str) -> Any:
    if not isinstance(data, Mapping):
        raise InputError(f"{where}: expected settings as 'name: value', found {data!r}")
    hints = typing.get_type_hints(kind)
    arguments = {}
    for key, value in data.items():
        if key not in hints:
            raise InputError(f"{where}: unknown key '{key}'; known are {', '.join(hints)}")
        hint = hints[key]
        build = _build if is_dataclass(hint) else _checked
        arguments[key] = build(hint, value, f"{where}, {key}")
    return kind(**arguments)


def _checked(hint: Any, value: Any, where: str) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    allowed = [typing.get_origin(option) or option for option in options]
    if isinstance(value, int) and not isinstance(value, bool) and float in allowed:
        value = float(value)
    if isinstance(value, str) and float in allowed:
        with contextlib.suppress(ValueError):
            value = float(value)  # YAML reads 1e-8 as text
    if type(value) not in allowed:
        names = " or ".join("nothing" if t is types.NoneType else t.__name__ for t in allowed)
        raise InputError(f"{where}: {value!r} is not {names}")
    return value
