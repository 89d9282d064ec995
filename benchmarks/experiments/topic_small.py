"""Topic-small: a model forgets a subject that it learnt in its training, and keeps its sisters.

    python benchmarks/experiments/topic_small.py --data DIR [--only 'tune gd*'] [--list]

The stand-in for WMDP and MMLU. Passages of an astronomy textbook are forgotten; passages of
psychology and sociology and WikiText are retained. Questions are those of the books' glossaries.
Every method yields an update, which is then lengthened or shortened until, on the *tune* questions,
the mean probability of the right choice (among the four, by their likelihoods) is the target: so
all are compared at equal forgetting. The setting with the least KL on held-out retain text is kept.
Its update is brought to the target on the subject's other questions, and then measured on questions
of the sisters and of general knowledge, on other retain text, and by the KL on completions of
Alpaca's instructions.

Results go to ``benchmarks/results/topic_small.json`` piece by piece; a piece that is there is not
computed again. ``results_page.py`` makes ``docs/results.md`` of them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from competitors import method_of
from equal_forgetting import BUDGET, OBJECTIVES, Group, Ruler, Search, fitted
from fine_tune import block_weights
from pieces import Piece, Results, made, opened, options_of, run
from topic_small_data import SUBJECT, Data, Sizes, instructions
from torch.optim import AdamW
from tuning import VARIANTS, chosen, lowest, rates

import kfade
from kfade.baselines.loop import Settings, train
from kfade.baselines.weights import Dense
from kfade.curvature.curvature import Curvature, Matrices
from kfade.data.batches import make_batches
from kfade.data.sequences import TokenSequence
from kfade.evaluate.choice import answer_by_likelihood
from kfade.evaluate.completions import complete, completed, encode_prompts
from kfade.evaluate.divergence import divergences, grouped, outputs, rounded, summarise_divergence
from kfade.evaluate.log import ItemLog
from kfade.evaluate.questions import Question
from kfade.method.gradient import forget_gradient
from kfade.method.settings import Direction, Run
from kfade.method.step import StepSize
from kfade.method.sweep import cut, targets_within
from kfade.method.update import Update
from kfade.models.targets import Target
from kfade.runs.words import draw_of, estimator_of

RESULTS = Path(__file__).parents[1] / "results" / "topic_small.json"
DAMPINGS = (0.1, 0.01, 1.0)  # times the mean eigenvalue
STEPPED: dict[str, dict[str, Any]] = {
    **{row: {"estimator": "ekfac", **options} for row, options in VARIANTS.items()},
    "steps 3 kfac": {"estimator": "kfac", "steps": 3},
    "steps 3 then ce kfac": {"estimator": "kfac", **VARIANTS["steps 3 then ce"]},
}
"""What may better one step; all by one fit, at the damping that one step chose."""
BANDS = ("3-6", "8-11", "13-16", "20-23")  # of blocks; the paper's run on WMDP is on one
BAND_STEPS = 4  # on a band, with refits, as the paper's
OURS_ON_BAND, PAPER_ON_BAND = f"steps {BAND_STEPS} band", f"paper, steps {BAND_STEPS} band"
PAPER = 1e-14  # the paper's damping on WMDP, absolute, with sampled labels
BASELINES = ("gd", "npo", "rmu", "simnpo", "elm")
START_RATES = {"rmu": 1e-3}
START_RATE, MOST_RATES = 1e-4, len(DAMPINGS)
EVALUATIONS = 4  # of a baseline's run
NEW_TOKENS = 48  # of a completion


@dataclass(frozen=True)
class Subject(Group):
    """What is to be forgotten, and the questions that tell how far."""

    questions: Sequence[Question]
    tokenizer: Any

    def forgotten(self, model: Any) -> dict[str, float]:
        """``forget_probability``: of the right choice, mean over the questions."""
        told = answer_by_likelihood(model, self.tokenizer, self.questions)["total"]
        return {"forget_probability": sum(told.probabilities) / len(told.probabilities)}


class Lab:
    """Everything that pieces share, made when first asked for."""

    def __init__(self, folder: Path, sizes: Sizes, model: str, cache: Path, results: Results):
        self.sizes, self._folder, self._cache, self._results = sizes, folder, cache, results
        self.model, self.tokenizer = kfade.load_model(model, dtype="float32")
        self.data = Data.read(folder, self.tokenizer, sizes)

    @cached_property
    def targets(self) -> list[Target]:
        return kfade.find_targets(self.model)

    @cached_property
    def ruler(self) -> Ruler:
        return Ruler(self.model, {"held_out": self.data.held_out, "report": self.data.report})

    def subject(self, asked: str = "tune") -> Subject:
        """The subject as the questions ``asked`` tell of it: ``tune``, ``topic``."""
        start = self._results["base"][asked]["probability"]
        target, questions = self.sizes.target, self.data.questions[asked]
        return Subject(asked, self.data.forget, start, target, questions, self.tokenizer)

    @cached_property
    def gradient(self) -> tuple[Matrices, float]:
        """That of the margin, and the seconds it took."""
        start = time.perf_counter()
        batches = make_batches(self.data.forget, budget=BUDGET)
        found = forget_gradient(self.model, batches, self.targets, OBJECTIVES["margin"])
        return found, time.perf_counter() - start

    def fit(self, name: str) -> dict[str, Any]:
        def make(folder: Path) -> dict[str, Any]:
            start = time.perf_counter()
            batches = make_batches(self.data.fit, budget=BUDGET)
            found = fitted(name, self.model, batches, self.targets, self.curvature)
            seconds = time.perf_counter() - start
            found.save(folder / "curvature.safetensors")
            if name.startswith("ekfac"):
                seconds += self.fit(name.replace("ekfac", "kfac"))["fit_seconds"]
            return {"fit_seconds": seconds}

        return made(self._cache / f"fit-{name}", make)

    def curvature(self, name: str) -> Curvature:
        self.fit(name)
        return Curvature.load(self._cache / f"fit-{name}" / "curvature.safetensors")

    def step(
        self,
        row: str,
        estimator: str,
        damping: float,
        *,
        relative: bool = True,
        layers: str = "all",
    ) -> dict[str, Any]:
        """One step of K-FADE by the margin."""
        gradient, seconds = self.gradient
        targets = targets_within(self.targets, layers)
        told, update = Search(self.model, self.ruler, self.subject()).step(
            cut(self.curvature(estimator), targets),
            gradient,
            targets,
            damping=damping,
            relative=relative,
            guess_kl=0.2,
        )
        told |= {"damping": damping, "gradient_seconds": seconds}
        return self._kept(row, told, update)

    def unlearn(
        self,
        row: str,
        like: str,
        damping: float,
        *,
        estimator: str,
        layers: str = "all",
        relative: bool = True,
        direction: Direction = Direction(),
        refit: bool = False,
        steps: int = 1,
    ) -> dict[str, Any]:
        """``kfade.unlearn``, as far as the one step ``like`` went, then to the target."""
        targets = targets_within(self.targets, layers)
        word, _, labels = estimator.partition(" ")
        curvature = cut(self.curvature(estimator), targets)
        start = time.perf_counter()
        update = kfade.unlearn(
            self.model,
            forget=self.data.forget,
            retain=self.data.fit,
            held_out=self.data.held_out,
            fit=estimator_of(word, draw_of(labels or "sqrt")),
            direction=replace(direction, damping=damping, relative=relative),
            size=StepSize(kl=self._results[f"tune {like}"]["kl"]),
            run=Run(
                targets=targets,
                curvature=curvature,
                steps=steps,
                refit=refit,
                batch_tokens=BUDGET,
            ),
        )
        seconds = time.perf_counter() - start
        told, found = self._along(update)
        steps = update.provenance["steps"]
        told |= {"refined": steps[-1]["refined"], "damping": damping, "run_seconds": seconds}
        return self._kept(row, told, found)

    def baseline(self, name: str, rate: float) -> dict[str, Any]:
        """A run that ends where the target has been reached or passed, or with its steps; its
        update is then brought to the target."""
        given = {"concept": SUBJECT} if name == "elm" else {}
        method = method_of(name, self.model, self.data.forget, self.tokenizer, **given)
        start_rate = START_RATES.get(name, START_RATE)
        steps = round(self.sizes.steps * max(1.0, start_rate / rate))
        start, told = time.perf_counter(), []

        def enough(checkpoint: Any, update: Update) -> bool:
            point = checkpoint.curve[-1]
            found = self.subject().forgotten(self.model)
            told.append({"step": point["step"], "kl": point["retain_kl"], **found})
            return found["forget_probability"] <= self.sizes.target

        try:
            update = train(
                self.model,
                method.terms,
                Dense(self.model, method.trains or block_weights(self.model)),
                forget=self.data.forget,
                retain=self.data.fit,
                held_out=self.data.held_out,
                settings=Settings(
                    lr=rate,
                    steps=steps,
                    batch=self.sizes.batch,
                    weight_decay=method.defaults.weight_decay,
                    clip=method.defaults.clip,
                    optimizer=partial(AdamW, fused=True),
                ),
                evaluate_every=steps // EVALUATIONS,
                batch_tokens=400,
                seed=self.sizes.seed,
                on_evaluation=enough,
            )
        except kfade.InputError as error:  # the loss is not finite
            return {"failure": str(error), "curve": []}
        row = {"run": told, "rate": rate, "run_seconds": time.perf_counter() - start}
        found, scaled = self._along(update)
        return self._kept(f"{name} {rate:g}", {**row, **found}, scaled)

    def report(self, row: str | None) -> dict[str, Any]:
        """The tables' figures of an update, at the length that the subject's questions ask for; of
        the base model where there is none."""
        update, scaled = Update({}), {}
        if row is not None:
            scaled, found = self._along(Update.load(self._path(row)), "topic")
            if found is None:
                return scaled
            update = found
        with update.applied_to(self.model):
            told = {name: self._asked(own) for name, own in self.data.questions.items()}
            told["retain_kl"] = self.ruler.kl("report") if row else 0.0
        return {**scaled, **told, "completions": self._divergence(update)}

    def has(self, row: str) -> bool:
        return self._path(row).is_file()

    def _along(self, update: Update, asked: str = "tune") -> tuple[dict[str, Any], Update | None]:
        """``update`` at the length that those questions ask for, and what it does there."""
        return Search(self.model, self.ruler, self.subject(asked)).along(update.deltas, 1.0)

    def _asked(self, questions: Any) -> dict[str, Any]:
        told = answer_by_likelihood(self.model, self.tokenizer, questions)["total"]
        return {
            "accuracy": told.accuracy,
            "standard_error": told.standard_error,
            "probability": sum(told.probabilities) / len(told.probabilities),
            "correct": "".join(str(int(right)) for right in told.correct),
            "probabilities": [round(p, 5) for p in told.probabilities],
        }

    @cached_property
    def _completions(self) -> list[TokenSequence]:
        """What the base model says to Alpaca's instructions."""
        examples = instructions(self._folder, self.sizes.completions)
        prompts = encode_prompts(examples, self.tokenizer)
        path = self._cache / f"completions-{len(prompts)}.jsonl"
        with ItemLog(path, {"benchmark": "kl", "tokens": NEW_TOKENS}) as log:
            complete(self.model, self.tokenizer, prompts, log, max_new_tokens=NEW_TOKENS)
            said = [log.items[str(i)]["tokens"] for i in range(len(prompts))]
        return [completed(prompt, own) for prompt, own in zip(prompts, said, strict=True)]

    @cached_property
    def _base(self) -> list[Any]:
        groups = grouped(make_batches(self._completions, budget=BUDGET))
        return [(batches, outputs(self.model, batches, "base")) for batches in groups]

    def _divergence(self, update: Update) -> dict[str, Any]:
        items: dict[str, dict[str, Any]] = {}

        def note(index: int, kl: torch.Tensor) -> None:
            told = {"kl": kl.mean().item(), "tokens": len(kl), "token_kl": rounded(kl)}
            items[str(index)] = told

        divergences(
            [batches for batches, _ in self._base],
            lambda number: self._base[number][1],
            lambda: update.applied_to(self.model),
            note,
        )
        found = summarise_divergence(items)
        return {name: found[name] for name in ("kl_per_token", "completions", "tokens")}

    def _path(self, row: str) -> Path:
        return self._cache / "updates" / f"{row}.safetensors"

    def _kept(self, row: str, told: dict[str, Any], update: Update | None) -> dict[str, Any]:
        if update is not None:
            self._path(row).parent.mkdir(exist_ok=True)
            update.save(self._path(row))
        return told


def pieces(lab: Lab, results: Results) -> Iterator[Piece]:
    """All pieces, the most important first; what was chosen is read from the results so far."""
    yield "base", lambda: lab.report(None)
    for name in ("kfac", "ekfac"):
        yield f"fit {name}", lambda name=name: lab.fit(name)
    yield from stepped(lab, results, "ekfac")
    for name in ("kfac sampled", "ekfac sampled"):
        yield f"fit {name}", lambda name=name: lab.fit(name)
    yield "tune paper", lambda: lab.step("paper", "ekfac sampled", PAPER, relative=False)
    if lab.has("paper"):
        yield "report paper", lambda: lab.report("paper")
    yield from compared(lab, results, "gd")
    yield from bettered(lab, results, "ekfac")
    for name in BASELINES[1:3]:
        yield from compared(lab, results, name)
    for name in ("diagonal", "identity"):
        yield f"fit {name}", lambda name=name: lab.fit(name)
    for name in ("kfac", "diagonal", "identity"):
        yield from stepped(lab, results, name)
    yield from banded(lab, results, "kfac")
    yield from bettered(lab, results, "kfac")
    for name in BASELINES[3:]:
        yield from compared(lab, results, name)


def stepped(lab: Lab, results: Results, estimator: str) -> Iterator[Piece]:
    """One step: tuned over dampings, then reported; identity's direction does not depend on it."""
    for damping in DAMPINGS if estimator != "identity" else (0.0,):
        row = f"{estimator} {damping:g}"
        yield f"tune {row}", lambda row=row, d=damping: lab.step(row, estimator, d)
    yield from reported(lab, results, estimator)


def compared(lab: Lab, results: Results, name: str) -> Iterator[Piece]:
    """A baseline: tuned over learning rates, then reported at the best."""
    for rate in rates(results, name, START_RATES.get(name, START_RATE), MOST_RATES):
        yield f"tune {name} {rate:g}", lambda r=rate: lab.baseline(name, r)
    yield from reported(lab, results, name)


def bettered(lab: Lab, results: Results, estimator: str) -> Iterator[Piece]:
    """K-FADE in another way than by one step, with that estimator."""
    damping = chosen(results, estimator)
    if damping is None:
        return
    like = f"{estimator} {damping:g}"
    for row, options in STEPPED.items():
        if options["estimator"] == estimator:
            yield f"tune {row}", lambda row=row, o=options: lab.unlearn(row, like, damping, **o)
            if lab.has(row):
                yield f"report {row}", lambda row=row: lab.report(row)


def banded(lab: Lab, results: Results, estimator: str) -> Iterator[Piece]:
    """K-FADE on a band of blocks: one step on each, then several with refits on the best, by that
    estimator and by the paper's recipe."""
    damping = chosen(results, estimator)
    if damping is None:
        return
    for layers in BANDS:
        row = f"band {layers}"
        yield (
            f"tune {row}",
            lambda row=row, b=layers: lab.step(row, estimator, damping, layers=b),
        )
    best = best_band(results)
    if best is None:
        return
    like = f"band {best}"
    yield f"report {like}", lambda: lab.report(like)
    ways: dict[str, dict[str, Any]] = {
        OURS_ON_BAND: {"estimator": estimator, "damping": damping},
        PAPER_ON_BAND: {"estimator": "ekfac sampled", "damping": PAPER, "relative": False},
    }
    shared = {"layers": best, "refit": True, "steps": BAND_STEPS}
    for row, own in ways.items():
        yield f"tune {row}", lambda row=row, o={**shared, **own}: lab.unlearn(row, like, **o)
        if lab.has(row):
            yield f"report {row}", lambda row=row: lab.report(row)


def best_band(results: Results) -> str | None:
    """The band whose step was best on the tune questions."""
    told = {b: results[f"tune band {b}"] for b in BANDS if f"tune band {b}" in results}
    return lowest(told.items())


def reported(lab: Lab, results: Results, name: str) -> Iterator[Piece]:
    best = chosen(results, name)
    row = f"{name} {best:g}" if best is not None else ""
    if lab.has(row):
        yield f"report {row}", lambda: lab.report(row)


def main() -> None:
    options = options_of(__doc__, RESULTS)
    default = Sizes()
    given = {name: value for name, value in asdict(default).items() if name != "model"}
    for name, value in given.items():
        options.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    arguments = options.parse_args()
    model = Path(arguments.model).name
    sizes = replace(default, model=model, **{name: getattr(arguments, name) for name in given})
    results = opened(arguments.results, asdict(sizes))
    cache = arguments.cache / f"topic-small-{model}-{sizes.tokens}-{sizes.seed}"
    cache.mkdir(parents=True, exist_ok=True)
    lab = Lab(arguments.data, sizes, arguments.model, cache, results)
    run(pieces(lab, results), results, arguments)


if __name__ == "__main__":
    main()
