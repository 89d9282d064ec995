"""What the report reads: folders of runs, evaluations, sweeps and attacks, known by their files.

A *run* holds ``manifest.json`` and ``metrics.json``; its manifest is of the kind ``unlearn`` or
``baseline``. Every other input is a log as :mod:`kfade.evaluate.log` writes it:

``items.jsonl``, an *evaluation*: one line an item. It belongs to the run whose update its header
names, else to the run whose folder holds it, else to the model that its header names. The model
that a run started from is its *base*; the page shows them side by side.

``points.jsonl``, a *sweep*: header ``{"benchmark": "sweep", ...}``, one line a point; the item's
id is the point's name. All values but the method are optional:

    method      "K-FADE", "NPO", ...
    estimator   its name, such as "ekfac"
    objective   its name, such as "margin"
    settings    what was varied, by name: {"alpha": 0.002, "damping": 0.1}
    forget_loss, retain_kl                  nats per token
    forget_probability                      exp(-loss per token), mean over forget answers
    forget_quality, model_utility           as TOFU defines them
    seconds                                 all that the point cost, its share of a shared fit too

The aggregate holds ``picked``, the id of the point that the sweep's rule chose.

``attack.jsonl``, an *attack*: header ``{"benchmark": "attack", "base": {metric: value}, ...}``
with the values of the model before unlearning, one line a measurement:

    data        what was fine-tuned on: "benign", "related" or "forget"
    state       "attacked", or "reapplied": the update added to the attacked model again
    step        number of optimiser steps before the measurement
    values      {metric: value}
    intervals   {metric: [low, high]}, 95 %                         (optional)
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kfade.errors import InputError
from kfade.evaluate.log import Evaluation, read_log

ITEMS, POINTS, ATTACK = "items.jsonl", "points.jsonl", "attack.jsonl"
RUN_KINDS = ("unlearn", "baseline")
# Header entries that name the model, or one that it is compared with; the others tell the data and
# the settings.
WHO = frozenset(
    {"model", "update", "edited", "base_sha256", "edited_sha256", "weights_sha256"}
    | {"completions", "retain_log", "retain_model"}
)
RETAIN_KEYS = ("retain_model", "retain")  # of aggregates that hold the retain model's figures


@dataclass(frozen=True)
class Measured:
    """One evaluation of one subject."""

    path: Path
    log: Evaluation
    metrics: dict[str, Any]
    """``metrics.json`` beside the log; empty where there is none."""

    @property
    def benchmark(self) -> str:
        """``kl``, ``tofu``, ``choice``, ..."""
        return str(self.log.header["benchmark"])

    @property
    def aggregate(self) -> dict[str, Any]:
        """The figures over all items."""
        return self.log.aggregate or {}

    @property
    def what(self) -> str:
        """The header without the names of models: the same for evaluations that can be compared."""
        rest = {k: v for k, v in self.log.header.items() if k not in WHO}
        return json.dumps(rest, sort_keys=True)


@dataclass
class MeasuredModel:
    """A model that was measured: what a run made of it, or one as it came."""

    name: str
    """Unique within a report."""
    kind: Literal["run", "base", "model"]
    path: Path | None = None
    """The run's folder."""
    manifest: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    measured: list[Measured] = field(default_factory=list)

    @property
    def model(self) -> str:
        """The model that it is, or that it was made from."""
        return str(self.manifest.get("model", self.name))

    def of(self, benchmark: str) -> list[Measured]:
        """Its evaluations by that benchmark."""
        return [m for m in self.measured if m.benchmark == benchmark]

    def name_of(self, measured: Measured) -> str:
        """What one of its evaluations is called: by the model alone, if it is the only such one."""
        alone = len(self.of(measured.benchmark)) == 1
        return self.name if alone else f"{self.name}: {measured.path.name}"


@dataclass
class Log:
    """A sweep or an attack."""

    name: str
    """Unique within a report, but for a run in the same folder."""
    path: Path
    log: Evaluation
    manifest: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Results:
    """All that was found; bases first, then runs, then other models."""

    subjects: tuple[MeasuredModel, ...]
    sweeps: tuple[Log, ...] = ()
    attacks: tuple[Log, ...] = ()
    notes: tuple[str, ...] = ()
    """What was found and left out, and why."""

    @property
    def runs(self) -> tuple[MeasuredModel, ...]:
        """The edited models among the subjects."""
        return tuple(s for s in self.subjects if s.kind == "run")

    def base_of(self, run: MeasuredModel) -> MeasuredModel | None:
        """The subject that ``run`` started from, where it was measured too."""
        bases = (s for s in self.subjects if s.kind == "base" and same_model(s.model, run.model))
        return next(bases, None)


def same_model(one: str, other: str) -> bool:
    """Whether two names of a model mean the same: a hub id, or a path written in two ways."""
    return one == other or os.path.abspath(one) == os.path.abspath(other)


def read_results(paths: Sequence[Path]) -> Results:
    """Everything in the folders and in the folders within them.

    Raises:
        InputError: a path that is no folder, that holds nothing of kfade's, or a broken file.
    """
    found = _Found()
    for path in paths:
        if not path.is_dir():
            raise InputError(
                f"{path}: no such folder; give folders that kfade unlearn, baseline, eval, sweep "
                "or attack wrote"
            )
        if not sum([found.take(folder) for folder in _folders(path, found.notes)]):
            raise InputError(
                f"{path}: holds no results; a run has manifest.json and metrics.json, an "
                f"evaluation {ITEMS}, a sweep {POINTS}, an attack {ATTACK}"
            )
    return found.results()


def _folders(path: Path, notes: list[str]) -> Iterator[Path]:
    """The folder and those within it, in order of name, without unfinished and hidden ones."""
    for place, inner, _ in os.walk(path):
        for name in sorted(inner):
            if name.endswith(".part"):
                notes.append(f"{Path(place) / name}: an interrupted run; go on with --resume")
        inner[:] = sorted(n for n in inner if n[0] != "." and not n.endswith((".part", ".writing")))
        yield Path(place)


class _Found:
    """Collects what folders hold."""

    def __init__(self) -> None:
        self.runs: list[MeasuredModel] = []
        self.measured: list[tuple[Measured, MeasuredModel | None]] = []
        self.sweeps: list[Log] = []
        self.attacks: list[Log] = []
        self.notes: list[str] = []
        self._seen: set[Path] = set()

    def take(self, folder: Path) -> int:
        """Read the results that lie in the folder itself, if they were not read before; their
        number."""
        files = [n for n in (ITEMS, POINTS, ATTACK) if (folder / n).is_file()]
        manifest = read_json(folder / "manifest.json")
        is_run = manifest.get("kind") in RUN_KINDS
        if folder.resolve() in self._seen:
            return len(files) + is_run
        self._seen.add(folder.resolve())
        if is_run:
            metrics = read_json(folder / "metrics.json")
            self.runs.append(MeasuredModel(folder.resolve().name, "run", folder, manifest, metrics))
        for name in files:
            log = read_log(folder / name, partial=True)
            if log.aggregate is None:
                self.notes.append(f"{folder / name}: interrupted, left out; go on with --resume")
            elif name == ITEMS:
                measured = Measured(folder, log, read_json(folder / "metrics.json"))
                self.measured.append((measured, self._around(folder)))
            else:
                logs = self.sweeps if name == POINTS else self.attacks
                logs.append(Log(folder.resolve().name, folder, log, manifest))
        return len(files) + is_run

    def _around(self, folder: Path) -> MeasuredModel | None:
        """The run whose folder holds this one."""
        within = folder.resolve()
        around = (r for r in self.runs[::-1] if r.path and within.is_relative_to(r.path.resolve()))
        return next(around, None)

    def results(self) -> Results:
        """All of it, each evaluation with the model that it measured, under unique names."""
        subjects = list(self.runs)
        for measured, around in self.measured:
            owner = self._owner(measured, around, subjects)
            if owner not in subjects:
                subjects.append(owner)
            owner.measured.append(measured)
        add_retain_model(subjects)
        order = {"base": 0, "run": 1, "model": 2}
        subjects.sort(key=lambda subject: order[subject.kind])
        logs = [*self.sweeps, *self.attacks]
        runs = {run.path: run for run in self.runs}
        name_apart([*subjects, *(log for log in logs if log.path not in runs)])
        for log in logs:
            log.name = runs[log.path].name if log.path in runs else log.name
        return Results(tuple(subjects), tuple(self.sweeps), tuple(self.attacks), tuple(self.notes))

    def _owner(
        self, measured: Measured, around: MeasuredModel | None, subjects: Sequence[MeasuredModel]
    ) -> MeasuredModel:
        """The subject that was measured: one of those that are known, or a new one."""
        header = measured.log.header
        model = str(header.get("edited") or header.get("model") or measured.path.name)
        if header.get("update"):
            path = Path(str(header["update"]))
            path = path.parent if path.suffix == ".safetensors" else path
            if run := self._around(path) or around:  # the latter: the folders were moved together
                return run
            for subject in subjects:
                if subject.kind == "run" and subject.name == path.name:
                    return subject
            return MeasuredModel(path.name, "run", manifest={"model": model})
        is_base = any(same_model(model, run.model) for run in self.runs)
        if not is_base and (run := around or self._around(Path(model))):
            return run
        for subject in subjects:
            if subject.kind != "run" and same_model(subject.model, model):
                return subject
        kind: Literal["base", "model"] = "base" if is_base else "model"
        return MeasuredModel(Path(model).name, kind, manifest={"model": model})


def add_retain_model(subjects: list[MeasuredModel]) -> None:
    """Append the retain model with the figures that evaluations of others hold of it.

    A benchmark by which it was measured itself is left out.
    """
    told: list[Measured] = []
    for subject in subjects:
        for measured in subject.measured:
            figures = next((f for k in RETAIN_KEYS if (f := measured.aggregate.get(k))), None)
            own = any(s.of(measured.benchmark) for s in subjects if s.kind == "model")
            if figures and not own and measured.benchmark not in [t.benchmark for t in told]:
                by_definition = {"forget_quality": 1.0} if measured.benchmark == "tofu" else {}
                header = {**measured.log.header, "model": "retain model", "update": None}
                log = Evaluation(header, {}, {**figures, **by_definition})
                told.append(Measured(measured.path, log, {}))
    if told:
        name = "retain model"
        subjects.append(MeasuredModel(name, "model", manifest={"model": name}, measured=told))


def name_apart(subjects: Sequence[MeasuredModel | Log]) -> None:
    """Put the parent folder before names that occur twice; then number those that still do."""
    names = [s.name for s in subjects]
    for subject in subjects:
        if names.count(subject.name) > 1 and subject.path is not None:
            subject.name = f"{subject.path.resolve().parent.name}/{subject.name}"
    names = [s.name for s in subjects]
    for index, subject in enumerate(subjects):
        if names.index(subject.name) < index:
            subject.name = f"{subject.name} ({names[: index + 1].count(names[index])})"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file.

    Raises:
        InputError: the file holds something else.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        content = None
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a JSON object; was it cut off? run its command again")
    return content
