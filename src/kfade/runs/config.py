"""The settings of a run: frozen dataclasses, one for each stage, read from and written to YAML.

Each field is also an option of the command line, with its docstring as the help text. Only
``runs/`` and ``cli/`` use these classes; library functions take tensors, models and numbers. A
class extends another if one command has more settings of a kind than a second command.
"""

from __future__ import annotations

import contextlib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from datetime import date
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import yaml
from cyclopts import Parameter

from kfade.errors import InputError
from kfade.runs import choices
from kfade.runs import options as o
from kfade.runs.step_config import CorrectionConfig, RefinementConfig, SizeConfig, StepConfig


@o.settings(o.RUN)
@dataclass(frozen=True)
class ModelSource:
    """The model and its precision."""

    model: Annotated[str, o.argument("model")] = ""
    """Hub id, local folder, GGUF file, or LoRA adapter."""
    revision: str | None = field(default=None, kw_only=True)
    """Branch, tag or commit of the model on the hub. Unset: the main branch."""
    dtype: str | None = field(default=None, kw_only=True)
    """Precision of the weights: float32 or bfloat16. Unset: that of the checkpoint."""
    trust_remote_code: Annotated[bool, o.FLAG] = field(default=False, kw_only=True)
    """Run Python code that comes with the model."""

    def required(self) -> str:
        """``model``, which must be set.

        Raises:
            InputError: it is not.
        """
        if not self.model:
            raise InputError(
                "MODEL is missing: give a hub id, a local folder, a GGUF file, or a LoRA adapter"
            )
        return self.model


@o.settings(o.RUN)
@dataclass(frozen=True)
class ModelConfig(ModelSource):
    """The model, its tokenizer and its device."""

    tokenizer: str | None = field(default=None, kw_only=True)
    """Hub id or folder of the tokenizer. Unset: that of the model."""
    device: str | None = field(default=None, kw_only=True)
    """PyTorch device: cpu, cuda or cuda:1. Unset: the GPU if there is one."""


@o.settings(o.DATA)
@dataclass(frozen=True, kw_only=True)
class TemplateConfig:
    """How conversations are rendered."""

    template: str = "auto"
    """How conversations are rendered: chat (by the chat template), plain (as plain text) or auto
    (chat if the tokenizer has a chat template, else plain)."""
    template_file: str | None = None
    """File with a chat template in Jinja. Unset: the chat template of the tokenizer."""
    template_args: Annotated[list[str], Parameter(name="--template-arg"), o.REPEATED] = field(
        default_factory=list
    )
    """Argument of the chat template, as in enable_thinking=false. May be given several times."""
    template_sha256: Annotated[str | None, o.HIDDEN] = None
    """SHA-256 of the text of ``template_file``, set when a run begins."""
    template_date: str | None = None
    """Current date for chat templates that use one, as in 2026-01-31. Unset: the start of the run,
    or of the run that made --update."""

    @property
    def enabled(self) -> bool | None:
        """Whether to use the chat template. None: if the tokenizer has one.

        Raises:
            InputError: ``template`` is not auto, chat or plain.
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
    """Tokens in a packed sequence. Unset: 512, or the model's context window if it is shorter."""
    batch_tokens: int = 4096
    """Maximum number of token positions in one forward pass. Lower it to save memory."""


@o.settings(o.DATA)
@dataclass(frozen=True, kw_only=True)
class RetainConfig(TemplateConfig, BatchConfig):
    """The retain set, and how text becomes token sequences."""

    retain: Annotated[str | None, Parameter(group=o.SETS)] = None
    """Retain set, texts on which the model must not change: a JSONL file, a folder, or
    hf:NAME[:CONFIG][:SPLIT], where SPLIT may be a slice as in train[:1000]. A part of it is held
    out for measurements."""
    score_end: bool = False
    """Include the EOS token at the end of a text in the loss."""
    pack: bool = True
    """Concatenate texts into sequences of --sequence-length tokens. With --no-pack each text is a
    sequence of its own."""
    truncate: bool = False
    """Truncate sequences that are longer than the model's context window. Without it they are an
    error."""
    holdout: Annotated[int | None, Parameter(group=o.SETS)] = None
    """Number of retain examples held out for measurements. Unset: a tenth, at least 1 and at most
    64."""


@o.settings(o.DATA)
@dataclass(frozen=True, kw_only=True)
class DataConfig(RetainConfig):
    """The forget set, the retain set, and how text becomes token sequences."""

    forget: Annotated[str | None, Parameter(group=o.SETS)] = None
    """Forget set, texts that the model is to forget, in the same formats as --retain."""


@o.settings(o.FIT)
@dataclass(frozen=True, kw_only=True)
class EstimatorConfig:
    """The estimator of the curvature, and the weights to change."""

    estimator: Annotated[
        str, Parameter(help=f"Estimator of the curvature: {choices.ESTIMATORS}.")
    ] = "kfac"
    """Estimator of the curvature."""
    layers: str | None = None
    """Transformer blocks to change, counted from 0, as in 3-6 or 0,2,8-11. Unset: all."""
    target: str | None = None
    """Glob pattern for the names of the parameters to change. Unset: all feed-forward weights."""
    experts: str | None = None
    """Routed experts to change in each layer of a mixture, counted from 0, as in 3,7,20-30; none;
    or top:8 for the eight that carry most of the forget gradient. Unset: all."""
    expert_rows: int = 32
    """Least number of retain tokens that must reach an expert; others are left alone."""
    expert_inputs: Annotated[
        str, Parameter(help=f"Input factors A of experts: {choices.EXPERT_INPUTS}.")
    ] = "own"
    """Input factors A of experts."""
    joint_bias: bool = False
    """Change biases too: the bias of a layer is treated as one more column of its weight."""
    recompute: bool = False
    """Recompute the activations of each block in the backward pass instead of keeping them: less
    memory, more computation, the same result."""


@o.settings(o.FIT)
@dataclass(frozen=True, kw_only=True)
class CurvatureConfig(EstimatorConfig):
    """The estimator, the weights to change, and the pseudo-labels."""

    labels: Annotated[
        str, Parameter(help=f"Pseudo-labels for the curvature: {choices.LABELS}.")
    ] = "sqrt"
    """Pseudo-labels for the curvature."""


@o.settings(o.FIT)
@dataclass(frozen=True, kw_only=True)
class FitConfig(CurvatureConfig):
    """The curvature, the weights to change, and the memory of a fit."""

    memory: str | None = None
    """Memory of a device that may be used, as in 20GB, or auto for what is free. Layers are fitted
    in groups that fit into it; auto also gives --recompute if necessary. Unset: all layers at
    once."""


@o.settings()
@dataclass(frozen=True)
class FitRequest:
    """All settings of a fit."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The model."""
    data: RetainConfig = field(default_factory=RetainConfig, kw_only=True)
    """The data."""
    fit: FitConfig = field(default_factory=FitConfig, kw_only=True)
    """The curvature."""
    shard: Annotated[bool, o.FLAG, Parameter(group=o.RUN)] = field(default=False, kw_only=True)
    """Shard the weights of the model's blocks over the processes of torchrun."""
    seed: Annotated[int, Parameter(group=o.RUN)] = field(default=0, kw_only=True)
    """Random seed of the pseudo-labels, the order of forget batches and the held-out split."""


@o.settings()
@dataclass(frozen=True)
class RunConfig(FitRequest):
    """All settings of a run."""

    data: DataConfig = field(default_factory=DataConfig, kw_only=True)
    """The data."""
    step: StepConfig = field(default_factory=StepConfig, kw_only=True)
    """The direction of each step."""
    refinement: RefinementConfig = field(default_factory=RefinementConfig, kw_only=True)
    """Refinement of the direction."""
    correction: CorrectionConfig = field(default_factory=CorrectionConfig, kw_only=True)
    """Corrections after the last step."""
    size: SizeConfig = field(default_factory=SizeConfig, kw_only=True)
    """The size of each step."""

    @property
    def decided(self) -> RunConfig:
        """The same settings, with what ``quality`` decides filled in.

        Raises:
            InputError: an unknown quality.
        """
        word = self.step.quality or ("default" if self.size.alpha is None else "fast")
        amount = choices.quality_of(word).unless(self.step.steps, self.correction.correct)
        return replace(
            self,
            step=replace(self.step, quality=word, steps=amount.steps),
            correction=replace(self.correction, correct=amount.corrections),
        )


def read_config(path: Path) -> RunConfig:
    """Read a configuration from YAML. Settings that are not in the file keep their defaults.

    Raises:
        InputError: no such file, not YAML, an unknown key, a value of the wrong type.
    """
    return _build(RunConfig, _read_yaml(path), str(path))


def settings_in(path: Path) -> dict[tuple[str, ...], Any]:
    """The settings that a YAML file contains, by stage and name, as in ``("size", "kl")``.

    Raises:
        InputError: as :func:`read_config`.
    """
    data = _read_yaml(path)
    config = _build(RunConfig, data, str(path))
    found: dict[tuple[str, ...], Any] = {}
    for stage, value in data.items():
        setting = getattr(config, stage)
        if is_dataclass(setting):
            found.update({(stage, name): getattr(setting, name) for name in value})
        else:
            found[stage,] = setting
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


def result_settings(config: FitRequest) -> dict[str, Any]:
    """The settings that decide the result, which a resumed run must repeat.

    Settings whose only effect is rounding are left out. So a run that ran out of memory can be
    resumed with, for example, smaller batches.
    """
    values = asdict(config)
    for stage, name in (
        ("fit", "recompute"),
        ("step", "offload"),
        ("data", "batch_tokens"),
        ("model", "device"),
        ("model", "trust_remote_code"),
    ):
        values.get(stage, {}).pop(name, None)
    return values


def _build(kind: type, data: Any, where: str) -> Any:
    hints = typing.get_type_hints(kind)
    if not isinstance(data, Mapping):
        raise InputError(
            f"{where}: expected settings as 'name: value', found {data!r}; known keys are "
            f"{', '.join(hints)}"
        )
    arguments = {}
    for key, value in data.items():
        if key not in hints:
            raise InputError(f"{where}: {_unknown(str(key), hints)}")
        hint = hints[key]
        build = _build if is_dataclass(hint) else _checked
        arguments[key] = build(hint, value, f"{where}, {key}")
    return kind(**arguments)


def _unknown(key: str, known: Iterable[str]) -> str:
    """The message about a key that is not ``known`` at its place, with the nearest known key."""
    places = {}
    for stage, kind in typing.get_type_hints(RunConfig).items():
        if is_dataclass(kind):
            places.update({name: f"{name} under {stage}" for name in typing.get_type_hints(kind)})
        else:
            places[stage] = f"{stage}, not indented"
    places.update({name: name for name in known})
    near = get_close_matches(key.replace("-", "_"), places, n=1)
    advice = f"did you mean {places[near[0]]}? " if near else ""
    return f"unknown key '{key}'; {advice}known keys are {', '.join(known)}"


_TYPES = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
_TYPES |= {list: "a list, as in [a, b]", types.NoneType: "null"}


def _checked(hint: Any, value: Any, where: str) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    allowed = [typing.get_origin(option) or option for option in options]
    if type(value) is int and float in allowed:
        value = float(value)
    if isinstance(value, str) and float in allowed:
        with contextlib.suppress(ValueError):
            value = float(value)  # YAML reads 1e-8 as a string
    if type(value) in (int, date) and str in allowed:
        value = str(value)  # YAML reads 3 as a number and 2026-01-31 as a date
    if type(value) not in allowed:
        names = " or ".join(_TYPES[option] for option in allowed)
        remedy = "; write text in quotes" if str in allowed else ""
        raise InputError(f"{where}: {value!r} is not {names}{remedy}")
    return value
