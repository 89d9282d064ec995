"""Topic-small: a model forgets a subject that it learnt in its training, and keeps related ones.

    python benchmarks/experiments/topic_small.py --data DIR [--subject psychology] [--list]

The stand-in for WMDP and MMLU. Passages of a textbook of astronomy, psychology or sociology are
forgotten; passages of the other two and WikiText are retained. Questions are those of the books'
glossaries. Methods are compared where the mean probability of the right choice, among the four by
their likelihoods, has lost a given share of what it is above chance. Where settings are chosen that
is on the *tune* questions, and the setting with the lowest KL on held-out retain text is taken. For
the tables it is on the subject's other questions. The point is sought along the steps of a run of
K-FADE, and along the whole update of a baseline. What was learnt beside the subject is measured on
questions about the other subjects and about general knowledge, on other retain text, and by the KL
on completions of Alpaca's instructions.

Each result is added to ``benchmarks/results/topic_small_SUBJECT.jsonl`` when it is done and is not
computed again, so a run may be stopped at any time. ``make results`` draws the page.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from lab.baselines import method_of
from lab.forgetting import Group, text_kls
from lab.lab import Lab
from lab.pieces import Piece, Results, options_of, read_options, run
from lab.records import RESULTS, Record
from lab.tuning import (
    DEFAULT,
    DEFAULT_FIT,
    OWN_DAMPING,
    START_RATES,
    VARIANTS,
    chosen,
    lowest,
    rates,
)
from topic_data import Data, Sizes, instructions

import kfade
from kfade.data.sequences import TokenSequence
from kfade.evaluate.choice import answer_by_likelihood
from kfade.evaluate.completions import complete, completed, encode_prompts
from kfade.evaluate.generation import Decoding
from kfade.evaluate.item_log import ItemLog
from kfade.evaluate.questions import Question
from kfade.method.size import StepSize
from kfade.method.update import Update

FILE = RESULTS / "topic_small_{subject}.jsonl"
DAMPINGS = (0.1, 0.01, 1.0)  # times the mean eigenvalue
PAPER_DAMPING = 1e-14  # the paper's on WMDP: absolute, with sampled labels
DEFAULT_KLS = (0.01, 0.0025)  # of the whole run; the target is sought on its way, and beyond it
STEPPED: dict[str, dict[str, Any]] = {
    **{
        row: {"estimator": "ekfac", **own}
        for row, own in VARIANTS.items()
        if row not in OWN_DAMPING
    },
    "steps 3 kfac": {"estimator": "kfac", "steps": 3},
    "steps 3 then ce kfac": {"estimator": "kfac", **VARIANTS["steps 3 then ce"]},
}
"""Variants that may improve the single step, at its damping; all use one fit."""
BANDS = ("3-6", "8-11", "13-16", "20-23")  # of blocks; the paper changes one band on WMDP
BAND_STEPS = 4  # on a band, each with its fit, as in the paper
OURS_ON_BAND, PAPER_ON_BAND = f"steps {BAND_STEPS} band", f"paper, steps {BAND_STEPS} band"
BASELINES = (
    *("gd", "npo", "rmu", "simnpo", "elm"),
    *("repselect", "npo-sam", "undial", "wga", "satimp"),
)
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
        target, questions = self.sizes.target(start), self.data.questions[name]
        return Subject(name, self.data.forget, start, target, questions, self.tokenizer)

    def keep_path(self, row: str, told: Record, states: Sequence[Update]) -> Record:
        """The row with the point of a run where the tune questions reach the target. The updates
        after each step are kept if there is one."""
        found, update = self.search("tune").on_path(states)
        if update is not None:
            for number, state in enumerate(states[1:], 1):
                self.keep(f"{row}/{number}", {}, state)
        return {**found, **told}

    def path(self, row: str) -> list[Update]:
        """An empty update, and those that :meth:`keep_path` kept."""
        names = takewhile(super().has, (f"{row}/{number}" for number in count(1)))
        return [Update({}), *map(self.kept, names)]

    def has(self, name: str) -> bool:
        return super().has(f"{name}/1")

    def one_step(self, row: str, fit: str, damping: float, **options: Any) -> Record:
        """One step of K-FADE by the margin."""
        told, update = self.step("tune", self.curvature(fit), damping, guess_kl=GUESS_KL, **options)
        return self.keep(f"{row}/1", told, update)

    def several_steps(
        self, row: str, like: str, damping: float, fit: str, **options: Any
    ) -> Record:
        """``kfade.unlearn`` to the KL of the one step ``like``."""
        single = self.results[f"tune {like}"]
        if "failure" in single:
            return {"failure": f"the one step: {single['failure']}", "curve": []}
        return self._run(row, single["kl"], damping, fit, **options)

    def default(self, kl: float) -> Record:
        """``kfade unlearn`` without options but that KL."""
        return self._run(f"{DEFAULT} {kl:g}", kl, None, DEFAULT_FIT, **VARIANTS[DEFAULT])

    def _run(self, row: str, kl: float, damping: float | None, fit: str, **options: Any) -> Record:
        states, told = self.unlearn("tune", fit, StepSize(kl=kl), damping, **options)
        return self.keep_path(row, told, states)

    def baseline(self, name: str, rate: float) -> Record:
        """Train a baseline to the target or beyond it, or until its steps are over; its update is
        then scaled to the target."""
        options = {"concept": self.sizes.subject} if name == "elm" else {}
        method = method_of(name, self.model, self.data.forget, self.tokenizer, **options)
        steps = round(self.sizes.steps * max(1.0, start_rate(name) / rate))
        subject, curve = self.group("tune"), []

        def enough(checkpoint: Any, update: Update) -> bool:
            point, found = checkpoint.curve[-1], subject.forgotten(self.model)
            curve.append({"step": point["step"], "kl": point["retain_kl"], **found})
            return found["forget_probability"] <= subject.target

        start = time.perf_counter()
        try:
            update = self.train(method, "tune", rate, steps, steps // EVALUATIONS, enough)
        except kfade.InputError as error:  # the loss is not finite
            return {"failure": str(error), "curve": []}
        row = {"run": curve, "rate": rate, "run_seconds": time.perf_counter() - start}
        return self.keep_path(f"{name} {rate:g}", row, [Update({}), update])

    def report(self, row: str) -> Record:
        """The tables' figures at the point of a kept run where the subject's other questions reach
        the target; of the base model for the row ``base``.

        ``retained`` and ``completions`` are lists of (KL per token, tokens), text by text.
        """
        update, scaled = Update({}), {}
        if row != "base":
            scaled, found = self.search("topic").on_path(self.path(row))
            if found is None:
                return scaled
            update = found
        with update.applied_to(self.model):
            told = {name: self._asked(own) for name, own in self.data.questions.items()}
        told |= {
            "retained": text_kls(self.model, self.model, update, self.slices["report"]),
            "completions": text_kls(self.model, self.model, update, self._completions),
        }
        return {**scaled, **told}

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
        """The base model's completions of Alpaca's instructions, those that say nothing of the
        subject."""
        examples = instructions(self._folder, self.sizes.completions)
        prompts = encode_prompts(examples, self.tokenizer)
        path = self.cache / f"completions-{len(prompts)}.jsonl"
        with ItemLog(path, {"benchmark": "kl", "tokens": NEW_TOKENS}) as log:
            complete(self.model, self.tokenizer, prompts, log, Decoding(NEW_TOKENS))
            said = [log.items[str(i)]["tokens"] for i in range(len(prompts))]
        whole = [completed(prompt, own) for prompt, own in zip(prompts, said, strict=True)]
        return [text for text in whole if not self.data.words.in_text(text)]


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
    name = f"topic-small-{sizes.subject}-{sizes.model}-{sizes.tokens}-{sizes.seed}"
    cache = given.cache / name
    cache.mkdir(parents=True, exist_ok=True)
    lab = TopicLab(given.data, sizes, given.model, cache, results, given.device)
    run(pieces(lab, results), results, given)


if __name__ == "__main__":
    main()
