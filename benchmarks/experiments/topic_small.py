"""Topic-small: a model forgets a subject that it learnt in its training, and keeps related ones.

    python benchmarks/experiments/topic_small.py --data DIR [--only 'tune gd*'] [--list]

The stand-in for WMDP and MMLU. Passages of an astronomy textbook are forgotten; passages of
psychology and sociology and WikiText are retained. Questions are those of the books' glossaries.
The update of each method is scaled until the mean probability of the right choice, among the four
by their likelihoods, is the target on the *tune* questions. The setting with the lowest KL on
held-out retain text is chosen. Its update is scaled to the target on the subject's other questions
and then measured on questions about the related subjects and about general knowledge, on other
retain text, and by the KL on completions of Alpaca's instructions.

Each result is added to ``benchmarks/results/topic_small.jsonl`` when it is done and is not computed
again. ``make results`` draws the page.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from lab.baselines import method_of
from lab.forgetting import Group, token_kls
from lab.lab import Lab
from lab.pieces import Piece, Results, options_of, read_options, run
from lab.records import RESULTS, Record
from lab.tuning import DEFAULT, DEFAULT_FIT, START_RATES, VARIANTS, chosen, lowest, rates
from topic_data import SUBJECT, Data, Sizes, instructions

import kfade
from kfade.data.sequences import TokenSequence
from kfade.evaluate.choice import answer_by_likelihood
from kfade.evaluate.completions import complete, completed, encode_prompts
from kfade.evaluate.divergence import rounded, summarise_divergence
from kfade.evaluate.generation import Decoding
from kfade.evaluate.item_log import ItemLog
from kfade.evaluate.questions import Question
from kfade.method.size import StepSize
from kfade.method.update import Update

FILE = RESULTS / "topic_small.jsonl"
DAMPINGS = (0.1, 0.01, 1.0)  # times the mean eigenvalue
PAPER_DAMPING = 1e-14  # the paper's on WMDP: absolute, with sampled labels
DEFAULT_KLS = (0.01, 0.0025)  # of the whole run, before it is scaled; the first is the default's
STEPPED: dict[str, dict[str, Any]] = {
    **{row: {"estimator": "ekfac", **own} for row, own in VARIANTS.items() if row != DEFAULT},
    "steps 3 kfac": {"estimator": "kfac", "steps": 3},
    "steps 3 then ce kfac": {"estimator": "kfac", **VARIANTS["steps 3 then ce"]},
}
"""Variants that may improve the single step, at its damping; all use one fit."""
BANDS = ("3-6", "8-11", "13-16", "20-23")  # of blocks; the paper changes one band on WMDP
BAND_STEPS = 4  # on a band, each with its fit, as in the paper
OURS_ON_BAND, PAPER_ON_BAND = f"steps {BAND_STEPS} band", f"paper, steps {BAND_STEPS} band"
BASELINES = ("gd", "npo", "rmu", "simnpo", "elm")
START_RATE, MOST_RATES = 1e-4, len(DAMPINGS)
EVALUATIONS = 4  # of a baseline's run
NEW_TOKENS = 48  # of a completion
GUESS_KL = 0.2  # half the exact quadratic form where the target of a step is expected


@dataclass(frozen=True)
class Subject(Group):
    """What is forgotten, measured by questions."""

    questions: Sequence[Question]
    tokenizer: Any

    def forgotten(self, model: Any) -> dict[str, float]:
        """``forget_probability``: of the right choice, mean over the questions."""
        told = answer_by_likelihood(model, self.tokenizer, self.questions)["total"]
        return {"forget_probability": sum(told.probabilities) / len(told.probabilities)}


class TopicLab(Lab):
    """The model, the subject, and how each method is measured."""

    def __init__(
        self,
        folder: Path,
        sizes: Sizes,
        model: str,
        cache: Path,
        results: Results,
        device: str | None = None,
    ) -> None:
        super().__init__(sizes, cache, results, device)
        self._folder, self._name = folder, model

    @cached_property
    def loaded(self) -> tuple[Any, Any]:
        return kfade.load_model(self._name, dtype="float32", device=self.device)

    @cached_property
    def data(self) -> Data:
        return Data.read(self._folder, self.tokenizer, self.sizes)

    @cached_property
    def slices(self) -> dict[str, Sequence[TokenSequence]]:
        return self.data.slices

    def group(self, name: str) -> Subject:
        """The subject, measured by the questions of that name: ``tune``, ``topic``."""
        start = self.results["base"][name]["probability"]
        target, questions = self.sizes.target, self.data.questions[name]
        return Subject(name, self.data.forget, start, target, questions, self.tokenizer)

    def one_step(self, row: str, fit: str, damping: float, **options: Any) -> Record:
        """One step of K-FADE by the margin."""
        told, update = self.step("tune", self.curvature(fit), damping, guess_kl=GUESS_KL, **options)
        return self.keep(row, told, update)

    def several_steps(
        self, row: str, like: str, damping: float, fit: str, **options: Any
    ) -> Record:
        """``kfade.unlearn`` to the KL of the one step ``like``, then scaled to the target."""
        single = self.results[f"tune {like}"]
        if "failure" in single:
            return {"failure": f"the one step: {single['failure']}", "curve": []}
        return self._run(row, single["kl"], damping, fit, **options)

    def default(self, kl: float) -> Record:
        """``kfade unlearn`` without options to that KL, then scaled to the target."""
        return self._run(f"{DEFAULT} {kl:g}", kl, None, DEFAULT_FIT, **VARIANTS[DEFAULT])

    def _run(self, row: str, kl: float, damping: float | None, fit: str, **options: Any) -> Record:
        _, update, told = self.unlearn("tune", fit, StepSize(kl=kl), damping, **options)
        found, scaled = self.search("tune").along(update.deltas)
        return self.keep(row, {**found, **told}, scaled)

    def baseline(self, name: str, rate: float) -> Record:
        """Train a baseline to the target or beyond it, or until its steps are over; its update is
        then scaled to the target."""
        options = {"concept": SUBJECT} if name == "elm" else {}
        method = method_of(name, self.model, self.data.forget, self.tokenizer, **options)
        steps = round(self.sizes.steps * max(1.0, start_rate(name) / rate))
        subject, curve = self.group("tune"), []

        def enough(checkpoint: Any, update: Update) -> bool:
            point, found = checkpoint.curve[-1], subject.forgotten(self.model)
            curve.append({"step": point["step"], "kl": point["retain_kl"], **found})
            return found["forget_probability"] <= self.sizes.target

        start = time.perf_counter()
        try:
            update = self.train(method, "tune", rate, steps, steps // EVALUATIONS, enough)
        except kfade.InputError as error:  # the loss is not finite
            return {"failure": str(error), "curve": []}
        row = {"run": curve, "rate": rate, "run_seconds": time.perf_counter() - start}
        found, scaled = self.search("tune").along(update.deltas)
        return self.keep(f"{name} {rate:g}", {**row, **found}, scaled)

    def report(self, row: str) -> Record:
        """The tables' figures of a kept update, scaled to the target on the subject's questions; of
        the base model for the row ``base``."""
        ruler = self.ruler  # made of the unedited model
        update, scaled = Update({}), {}
        if row != "base":
            scaled, found = self.search("topic").along(self.kept(row).deltas)
            if found is None:
                return scaled
            update = found
        with update.applied_to(self.model):
            told = {name: self._asked(own) for name, own in self.data.questions.items()}
            told["retain_kl"] = ruler.kl("report") if update.deltas else 0.0
        return {**scaled, **told, "completions": self._on_completions(update)}

    def _asked(self, questions: Sequence[Question]) -> Record:
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
        """The base model's completions of Alpaca's instructions."""
        examples = instructions(self._folder, self.sizes.completions)
        prompts = encode_prompts(examples, self.tokenizer)
        path = self.cache / f"completions-{len(prompts)}.jsonl"
        with ItemLog(path, {"benchmark": "kl", "tokens": NEW_TOKENS}) as log:
            complete(self.model, self.tokenizer, prompts, log, Decoding(NEW_TOKENS))
            said = [log.items[str(i)]["tokens"] for i in range(len(prompts))]
        return [completed(prompt, own) for prompt, own in zip(prompts, said, strict=True)]

    def _on_completions(self, update: Update) -> Record:
        kls = token_kls(self.model, self.model, update, self._completions)
        items = {
            str(index): {"kl": kl.mean().item(), "tokens": len(kl), "token_kl": rounded(kl)}
            for index, kl in kls.items()
        }
        found = summarise_divergence(items)
        return {name: found[name] for name in ("kl_per_token", "completions", "tokens")}


def pieces(lab: TopicLab, results: Results) -> Iterator[Piece]:
    """All pieces. Each part reads from the results so far what was chosen."""
    yield "base", partial(lab.report, "base")
    for fit in ("kfac", "ekfac", "kfac sampled", "ekfac sampled", "diagonal", "identity"):
        yield f"fit {fit}", partial(lab.fit, fit)
    for fit in ("ekfac", "kfac", "diagonal", "identity"):
        # The direction of identity does not depend on the damping.
        for damping in DAMPINGS if fit != "identity" else (0.0,):
            row = f"{fit} {damping:g}"
            yield f"tune {row}", partial(lab.one_step, row, fit, damping)
        yield from reported(lab, chosen_row(results, fit))
    paper = partial(lab.one_step, "paper", "ekfac sampled", PAPER_DAMPING, relative=False)
    yield "tune paper", paper
    yield from reported(lab, "paper")
    for kl in DEFAULT_KLS:
        yield f"tune {DEFAULT} {kl:g}", partial(lab.default, kl)
    yield from reported(lab, chosen_row(results, DEFAULT))
    yield from variants(lab, results)
    yield from on_band(lab, results)
    for name in BASELINES:
        for rate in rates(results, name, start_rate(name), MOST_RATES):
            yield f"tune {name} {rate:g}", partial(lab.baseline, name, rate)
        yield from reported(lab, chosen_row(results, name))


def variants(lab: TopicLab, results: Results) -> Iterator[Piece]:
    """The variants ``STEPPED``, at the damping of the single step."""
    for row, options in STEPPED.items():
        fit = options["estimator"]
        damping = chosen(results, fit)
        if damping is not None:
            own = {key: value for key, value in options.items() if key != "estimator"}
            like = f"{fit} {damping:g}"
            yield f"tune {row}", partial(lab.several_steps, row, like, damping, fit, **own)
            yield from reported(lab, row)


def on_band(lab: TopicLab, results: Results) -> Iterator[Piece]:
    """K-FAC on a band of blocks: one step on each band, then several with refits on the best one;
    and several of the paper's recipe there."""
    damping = chosen(results, "kfac")
    if damping is None:
        return
    for layers in BANDS:
        row = f"band {layers}"
        yield f"tune {row}", partial(lab.one_step, row, "kfac", damping, layers=layers)
    best = best_band(results)
    if best is None:
        return
    like, refits = f"band {best}", {"layers": best, "refit": True, "steps": BAND_STEPS}
    yield from reported(lab, like)
    ours = partial(lab.several_steps, OURS_ON_BAND, like, damping, "kfac")
    yield f"tune {OURS_ON_BAND}", partial(ours, **refits)
    yield from reported(lab, OURS_ON_BAND)
    paper = partial(lab.several_steps, PAPER_ON_BAND, like, PAPER_DAMPING, "ekfac sampled")
    yield f"tune {PAPER_ON_BAND}", partial(paper, relative=False, **refits)
    yield from reported(lab, PAPER_ON_BAND)


def reported(lab: TopicLab, row: str | None) -> Iterator[Piece]:
    """The tables' figures of a row, if it reached the target."""
    if row is not None and lab.has(row):
        yield f"report {row}", partial(lab.report, row)


def chosen_row(results: Results, name: str) -> str | None:
    """A method with the setting that was chosen for it, as its pieces are called."""
    best = chosen(results, name)
    return f"{name} {best:g}" if best is not None else None


def best_band(results: Results) -> str | None:
    """The band whose step has the lowest held-out KL on the tune questions."""
    told = {band: results.get(f"tune band {band}") for band in BANDS}
    return lowest((band, row) for band, row in told.items() if row)


def start_rate(name: str) -> float:
    """The learning rate that the tuning of a baseline begins with."""
    return START_RATES.get(name, START_RATE)


def main() -> None:
    given, sizes, results = read_options(options_of(__doc__, FILE), Sizes())
    cache = given.cache / f"topic-small-{sizes.model}-{sizes.tokens}-{sizes.seed}"
    cache.mkdir(parents=True, exist_ok=True)
    lab = TopicLab(given.data, sizes, given.model, cache, results, given.device)
    run(pieces(lab, results), results, given)


if __name__ == "__main__":
    main()
