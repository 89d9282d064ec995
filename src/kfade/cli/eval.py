"""``kfade eval``: what its commands share, which is everything but the measuring.

Each command reads its data, then works within :func:`evaluation`: an output folder that is whole or
absent, with ``items.jsonl`` (every item's values), ``metrics.json`` and ``manifest.json``. An
interrupted one keeps its items and goes on with ``--resume``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from torch import nn

from kfade.cli.session import console, session
from kfade.evaluate.log import ItemLog
from kfade.evaluate.quantisation import Rounding, quantised, rounding_of
from kfade.method.update import Update
from kfade.models.layers import digest_weights
from kfade.models.load import load_model, provenance
from kfade.models.sources import Source
from kfade.runs.session import notes_on_base
from kfade.runtime.provenance import git_sha, versions
from kfade.runtime.run_dir import RunDir
from kfade.runtime.stages import Clock, stage

eval_app = typer.Typer(
    help="Measure a model, with or without an update: benchmarks, specificity, memorisation.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
ITEMS = "items.jsonl"
_CALLED = {
    "weights_sha256": "the weights that are judged",
    "base_sha256": "the weights of MODEL",
    "edited_sha256": "the edited weights",
    "data_sha256": "the data",
    "completions_sha256": "the completions",
}


@dataclass(frozen=True)
class Judged:
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


def load_judged(
    name: str,
    *,
    update: Path | None = None,
    quantise: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    trust_remote_code: bool | None = None,
    revision: str | None = None,
    tokenizer: str | None = None,
) -> Judged:
    """What the options say.

    Raises:
        InputError: no such model or update, or one that does not fit the other.
    """
    rounding = rounding_of(quantise)
    change = Update.load(update) if update else Update({})
    with stage("load"):
        model, words = load_model(
            name,
            dtype=dtype,
            device=device,
            trust_remote_code=bool(trust_remote_code),
            revision=revision,
            tokenizer=tokenizer,
        )
        if update:
            base = change.compare_base(model)  # raises where shapes or names differ
            for note in notes_on_base(change, base, "judged", revision, tokenizer):
                console.print(note)
    origin = provenance(Source(name, revision, tokenizer))
    return Judged(name, model, words, change, rounding, origin)


def digest_model(model: nn.Module) -> str:
    """SHA-256 over all weights, as they are now."""
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    return digest_weights(model, names)


class Evaluation:
    """One evaluation on its way from its options to its folder."""

    def __init__(
        self, benchmark: str, settings: Mapping[str, Any], clock: Clock, folder: RunDir
    ) -> None:
        self.folder = folder
        self.result: dict[str, Any] = {}
        """What is printed, once the evaluation is whole."""
        self.settings = dict(settings)
        """Every option that decides a number."""
        self._benchmark, self._clock = benchmark, clock
        self._provenance: dict[str, Any] = {}

    def load(self, name: str, **options: Any) -> Judged:
        """:func:`load_judged`, of the model whose origin the manifest tells."""
        subject = load_judged(name, **options)
        self._provenance = subject.provenance
        if not (self.settings.get("template_file") or subject.tokenizer.chat_template):
            self.settings.pop("template_date", None)  # no template was told it
        return subject

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
    """The frame of a command: progress, clock, folder.

    Args:
        settings: every option that decides a number; a resumed run must ask for the same.
    """
    plain = {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()}
    asked = {"benchmark": benchmark, **plain}
    with session() as clock, RunDir(out, asked, resume=resume) as folder:
        yield Evaluation(benchmark, plain, clock, folder)


def settings_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """A command's own ``locals()`` without what decides no number."""
    return {name: value for name, value in options.items() if name not in _NOT_SETTINGS}


_NOT_SETTINGS = {"out", "resume", "json", "batch_tokens", "device", "trust_remote_code"}


def interval(figure: Mapping[str, float], digits: int = 3) -> str:
    """``value [low, high]``, or ``value ± standard error``, for a person."""
    value = f"{figure['value']:.{digits}g}"
    if "low" in figure:
        return f"{value} [{figure['low']:.{digits}g}, {figure['high']:.{digits}g}]"
    return f"{value} ± {figure['standard_error']:.2g}" if "standard_error" in figure else value
