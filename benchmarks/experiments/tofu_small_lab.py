"""What the pieces of TOFU-small share: models, slices, curvatures, gradients, kept updates."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from equal_forgetting import (
    BUDGET,
    MEASURED,
    OBJECTIVES,
    Group,
    Ruler,
    Search,
    fitted,
    forgetting,
)
from pieces import Results, made
from tofu_small_baselines import baseline
from tofu_small_data import Data, Models, Sizes, answer, encode
from torch import Tensor

import kfade
from kfade.curvature.curvature import Curvature, Matrices
from kfade.data.batches import make_batches
from kfade.data.sequences import TokenSequence
from kfade.evaluate.completions import Prompt, completed
from kfade.evaluate.divergence import divergences, grouped, outputs
from kfade.evaluate.divergence import rounded as to_four_digits
from kfade.evaluate.generation import generate
from kfade.evaluate.tofu_logs import aggregate
from kfade.evaluate.tofu_read import log_of
from kfade.method.gradient import forget_gradient
from kfade.method.settings import Direction, Run
from kfade.method.step import StepSize
from kfade.method.sweep import cut, targets_within
from kfade.method.update import Update
from kfade.models.targets import Target

SHOWN = 6  # forgotten questions whose answers are kept to be read
CURVE_LENGTHS = (0.3, 0.5, 0.75, 1.25)  # of an update, beside its own
OWN_TOKENS = 48  # of a turn that the model makes up
TURNS = ("<|im_start|>user\n", "\n<|im_start|>assistant\n")  # between them a question and its end
PART = 4  # one in so many questions is enough for a request that must be cheap


class Lab:
    """Everything that pieces share, made when first asked for."""

    def __init__(self, data: Data, models: Models, sizes: Sizes, cache: Path, results: Results):
        self.data, self.models, self.sizes = data, models, sizes
        self._cache, self._results = cache, results
        self._guesses: dict[str, float] = {}
        self._gradient_seconds: dict[tuple[str, str], float] = {}

    @property
    def model(self) -> Any:
        return self.models.full[0]

    @cached_property
    def targets(self) -> list[Target]:
        return kfade.find_targets(self.model)

    @cached_property
    def slices(self) -> dict[str, list[TokenSequence]]:
        tokenizer = self.models.full[1]
        return {name: encode(own, tokenizer) for name, own in self.data.slices().items()}

    @cached_property
    def ruler(self) -> Ruler:
        return Ruler(self.model, {name: self.slices[name] for name in ("held_out", "report")})

    @cached_property
    def text(self) -> list[TokenSequence]:
        """WikiText, as many sequences as in the fit and of about the same length."""
        text = kfade.encode(self.data.paragraphs(), self.models.full[1], length=65)
        return text[: len(self.slices["fit"])]

    @cached_property
    def own_text(self) -> list[TokenSequence]:
        """What the model itself says where a user's turn begins, and its answer to that (as Magpie
        by Xu et al. 2024): as many turns as there are questions in the fit, at temperature 1."""
        model, tokenizer = self.models.full
        user, assistant = (
            tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in TURNS
        )

        def said(prompts: list[tuple[int, ...]], seed: int) -> list[tuple[int, ...]]:
            found: dict[int, tuple[int, ...]] = {}
            generate(
                *(model, tokenizer, prompts, lambda index, tokens: found.update({index: tokens})),
                max_new_tokens=OWN_TOKENS,
                batch_tokens=BUDGET,
                temperature=1.0,
                seed=seed,
            )
            return [tuple(found[index]) for index in range(len(prompts))]

        asked = said([user] * len(self.slices["fit"]), self.sizes.seed)
        prompts = [(*user, *question, *assistant) for question in asked]
        answers = said(prompts, self.sizes.seed + 1)
        return [
            completed(Prompt("own text", "", prompt), tokens)
            for prompt, tokens in zip(prompts, answers, strict=True)
        ]

    def sequences(self, role: str) -> list[TokenSequence]:
        """Of the authors of a role: report, tuning, unseen."""
        return encode(self.data.of(getattr(self.data.authors, role)), self.models.full[1])

    @lru_cache(maxsize=2)  # noqa: B019
    def group(self, name: str) -> Group:
        told = self._results["targets"]
        aim = told["retrained"] if name == "report" else told["unseen"]
        start = told[name]["forget_probability"]
        return Group(name, self.sequences(name), start, aim["forget_probability"])

    @lru_cache(maxsize=2)  # noqa: B019
    def gradient(self, group: str, objective: str) -> Matrices:
        start = time.perf_counter()
        batches = make_batches(self.group(group).forget, budget=BUDGET)
        found = forget_gradient(self.model, batches, self.targets, OBJECTIVES[objective])
        self._gradient_seconds[group, objective] = time.perf_counter() - start
        return found

    def fit(self, name: str) -> dict[str, Any]:
        """Fit and keep a curvature; how long that took, with the fit that it builds upon."""

        def make(folder: Path) -> dict[str, Any]:
            start = time.perf_counter()
            batches = make_batches(self.slices["fit"], budget=BUDGET)
            found = fitted(name, self.model, batches, self.targets, self.curvature)
            seconds = time.perf_counter() - start
            found.save(folder / "curvature.safetensors")
            if name.startswith("ekfac"):
                seconds += self.fit(name.replace("ekfac", "kfac"))["fit_seconds"]
            return {"fit_seconds": seconds, "questions": len(self.slices["fit"])}

        return made(self._cache / f"fit-{name}", make)

    def curvature(self, name: str) -> Curvature:
        self.fit(name)
        return Curvature.load(self._cache / f"fit-{name}" / "curvature.safetensors")

    def split_fit(self, share: int) -> Curvature:
        """EK-FAC with bases from every so many retain sequences, eigenvalues from the others."""
        every = self.slices["fit"]
        some, rest = every[::share], [s for i, s in enumerate(every) if i % share]
        first, second = (make_batches(part, budget=BUDGET) for part in (some, rest))
        kfac = kfade.KFAC().fit(self.model, first, self.targets)
        return kfade.EKFAC().correct(kfac, self.model, second, self.targets)

    def search(
        self,
        group: str,
        curvature: Curvature,
        objective: str,
        damping: float,
        *,
        relative: bool = True,
        layers: str = "all",
        like: str,
        keep: str | None = None,
    ) -> dict[str, Any]:
        """One step by that curvature to the group's target; searches that are ``like`` one another
        begin where the last one ended. ``keep``: name to keep the update by."""
        targets = targets_within(self.targets, layers)
        gradient = self.gradient(group, objective)
        row, update = Search(self.model, self.ruler, self.group(group)).step(
            cut(curvature, targets),
            gradient,
            targets,
            damping=damping,
            relative=relative,
            guess_kl=self._guesses.get(like),
        )
        row |= {"damping": damping, "gradient_seconds": self._gradient_seconds[group, objective]}
        if "exact_kl" in row:
            self._guesses[like] = row["exact_kl"]
        return self._kept(row, update, keep)

    def economical(self, damping: float) -> dict[str, Any]:
        """A request that looks at a part of the data only: gradient and size by every
        ``PART``-th forget question and held-out question.

        ``request``: what it did on that part, with its seconds; beside it the row at the target as
        all others are measured, which the request does not pay for.
        """
        group, curvature = self.group("report"), self.curvature("ekfac")
        few, held_out = group.forget[::PART], self.slices["held_out"][::PART]
        start = time.perf_counter()
        begin = forgetting(self.model, few[::MEASURED])["forget_probability"]
        small = replace(group, name="part", forget=few, start=begin)
        ruler = Ruler(self.model, {"held_out": held_out})
        batches = make_batches(few, budget=BUDGET)
        gradient = forget_gradient(self.model, batches, self.targets, kfade.margin)
        told, update = Search(self.model, ruler, small).step(
            curvature, gradient, self.targets, damping=damping, guess_kl=None
        )
        seconds = time.perf_counter() - start
        if update is None:
            return told
        row, _ = Search(self.model, self.ruler, group).along(update.deltas, 1.0)
        return {**row, "request": {**told, "seconds": seconds}, "damping": damping}

    def baseline(self, name: str, rate: float, group: str, keep: str | None) -> dict[str, Any]:
        sets = (self.slices["fit"], self.slices["held_out"])
        report = (lambda: self.ruler.kl("report")) if group == "report" else None
        row, update = baseline(
            *(name, rate, self.model, self.ruler, self.group(group), *sets, self.sizes, report)
        )
        return self._kept({**row, "rate": rate}, update, keep)

    def unlearn(
        self,
        curvature: Curvature,
        damping: float,
        keep: str | None = None,
        *,
        direction: Direction = Direction(),
        refit: bool = False,
        **options: Any,
    ) -> dict[str, Any]:
        """``kfade.unlearn`` to the report group's target, the last step then brought to it as rows
        of one step are; ``options`` are those of ``kfade.Run``."""
        start = time.perf_counter()
        group, states = self.group("report"), [Update({})]
        try:
            update = kfade.unlearn(
                self.model,
                forget=group.forget,
                retain=self.slices["fit"],
                held_out=self.slices["held_out"],
                direction=replace(direction, damping=damping),
                size=StepSize(until_probability=group.target),
                run=Run(
                    curvature=curvature,
                    refit=refit,
                    batch_tokens=BUDGET,
                    on_step=states.append,
                    **options,
                ),
            )
        except kfade.InputError as error:  # the target cannot be reached
            return {"failure": str(error), "curve": []}
        seconds = time.perf_counter() - start
        before = states[-2]
        last = update.plus(before.deltas, -1.0).deltas
        row, found = Search(self.model, self.ruler, group).along(last, 1.0, before)
        steps = update.provenance["steps"]
        row |= {"refined": steps[-1]["refined"], "refinements": steps[-1]["refinements"]}
        return self._kept({**row, "damping": damping, "run_seconds": seconds}, found, keep)

    def curve(self, row: str) -> dict[str, Any]:
        """A reported row's update at other lengths."""
        deltas = Update.load(self._path(row)).deltas
        search = Search(self.model, self.ruler, self.group("report"))
        return {"curve": [search.at(Update({}).plus(deltas, part)) for part in CURVE_LENGTHS]}

    def targets_piece(self) -> dict[str, Any]:
        """Where everything starts, and how far it is to go."""
        found = {
            name: forgetting(self.model, self.sequences(name)[::MEASURED])
            for name in ("report", "tuning", "unseen")
        }
        retrained, _ = self.models.load("retrained")
        found["retrained"] = {
            **forgetting(retrained, self.sequences("report")[::MEASURED]),
            "kl": self.ruler.kl("held_out", retrained),
            "report_kl": self.ruler.kl("report", retrained),
        }
        return found

    def tofu(self, row: str, factor: float = 1.0) -> dict[str, Any]:
        """TOFU's items of a model: ``full``, ``retrained``, or of a row's update times a factor."""
        path = self._cache / f"tofu-{self.sizes.utility}" / f"{row} x{factor:g}.jsonl"
        questions = self.data.questions()
        model, update = self.edited(row, factor)
        with update.applied_to(model) as edited:
            items = answer(edited, self.models.full[1], questions, path)
        log = log_of(items, row)
        figures = aggregate(log)
        print(f"  utility {figures['model_utility']:.3f}, forget {figures['forget']}", flush=True)
        forget = [values for name, values in items.items() if name.startswith("forget/")]
        keys = ("answer_loss", "base_loss", "false_losses", "rouge_l")
        return {
            "items": {n: {k: rounded(v[k]) for k in keys} for n, v in items.items()},
            "answers": [
                {key: values[key] for key in ("question", "answer", "generated")}
                for values in forget[:: max(1, len(forget) // SHOWN)][:SHOWN]
            ],
        }

    def by_question(self, row: str) -> dict[str, Any]:
        """KL question by question of ``retrained``, or of a row's update brought to the target by
        its length.

        ``report``: on the report slice; ``others``: on the questions of the tuning authors, who are
        kept here and whom no method was shown. Each a list of (KL per token, tokens).
        """
        model, update = self.edited(row)
        told: dict[str, Any] = {}
        if update.deltas:
            told, found = Search(model, self.ruler, self.group("report")).along(update.deltas, 1.0)
            if found is None:
                return told
            update = found
        for name, own in (("report", self.slices["report"]), ("others", self.sequences("tuning"))):
            groups = grouped(make_batches(own, budget=BUDGET))
            kls: dict[int, Tensor] = {}
            divergences(
                groups,
                lambda number: outputs(self.model, groups[number], "full model"),  # noqa: B023
                lambda: update.applied_to(model),
                kls.__setitem__,
            )
            means = torch.stack([kls[i].mean() for i in range(len(own))])
            told[name] = [(kl, len(kls[i])) for i, kl in enumerate(to_four_digits(means))]
        return told

    def edited(self, row: str, factor: float = 1.0) -> tuple[Any, Update]:
        """A model and what is to be added to it: ``full`` and ``retrained`` have no update."""
        if row == "retrained":
            return self.models.load(row)[0], Update({})
        deltas = {} if row == "full" else Update.load(self._path(row)).deltas
        return self.model, Update({}).plus(deltas, factor)

    def has(self, row: str) -> bool:
        """Whether the row's update was kept, which it is not where the target was not reached."""
        return row in ("full", "retrained") or self._path(row).is_file()

    def _path(self, row: str) -> Path:
        return self._cache / "updates" / f"{row}.safetensors"

    def _kept(self, row: dict[str, Any], update: Update | None, keep: str | None) -> dict[str, Any]:
        if keep and update is not None:
            self._path(keep).parent.mkdir(exist_ok=True)
            update.save(self._path(keep))
        return row


def rounded(value: Any) -> Any:
    """Losses as the results keep them."""
    return [round(x, 5) for x in value] if isinstance(value, list) else round(value, 5)
