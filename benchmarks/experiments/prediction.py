"""How well is the KL of a step predicted, and which curvature forgets most at equal KL?

    python benchmarks/experiments/prediction.py --data DIR [--only 'equal KL*']

Every feed-forward weight of SmolLM2-135M-Instruct, for the model as shipped (retain set:
WikiText-2) and for a model that has memorised its retain set (questions on invented authors, TOFU):

1. predicted, exact quadratic and measured KL of steps from 1e-6 to 1e-1 predicted nats, by K-FAC
   and EK-FAC, on sequences of the fit and on held-out ones;
2. the control: fitted and exact quadratic forms along random directions;
3. for the model as shipped, the forget loss that each estimator reaches at equal measured KL on the
   demo's subject.

Each result is added to ``benchmarks/results/prediction.jsonl`` when it is done and is not computed
again. ``make results`` draws the tables and the figure of ``docs/numerics.md``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from lab import figures
from lab.fine_tune import fine_tune
from lab.forgetting import Group
from lab.lab import Lab
from lab.pieces import Piece, Results, make_once, options_of, run
from lab.records import RESULTS, Record, read, table
from lab.rows import ESTIMATORS

import kfade
from kfade import Damping
from kfade.curvature.product import quadratic_form
from kfade.curvature.vectors import Vector
from kfade.data.chat import ChatTemplate
from kfade.data.examples import Example, load_examples, parse_example
from kfade.data.sequences import TokenSequence
from kfade.demo.data import data_file
from kfade.method.gauge import Gauge, parameter_changes
from kfade.method.measure import mean_objectives
from kfade.method.size import StepSize, choose_alpha
from kfade.method.step import Step, gauss_newton_step
from kfade.method.update import Update
from kfade.models.lengths import batches_for
from kfade.models.load import save_model

FILE = RESULTS / "prediction.jsonl"
PREDICTED = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
EQUAL_KL = (0.003, 0.01, 0.03)
FITS = ("identity", "diagonal", "kfac", "ekfac")
DAMPING = 0.1  # times the mean eigenvalue, for every estimator
MEMORISED_QUESTIONS, AUTHOR_QUESTIONS = 60, 20
FIT_SEQUENCES, HELD_SEQUENCES, RANDOM_DIRECTIONS = 48, 12, 2
MARKS = "<!-- prediction -->", "<!-- /prediction -->"  # around the tables in docs/numerics.md


class PredictionLab(Lab):
    """A model with its forget, retain and held-out sequences.

    The slice ``report`` is as much of the fit's own data as is held out.
    """

    budget = 4096

    def __init__(self, folder: Path, model: str, cache: Path) -> None:
        super().__init__(None, cache, {})
        self.folder, self.base = folder, model

    @cached_property
    def sets(self) -> tuple[Sequence[TokenSequence], ...]:
        """Forget, retain and held-out sequences."""
        raise NotImplementedError

    @cached_property
    def slices(self) -> dict[str, Sequence[TokenSequence]]:
        _, retain, held_out = self.sets
        return {"fit": retain, "held_out": held_out, "report": retain[: len(held_out)]}

    def group(self, name: str) -> Group:
        return Group(name, self.sets[0], math.nan, math.nan)

    @cached_property
    def random_forms(self) -> list[tuple[Vector, float]]:
        """(δ, δᵀGδ on the whole fit set) for Gaussian δ."""
        batches, found = batches_for(self.model, self.slices["fit"]), []
        for seed in range(RANDOM_DIRECTIONS):
            generator = torch.Generator().manual_seed(seed)
            delta = {
                t.name: torch.randn(t.shape, generator=generator).to(t.weight.device)
                for t in self.targets
            }
            found.append((delta, quadratic_form(self.model, batches, self.targets, delta)))
        return found

    def direction(self, fit: str) -> tuple[Step, Vector]:
        """The step of a margin, and its changes by parameter."""
        gradient, _ = self.gradient("forget", "margin")
        step = gauss_newton_step(self.curvature(fit), gradient, damping=Damping(DAMPING))
        return step, parameter_changes(self.targets, step.direction)

    def exact_form(self, name: str, step: Step) -> float:
        """δᵀGδ on the sequences of a slice."""
        batches = batches_for(self.model, self.slices[name])
        return quadratic_form(self.model, batches, self.targets, step.direction)

    def prediction(self, fit: str) -> Record:
        """Predicted, exact and measured KL along the step's direction, and along random ones."""
        step, changes = self.direction(fit)
        slices = {"fit": "report", "held_out": "held_out"}
        exact = {name: self.exact_form(own, step) for name, own in slices.items()}
        ruler = self.ruler  # made of the unedited model
        forget, rows = batches_for(self.model, self.sets[0]), []
        for predicted in PREDICTED:
            alpha = math.sqrt(2 * predicted / step.square)
            row = {"predicted": predicted, "alpha": alpha}
            with Update({}).plus(changes, alpha).applied_to(self.model):
                for name, own in slices.items():
                    row[f"measured_{name}"] = ruler.kl(own)
                    row[f"exact_{name}"] = 0.5 * exact[name] * alpha**2
                row["forget_loss"] = mean_objectives(self.model, forget, [kfade.cross_entropy])[0]
            rows.append(row)
        curvature = self.curvature(fit)
        random = [
            {"fitted": curvature.quadratic(delta), "exact": form}
            for delta, form in self.random_forms
        ]
        return {"rows": rows, "random": random}

    def equal_kl(self, fit: str) -> Record:
        """Forget loss where the held-out KL is each of ``EQUAL_KL`` within 10 %."""
        step, changes = self.direction(fit)
        exact = self.exact_form("held_out", step)
        held_out, forget = (
            batches_for(self.model, self.slices["held_out"]),
            batches_for(self.model, self.sets[0]),
        )
        gauge = Gauge(self.model, held_out, forget)
        start = gauge.measure(Update({}), kfade.margin)
        rows = []
        for kl in EQUAL_KL:
            last = choose_alpha(
                lambda alpha: gauge.measure(Update({}).plus(changes, alpha), kfade.margin, alpha),
                StepSize(kl=kl),
                share=1.0,
                start=start,
                guess=math.sqrt(2 * kl / exact),
            )[-1]
            row = {"kl": last.retain_kl, "forget_loss": last.forget_loss}
            row |= {"predicted": step.predicted_kl(last.alpha)}
            rows.append({**row, "exact_held_out": 0.5 * exact * last.alpha**2})
        return {"rows": rows, "forget_loss_before": start.forget_loss}


class Shipped(PredictionLab):
    """The model as it is, the demo's subject, and WikiText."""

    @cached_property
    def loaded(self) -> tuple[Any, Any]:
        return kfade.load_model(self.base)

    @cached_property
    def sets(self) -> tuple[Sequence[TokenSequence], ...]:
        examples = load_examples(str(data_file("forget.jsonl")))[:64]
        forget = kfade.encode(examples, self.tokenizer, template=ChatTemplate(enabled=False))
        lines = (self.folder / "wikitext" / "wikitext-2-test.raw.txt").read_text().splitlines()
        texts = [Example("wikitext", text=line.strip()) for line in lines if len(line) > 400]
        # Every eighth paragraph; the held-out ones come from later articles.
        cut = len(texts) * 3 // 4
        retain = kfade.encode(texts[:cut:8], self.tokenizer, length=129)[:FIT_SEQUENCES]
        held_out = kfade.encode(texts[cut::8], self.tokenizer, length=129)[:HELD_SEQUENCES]
        return forget, retain, held_out


class Memorised(PredictionLab):
    """A model that knows its questions by heart; one author's are the forget set."""

    @cached_property
    def examples(self) -> list[Example]:
        lines = (self.folder / "tofu" / "full.json").read_text(encoding="utf-8").splitlines()
        return [parse_example(json.loads(line), "tofu") for line in lines[:MEMORISED_QUESTIONS]]

    @cached_property
    def loaded(self) -> tuple[Any, Any]:
        folder = self.cache / f"memorised-{MEMORISED_QUESTIONS}"
        make_once(folder, self._memorise)
        return kfade.load_model(str(folder))

    @cached_property
    def sets(self) -> tuple[Sequence[TokenSequence], ...]:
        sequences = kfade.encode(self.examples, self.tokenizer, template=ChatTemplate(enabled=True))
        forget, kept = sequences[-AUTHOR_QUESTIONS:], sequences[:-AUTHOR_QUESTIONS]
        held_out = kept[4::5]
        return forget, [s for s in kept if s not in held_out], held_out

    def _memorise(self, folder: Path) -> Record:
        """Fine-tune the shipped model until its mean answer loss is below 0.1."""
        model, tokenizer = kfade.load_model(self.base)
        sequences = kfade.encode(self.examples, tokenizer, template=ChatTemplate(enabled=True))
        names = [name for name, _ in model.named_parameters()]
        history = fine_tune(
            *(model, sequences, names), rate=2e-4, epochs=20, enough=lambda loss: loss < 0.1
        )
        save_model(model, tokenizer, folder)
        return {"epochs": history}


def pieces(shipped: PredictionLab, memorised: PredictionLab) -> Iterator[Piece]:
    for fit in ("kfac", "ekfac"):
        yield f"shipped {fit}", partial(shipped.prediction, fit)
    for fit in FITS:
        yield f"equal KL {fit}", partial(shipped.equal_kl, fit)
    for fit in ("kfac", "ekfac"):
        yield f"memorised {fit}", partial(memorised.prediction, fit)


def write_report(results: Path, docs: Path) -> None:
    """The tables between the marks of ``numerics.md``, and the figure ``prediction.svg``."""
    told, page, (begin, end) = read(results / FILE.name), docs / "numerics.md", MARKS
    text = "\n\n".join([*tables(told), "![predicted and measured KL](images/prediction.svg)"])
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    after = rest.partition(end)[2]
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")
    figures.draw_prediction(told, docs / "images" / "prediction.svg")


def tables(results: Results) -> Iterator[str]:
    for name, entry in results.items():
        setting, _, fit = name.rpartition(" ")
        if setting in ("shipped", "memorised"):
            yield f"**{ESTIMATORS[fit]}, model {setting}**"
            yield table(
                "predicted | exact, fit's own | exact, held out | measured, fit's own | "
                "measured, held out | measured / predicted | measured / exact, held out | "
                "forget loss",
                [cells(row) for row in entry["rows"]],
            )
            ratios = ", ".join(f"{pair['fitted'] / pair['exact']:.2f}" for pair in entry["random"])
            yield f"Control, fitted / exact form along random directions: {ratios}."
    equal = {fit: results[f"equal KL {fit}"] for fit in FITS if f"equal KL {fit}" in results}
    if equal:
        before = equal["ekfac"]["forget_loss_before"]
        yield (
            "**Forget loss at equal measured KL** (demo's subject, model as shipped; "
            f"{before:.2f} before)"
        )
        kls = " | ".join(f"KL ≈ {row['kl']:.3f}" for row in equal["ekfac"]["rows"])
        yield table(
            f"estimator | {kls}",
            [
                [ESTIMATORS[fit], *(f"{row['forget_loss']:.2f}" for row in entry["rows"])]
                for fit, entry in equal.items()
            ],
        )


def cells(row: dict[str, float]) -> list[str]:
    measured, exact = row["measured_held_out"], row["exact_held_out"]
    return [
        f"{row['predicted']:.0e}",
        *(f"{x:.1e}" for x in (row["exact_fit"], exact, row["measured_fit"], measured)),
        f"{measured / row['predicted']:.0f}",
        f"{measured / exact:.2f}",
        f"{row['forget_loss']:.2f}",
    ]


def main() -> None:
    given = options_of(__doc__, FILE).parse_args()
    name = Path(given.model).name
    labs = [
        kind(given.data, given.model, given.cache / f"prediction-{kind.__name__}-{name}")
        for kind in (Shipped, Memorised)
    ]
    run(pieces(*labs), read(given.results), given)


if __name__ == "__main__":
    main()
