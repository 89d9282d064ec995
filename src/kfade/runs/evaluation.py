"""What evaluations share, which is everything but the measuring.

Each reads its data, then works within :func:`evaluation`: an output folder that is whole or absent,
with ``items.jsonl`` (every item's values), ``metrics.json`` and ``manifest.json``. An interrupted
one keeps its items and goes on when it is resumed.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any

from torch import nn

from kfade.evaluate.log import ItemLog
from kfade.evaluate.quantisation import Rounding, quantised, rounding_of
from kfade.method.update import Update
from kfade.models.load import provenance
from kfade.runs import options as o
from kfade.runs.config import ModelConfig
from kfade.runs.session import notes_on_base, open_model, source_of
from kfade.runtime import progress
from kfade.runtime.provenance import git_sha, versions
from kfade.runtime.run_dir import RunDir
from kfade.runtime.stages import Clock, stage, timing

ITEMS = "items.jsonl"
_CALLED = {
    "weights_sha256": "the weights that are judged",
    "base_sha256": "the weights of MODEL",
    "edited_sha256": "the edited weights",
    "data_sha256": "the data",
    "completions_sha256": "the completions",
}


_NOT_SETTINGS = {"batch_tokens", "device", "trust_remote_code"}


@o.settings(o.EVALUATED)
@dataclass(frozen=True)
class Subject:
    """Which model is judged, and as what."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """As it is loaded."""
    update: Path | None = field(default=None, kw_only=True)
    """Judge MODEL with this update: folder of a run, or its file."""
    quantise: str | None = field(default=None, kw_only=True)
    """Judge it rounded to nearest: int8 or int4. Unset: as it is."""


@o.settings(o.DATA)
@dataclass(frozen=True)
class EvaluationRequest:
    """What every evaluation on data is asked for."""

    subject: Subject = field(default_factory=Subject)
    """What is judged."""
    limit: Annotated[int | None, o.at_least(1)] = field(default=None, kw_only=True)
    """Take the first so many items only. Unset: all."""
    batch_tokens: Annotated[int, o.at_least(1)] = field(default=4096, kw_only=True)
    """Positions in one forward pass. Lower it to save memory."""


@dataclass(frozen=True)
class EvaluatedModel:
    """The model that is judged: as it was loaded, and as it is edited."""

    name: str
    model: Any
    tokenizer: Any
    update: Update
    rounding: Rounding | None
    provenance: dict[str, Any]
    """Where the model came from: what :func:`kfade.models.load.provenance` tells."""

    @contextlib.contextmanager
    def edited(self) -> Iterator[nn.Module]:
        """With the update, then rounded, within the ``with``; as it was loaded afterwards."""
        with self.update.applied_to(self.model) as model, quantised(model, self.rounding):
            yield model


def load_evaluated(subject: Subject) -> EvaluatedModel:
    """The model that is to be judged, loaded.

    Raises:
        InputError: no such model or update, or one that does not fit the other.
    """
    config, update = subject.model, subject.update
    rounding = rounding_of(subject.quantise)
    change = Update.load(update) if update else Update({})
    with stage("load"):
        model, tokenizer = open_model(config)
        if update:
            base = change.compare_base(model)  # raises where shapes or names differ
            for note in notes_on_base(change, base, "judged", config.revision, config.tokenizer):
                progress.say(note)
    origin = provenance(source_of(config))
    return EvaluatedModel(config.model, model, tokenizer, change, rounding, origin)


class Evaluation:
    """One evaluation on its way from its request to its folder."""

    def __init__(
        self, benchmark: str, settings: Mapping[str, Any], clock: Clock, folder: RunDir
    ) -> None:
        self.folder = folder
        self.result: dict[str, Any] = {}
        """What is told about it, once the evaluation is whole."""
        self.settings = dict(settings)
        """All of the request that decides a number."""
        self._benchmark, self._clock = benchmark, clock
        self._provenance: dict[str, Any] = {}

    def load(self, subject: Subject) -> EvaluatedModel:
        """:func:`load_evaluated`, of the model whose origin the manifest tells."""
        evaluated = load_evaluated(subject)
        self._provenance = evaluated.provenance
        if not (self.settings.get("template_file") or evaluated.tokenizer.chat_template):
            self.settings.pop("template_date", None)  # no template was told it
        return evaluated

    @contextlib.contextmanager
    def items(self, **decides: Any) -> Iterator[ItemLog]:
        """The log of items; ``decides`` (digests of weights and data) goes into its header.

        Raises:
            InputError: an interrupted log was made of other weights or data.
        """
        path = self.folder.state / ITEMS
        called = {_CALLED.get(name, name): str(value) for name, value in decides.items()}
        self.folder.reads(called, resumed=path.is_file())
        header = {"benchmark": self._benchmark, **self.settings, **decides}
        with ItemLog(path, header) as log:
            try:
                yield log
            finally:
                if not log.items:  # nothing worth keeping
                    path.unlink(missing_ok=True)

    def finish(self, log: ItemLog, aggregate: Mapping[str, Any], **manifest: Any) -> None:
        """Write everything; ``manifest`` adds to what is told about the run."""
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
        self.result = {"out": str(self.folder.path), **metrics}


@contextlib.contextmanager
def evaluation(
    benchmark: str, out: Path, resume: bool, settings: Mapping[str, Any]
) -> Iterator[Evaluation]:
    """The frame of an evaluation: clock and folder.

    Args:
        settings: all of the request that decides a number; a resumed run must ask for the same.
    """
    plain = {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()}
    asked = {"benchmark": benchmark, **plain}
    clock = Clock()
    with timing(clock), RunDir(out, asked, resume=resume) as folder:
        yield Evaluation(benchmark, plain, clock, folder)


def settings_of(request: Any) -> dict[str, Any]:
    """What of a request decides a number, by name: its fields, and those of its parts."""
    found: dict[str, Any] = {}
    for one in fields(request):
        value = getattr(request, one.name)
        found.update(settings_of(value) if is_dataclass(value) else {one.name: value})
    return {name: value for name, value in found.items() if name not in _NOT_SETTINGS}
