"""The parts that all evaluations share: the evaluated model, the output folder, the item log.

An evaluation reads its data and then works within :func:`evaluation`. The output folder is complete
or absent. It holds ``items.jsonl`` (the values of each item), ``metrics.json`` and
``manifest.json``. An interrupted evaluation keeps its items; a resumed one continues after them.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from torch import nn

from kfade.evaluate.item_log import ItemLog
from kfade.evaluate.quantisation import Rounding, quantised, rounding_of
from kfade.method.update import Update
from kfade.models.load import provenance
from kfade.runs import options as o
from kfade.runs.config import ModelConfig
from kfade.runs.session import division, notes_on_base, open_model, source_of
from kfade.runtime import distributed, progress
from kfade.runtime.provenance import git_sha, versions
from kfade.runtime.run_dir import RunDir
from kfade.runtime.stages import Clock, stage, timing

ITEMS = "items.jsonl"
_INPUT_NAMES = {
    "weights_sha256": "the weights that are judged",
    "base_sha256": "the weights of MODEL",
    "edited_sha256": "the edited weights",
    "data_sha256": "the data",
    "completions_sha256": "the completions",
}
_NOT_SETTINGS = {"batch_tokens", "device", "shard", "trust_remote_code"}  # they decide no number


@o.settings(o.EVALUATED)
@dataclass(frozen=True)
class Subject:
    """The model to evaluate: with an update, and rounded, or as it is."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The model."""
    update: Path | None = field(default=None, kw_only=True)
    """Evaluate MODEL with this update: folder of a run, or an update file. Unset: no update."""
    quantise: str | None = field(default=None, kw_only=True)
    """Evaluate the model with its weights rounded to nearest: int8 or int4. Unset: not rounded."""


@o.settings(o.DATA)
@dataclass(frozen=True)
class EvaluationRequest:
    """Settings of every evaluation on data."""

    subject: Subject = field(default_factory=Subject)
    """The model to evaluate."""
    limit: Annotated[int | None, o.at_least(1)] = field(default=None, kw_only=True)
    """Number of items to use, from the first. Unset: all."""
    batch_tokens: Annotated[int, o.at_least(1)] = field(default=4096, kw_only=True)
    """Maximum number of token positions in one forward pass. Lower it to save memory."""
    shard: Annotated[bool, o.FLAG, Parameter(group=o.RUN)] = field(default=False, kw_only=True)
    """Shard the weights of the model's blocks over the processes of torchrun."""


@dataclass(frozen=True)
class EvaluatedModel:
    """The model under evaluation, the update and the rounding to apply to it."""

    name: str
    model: Any
    tokenizer: Any
    update: Update
    rounding: Rounding | None
    provenance: dict[str, Any]
    """The model's origin, from :func:`kfade.models.load.provenance`."""

    @contextlib.contextmanager
    def edited(self) -> Iterator[nn.Module]:
        """The model with the update, then rounded, within the ``with``; then it is restored."""
        with self.update.applied_to(self.model) as model, quantised(model, self.rounding):
            yield model


def load_evaluated(subject: Subject, *, shard: bool = False) -> EvaluatedModel:
    """Load the model and the update of an evaluation.

    Args:
        shard: whether to shard the model's blocks over the processes.

    Raises:
        InputError: the model or the update does not exist, or they do not match; or ``shard`` is
            set with one process.
    """
    divide = division(subject.model, shard)
    config, update = subject.model, subject.update
    rounding = rounding_of(subject.quantise)
    change = Update.load(update) if update else Update({})
    with stage("load"):
        model, tokenizer = open_model(config, divide=divide)
        if update:
            base = change.compare_base(model)  # raises where shapes or names differ
            for note in notes_on_base(change, base, "evaluated", config.revision, config.tokenizer):
                progress.say(note)
    origin = provenance(source_of(config))
    return EvaluatedModel(config.model, model, tokenizer, change, rounding, origin)


class Evaluation:
    """One evaluation in progress: its settings, its log of items and its folder."""

    def __init__(
        self, benchmark: str, settings: Mapping[str, Any], clock: Clock, folder: RunDir
    ) -> None:
        self.folder = folder
        self.result: dict[str, Any] = {}
        """Metrics and folder, once the evaluation is finished."""
        self.settings = dict(settings)
        """All settings that decide a number."""
        self._benchmark, self._clock = benchmark, clock
        self._provenance: dict[str, Any] = {}

    def load(self, subject: Subject, *, shard: bool = False) -> EvaluatedModel:
        """Load the model with :func:`load_evaluated` and keep its origin for the manifest."""
        evaluated = load_evaluated(subject, shard=shard)
        self._provenance = evaluated.provenance
        if not (self.settings.get("template_file") or evaluated.tokenizer.chat_template):
            self.settings.pop("template_date", None)  # no template used it
        return evaluated

    @contextlib.contextmanager
    def items(self, **decides: Any) -> Iterator[ItemLog]:
        """Open the log of items.

        Args:
            decides: digests of weights and data, by name; they are written into the log's header.

        Raises:
            InputError: the log of the interrupted run is of other weights or data.
        """
        path = self.folder.state / ITEMS
        inputs = {_INPUT_NAMES.get(name, name): str(value) for name, value in decides.items()}
        self.folder.reads(inputs, resumed=path.is_file())
        header = {"benchmark": self._benchmark, **self.settings, **decides}
        with item_log(path, header) as log:
            yield log

    def finish(self, log: ItemLog, aggregate: Mapping[str, Any], **manifest: Any) -> None:
        """Write log, metrics and manifest; ``manifest`` holds further entries of the manifest."""
        log.finish(aggregate)
        self.folder.publish(ITEMS)
        metrics = {
            **aggregate,
            "seconds": {**self._clock.seconds, "total": self._clock.total},
            "peak_bytes": max(self._clock.peak_bytes.values()),
        }
        about = {
            "kind": "eval",
            "benchmark": self._benchmark,
            **self._provenance,
            **manifest,
            "versions": versions(),
            "git_sha": git_sha(),
            "config": self.settings,
        }
        self.folder.finish(about, metrics)
        distributed.barrier()  # from now on every process can read the folder
        self.result = {"out": str(self.folder.path), **metrics}


@contextlib.contextmanager
def item_log(path: Path, header: Mapping[str, Any]) -> Iterator[ItemLog]:
    """A log of items within the ``with``; deleted if it has no items at the end."""
    with ItemLog(path, header) as log:
        try:
            yield log
        finally:
            if not log.items and distributed.rank() == 0:
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def evaluation(
    benchmark: str, out: Path, resume: bool, settings: Mapping[str, Any]
) -> Iterator[Evaluation]:
    """Start the clock and open the output folder of an evaluation.

    Args:
        settings: all settings that decide a number; a resumed run must repeat them.
    """
    plain = {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()}
    asked = {"benchmark": benchmark, **plain}
    clock = Clock()
    with timing(clock), RunDir(out, asked, resume=resume) as folder:
        yield Evaluation(benchmark, plain, clock, folder)


def settings_of(request: Any) -> dict[str, Any]:
    """The settings of a request that decide a number, by name, without the nesting of classes."""
    found: dict[str, Any] = {}
    for one in fields(request):
        value = getattr(request, one.name)
        found.update(settings_of(value) if is_dataclass(value) else {one.name: value})
    return {name: value for name, value in found.items() if name not in _NOT_SETTINGS}
