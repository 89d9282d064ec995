"""A model with its data, and what is made of them once: curvatures, gradients, updates."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import kfade
from kfade import Damping
from kfade.baselines.methods import Method
from kfade.curvature.curvature import Curvature
from kfade.curvature.estimators import EKFAC, Estimator
from kfade.curvature.vectors import Vector
from kfade.data.batches import Batch
from kfade.data.sequences import TokenSequence
from kfade.method.gradient import forget_gradient
from kfade.method.settings import Direction, Run
from kfade.method.size import StepSize
from kfade.method.sweep import cut, targets_within
from kfade.method.update import Update
from kfade.models.lengths import batches_for
from kfade.models.targets import Target
from kfade.runs.choices import draw_of, estimator_of, objective_of
from kfade.runtime.stages import Clock, timing

from .baselines import train_baseline
from .forgetting import BUDGET, Group, Ruler, Search
from .pieces import Results, make_once
from .records import Record
from .tuning import PLAIN


class Lab:
    """Everything that pieces share, made when first asked for.

    An experiment says in a subclass what its model and its data are.
    """

    budget = BUDGET
    """Positions in one forward pass of fits and gradients."""

    def __init__(
        self, sizes: Any, cache: Path, results: Results, device: str | None = None
    ) -> None:
        self.sizes, self.cache, self.results = sizes, cache, results
        self.device = device  # that models are loaded to; None: the GPU if there is one
        self._gradients: dict[tuple[str, str], tuple[Vector, float]] = {}
        self._guesses: dict[str, float] = {}

    @cached_property
    def loaded(self) -> tuple[Any, Any]:
        """(model, tokenizer)."""
        raise NotImplementedError

    @cached_property
    def slices(self) -> dict[str, Sequence[TokenSequence]]:
        """Retain data: ``fit`` for methods to use, ``held_out`` to steer and choose by, ``report``
        for the tables only."""
        raise NotImplementedError

    def group(self, name: str) -> Group:
        """What is forgotten under that name."""
        raise NotImplementedError

    @property
    def model(self) -> Any:
        return self.loaded[0]

    @property
    def tokenizer(self) -> Any:
        return self.loaded[1]

    @cached_property
    def targets(self) -> list[Target]:
        return kfade.find_targets(self.model)

    @cached_property
    def ruler(self) -> Ruler:
        """Measures KL from the model as it is at the first access: not while it is edited."""
        return Ruler(self.model, {name: self.slices[name] for name in ("held_out", "report")})

    def search(self, group: str) -> Search:
        """The search for the target of a group."""
        return Search(self.model, self.ruler, self.group(group))

    def gradient(self, group: str, objective: str) -> tuple[Vector, float]:
        """The forget gradient of a group, and the seconds it took."""
        if (group, objective) not in self._gradients:
            start = time.perf_counter()
            batches = batches_for(self.model, self.group(group).forget, self.budget)
            found = forget_gradient(self.model, batches, self.targets, objective_of(objective))
            self._gradients[group, objective] = found, time.perf_counter() - start
        return self._gradients[group, objective]

    def fit(self, name: str) -> Record:
        """Fit and keep a curvature. ``fit_seconds`` includes the fit that it builds upon.

        Args:
            name: as :func:`estimator_named` reads it.
        """

        def make(folder: Path) -> Record:
            start = time.perf_counter()
            batches = batches_for(self.model, self.slices["fit"], self.budget)
            self._fitted(name, batches).save(folder / "curvature.safetensors")
            seconds = time.perf_counter() - start
            if name.startswith("ekfac"):
                seconds += self.fit(name.replace("ekfac", "kfac"))["fit_seconds"]
            return {"fit_seconds": seconds}

        return make_once(self.cache / f"fit-{name}", make)

    def _fitted(self, name: str, batches: Sequence[Batch]) -> Curvature:
        estimator, data = estimator_named(name), (self.model, batches, self.targets)
        if isinstance(estimator, EKFAC):
            return estimator.correct(self.curvature(name.replace("ekfac", "kfac")), *data)
        return estimator.fit(*data)

    def curvature(self, name: str) -> Curvature:
        """The curvature that :meth:`fit` keeps under that name."""
        self.fit(name)
        path = self.cache / f"fit-{name}" / "curvature.safetensors"
        return Curvature.load(path, self.targets[0].weight.device)

    def step(
        self,
        group: str,
        curvature: Curvature,
        damping: float,
        *,
        objective: str = "margin",
        layers: str = "all",
        like: str = "",
        **options: Any,
    ) -> tuple[Record, Update | None]:
        """One step of K-FADE to the group's target.

        Args:
            like: steps with the same word begin their search where the last one ended.
            options: other options of :meth:`Search.step`.
        """
        targets = targets_within(self.targets, layers)
        gradient, seconds = self.gradient(group, objective)
        options.setdefault("guess_kl", self._guesses.get(like))
        row, update = self.search(group).step(
            cut(curvature, targets), gradient, targets, damping=damping, **options
        )
        if like and "exact_kl" in row:
            self._guesses[like] = row["exact_kl"]
        return {**row, "gradient_seconds": seconds}, update

    def unlearn(
        self,
        group: str,
        fit: str,
        size: StepSize,
        damping: float | None,
        *,
        relative: bool = True,
        direction: Direction = PLAIN,
        layers: str = "all",
        **options: Any,
    ) -> tuple[list[Update], Record]:
        """``kfade.unlearn`` with a kept curvature; without a damping it chooses one.

        Returns:
            An empty update and those after each step, and what is to be told of the run.
        """
        targets = targets_within(self.targets, layers)
        curvature = cut(self.curvature(fit), targets)
        given = None if damping is None else Damping(damping, relative=relative)
        states, clock = [Update({})], Clock()

        def on_step(update: Update) -> None:
            if len(update.provenance["steps"]) < len(states):  # the run ended before another step
                states.pop()
            states.append(update)

        with timing(clock):
            update = kfade.unlearn(
                self.model,
                forget=self.group(group).forget,
                retain=self.slices["fit"],
                held_out=self.slices["held_out"],
                fit=estimator_named(fit),
                direction=replace(direction, damping=given),
                size=size,
                run=Run(
                    targets=targets,
                    curvature=curvature,
                    batch_tokens=BUDGET,
                    on_step=on_step,
                    **{"steps": 1, "correction": kfade.Correction(count=0), **options},
                ),
            )
        seconds, steps = clock.total, update.provenance["steps"]
        told = {"refined": steps[-1]["refined"], "refinements": steps[-1]["refinements"]}
        told |= {"stages": clock.seconds, "trials": [len(step["probes"]) for step in steps]}
        if damping is None:
            damping = update.provenance["damping"]["value"]
        return states, {**told, "damping": damping, "run_seconds": seconds}

    def train(
        self,
        method: Method,
        group: str,
        rate: float,
        steps: int,
        every: int,
        on_evaluation: Callable[[Any, Update], bool],
    ) -> Update:
        """Train a baseline, with an evaluation after every so many steps."""
        sets = {
            "forget": self.group(group).forget,
            "retain": self.slices["fit"],
            "held_out": self.slices["held_out"],
        }
        return train_baseline(
            self.model,
            method,
            sets,
            on_evaluation,
            lr=rate,
            steps=steps,
            batch=self.sizes.batch,
            evaluate_every=every,
            seed=self.sizes.seed,
        )

    def keep(self, name: str, row: Record, update: Update | None) -> Record:
        """Keep the update under that name, if there is one; the row."""
        if update is not None:
            self._path(name).parent.mkdir(parents=True, exist_ok=True)
            update.save(self._path(name))
        return row

    def has(self, name: str) -> bool:
        """Whether an update was kept. It is not if the target was not reached."""
        return self._path(name).is_file()

    def kept(self, name: str) -> Update:
        return Update.load(self._path(name)).to(self.targets[0].weight.device)

    def _path(self, name: str) -> Path:
        return self.cache / "updates" / f"{name}.safetensors"


def estimator_named(fit: str) -> Estimator:
    """The estimator of a fit: ``kfac`` makes square-root draws, ``kfac sampled`` samples labels."""
    word, _, labels = fit.partition(" ")
    return estimator_of(word, draw_of(labels or "sqrt"))
