"""How well is the KL of a step predicted, and which curvature forgets most at equal KL?

For SmolLM2-135M-Instruct, every feed-forward weight, for the model as shipped (retain set:
WikiText-2) and for one that has memorised its retain set (questions on invented authors, TOFU):

1. predicted, exact-quadratic and measured KL over steps from 1e-6 to 1e-1 predicted nats, K-FAC
   and EK-FAC, on the fit's own sequences and on held-out ones;
2. the control: fitted and exact quadratic forms along random directions;
3. (as shipped) the forget loss that identity, diagonal, K-FAC and EK-FAC reach at equal measured
   KL on the demo's subject.

    python benchmarks/experiments/prediction.py --data DIR --cache DIR

Results go to ``benchmarks/results/prediction.json`` piece by piece; a piece that is there is not
computed again. ``prediction_report.py`` draws them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path

import torch
from fine_tune import fine_tune

import kfade
from kfade.curvature.product import quadratic_form
from kfade.data.batches import make_batches
from kfade.data.examples import Example, load_examples, parse_example
from kfade.demo.data import data_file
from kfade.demo.run import demo_model
from kfade.method.gauge import Gauge, parameter_changes
from kfade.method.gradient import forget_gradient
from kfade.method.measure import hidden_reference, mean_divergence, mean_objectives
from kfade.method.objectives import cross_entropy
from kfade.method.step import StepSize, choose_alpha, gauss_newton_step
from kfade.method.update import Update
from kfade.models.head import read_head
from kfade.models.load import save_model

RESULTS = Path(__file__).parents[1] / "results" / "prediction.json"
PREDICTED = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
EQUAL_KL = (0.003, 0.01, 0.03)
DAMPING = 0.1  # times the mean eigenvalue, for every estimator
MEMORISED_QUESTIONS, AUTHOR_QUESTIONS = 60, 20
FIT_SEQUENCES, HELD_SEQUENCES, RANDOM_DIRECTIONS = 48, 12, 2


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--data", type=Path, required=True, help="folder with wikitext/, tofu/")
    options.add_argument("--cache", type=Path, default=Path("~/.cache/kfade"))
    arguments = options.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}

    def piece(name: str, compute) -> None:
        if name in results:
            return
        start = time.perf_counter()
        results[name] = compute()
        results[name]["seconds"] = time.perf_counter() - start
        aside = RESULTS.with_suffix(".writing")
        aside.write_text(json.dumps(results, indent=1) + "\n")
        os.replace(aside, RESULTS)
        print(f"{name}: {results[name]['seconds']:.0f} s", flush=True)

    shipped = Setting.shipped(arguments.data)
    fits = Fits(shipped)
    for estimator in ("kfac", "ekfac"):
        piece(f"shipped {estimator}", lambda e=estimator: prediction(shipped, fits.get(e)))
    for estimator in ("identity", "diagonal", "kfac", "ekfac"):
        piece(f"equal KL {estimator}", lambda e=estimator: equal_kl(shipped, fits.get(e)))
    memorised = Setting.memorised(arguments.data, arguments.cache.expanduser())
    fits = Fits(memorised)
    for estimator in ("kfac", "ekfac"):
        piece(f"memorised {estimator}", lambda e=estimator: prediction(memorised, fits.get(e)))


class Setting:
    """A model with forget, retain and held-out batches."""

    def __init__(self, model, forget, retain, held_out) -> None:
        self.model = model
        self.targets = kfade.find_targets(model)
        self.forget, self.retain = make_batches(forget), make_batches(retain)
        # As much of the fit's own data as is held out.
        self.own, self.held_out = make_batches(retain[: len(held_out)]), make_batches(held_out)
        self._random: list = []

    def random_forms(self) -> list:
        """(δ, δᵀGδ on the whole fit set) for Gaussian δ."""
        for seed in range(len(self._random), RANDOM_DIRECTIONS):
            generator = torch.Generator().manual_seed(seed)
            delta = {t.name: torch.randn(t.shape, generator=generator) for t in self.targets}
            exact = quadratic_form(self.model, self.retain, self.targets, delta)
            self._random.append((delta, exact))
        return self._random

    @classmethod
    def shipped(cls, data: Path) -> Setting:
        model, tokenizer = kfade.load_model(demo_model())
        forget = kfade.encode(
            load_examples(str(data_file("forget.jsonl")))[:64], tokenizer, chat=False
        )
        lines = (data / "wikitext" / "wikitext-2-test.raw.txt").read_text().splitlines()
        texts = [Example("wikitext", text=line.strip()) for line in lines if len(line) > 400]
        # Every eighth paragraph; the held-out ones come from later articles.
        fit, held = texts[: len(texts) * 3 // 4 : 8], texts[len(texts) * 3 // 4 :: 8]
        retain = kfade.encode(fit, tokenizer, length=129)[:FIT_SEQUENCES]
        return cls(
            model, forget, retain, kfade.encode(held, tokenizer, length=129)[:HELD_SEQUENCES]
        )

    @classmethod
    def memorised(cls, data: Path, cache: Path) -> Setting:
        rows = [json.loads(line) for line in (data / "tofu" / "full.json").open()]
        rows = [parse_example(row, "tofu") for row in rows[:MEMORISED_QUESTIONS]]
        folder = cache / f"smollm2-memorised-{MEMORISED_QUESTIONS}"
        if not folder.exists():
            memorise(rows, folder)
        model, tokenizer = kfade.load_model(str(folder))
        sequences = kfade.encode(rows, tokenizer, chat=True)
        model_loss = mean_objectives(model, make_batches(sequences), [cross_entropy])[0]
        print(f"memorised model: loss {model_loss:.3f} on its own answers", flush=True)
        forget, retain = sequences[-AUTHOR_QUESTIONS:], sequences[:-AUTHOR_QUESTIONS]
        held = retain[4::5]
        return cls(model, forget, [s for s in retain if s not in held], held)


class Fits:
    """The curvatures of a setting, each fitted once, when asked for."""

    def __init__(self, setting: Setting) -> None:
        self._setting, self._done = setting, {}

    def get(self, name: str) -> kfade.Curvature:
        s = self._setting
        if name not in self._done:
            arguments = (s.model, s.retain, s.targets)
            match name:
                case "identity":
                    self._done[name] = kfade.Identity().fit(*arguments)
                case "diagonal":
                    self._done[name] = kfade.Diagonal().fit(*arguments)
                case "kfac":
                    self._done[name] = kfade.KFAC().fit(*arguments)
                case "ekfac":
                    self._done[name] = kfade.EKFAC().correct(self.get("kfac"), *arguments)
        return self._done[name]


def memorise(examples, folder: Path) -> None:
    """Fine-tune the shipped model on ``examples`` until its mean answer loss is below 0.1."""
    model, tokenizer = kfade.load_model(demo_model())
    sequences = kfade.encode(examples, tokenizer, chat=True)
    names = [name for name, _ in model.named_parameters()]
    fine_tune(model, sequences, names, rate=2e-4, epochs=20, enough=lambda loss: loss < 0.1)
    save_model(model, tokenizer, folder)


def prediction(setting: Setting, curvature: kfade.Curvature) -> dict:
    """Predicted, exact and measured KL along the step's direction, and along random ones."""
    model, targets = setting.model, setting.targets
    gradient = forget_gradient(model, setting.forget, targets, kfade.margin)
    step = gauss_newton_step(curvature, gradient, damping=DAMPING, relative=True)
    exact = {
        "fit": quadratic_form(model, setting.own, targets, step.direction),
        "held_out": quadratic_form(model, setting.held_out, targets, step.direction),
    }
    changes = parameter_changes(targets, step.direction)
    head = read_head(model)
    base = {
        name: hidden_reference(model, batches, name)
        for name, batches in (("fit", setting.own), ("held_out", setting.held_out))
    }
    rows = []
    for predicted in PREDICTED:
        alpha = math.sqrt(predicted / step.unit_kl)
        row = {"predicted": predicted, "alpha": alpha}
        with Update({}).plus(changes, alpha).applied_to(model):
            for name, reference in base.items():
                after = hidden_reference(model, reference.batches, name)
                row[f"measured_{name}"] = mean_divergence(head, reference, after)
                row[f"exact_{name}"] = 0.5 * exact[name] * alpha**2
            row["forget_loss"] = mean_objectives(model, setting.forget, [cross_entropy])[0]
        rows.append(row)
    return {"rows": rows, "random": random_directions(setting, curvature)}


def random_directions(setting: Setting, curvature: kfade.Curvature) -> list[dict]:
    """Fitted and exact forms along Gaussian directions; exact on the whole fit set."""
    return [
        {"fitted": curvature.quadratic(delta), "exact": exact}
        for delta, exact in setting.random_forms()
    ]


def equal_kl(setting: Setting, curvature: kfade.Curvature) -> dict:
    """Forget loss where the measured held-out KL meets each of ``EQUAL_KL`` within 10 %."""
    model, targets = setting.model, setting.targets
    gradient = forget_gradient(model, setting.forget, targets, kfade.margin)
    step = gauss_newton_step(curvature, gradient, damping=DAMPING, relative=True)
    exact = quadratic_form(model, setting.held_out, targets, step.direction)
    changes = parameter_changes(targets, step.direction)
    gauge = Gauge(model, setting.held_out, setting.forget)
    start = gauge.measure(Update({}), kfade.margin)
    rows = []
    for kl in EQUAL_KL:
        probes = choose_alpha(
            lambda alpha: gauge.measure(Update({}).plus(changes, alpha), kfade.margin, alpha),
            StepSize(kl=kl),
            share=1.0,
            start=start,
            guess=math.sqrt(2 * kl / exact),
        )
        last = probes[-1]
        rows.append(
            {
                "kl": last.retain_kl,
                "forget_loss": last.forget_loss,
                "predicted": step.predicted_kl(last.alpha),
                "exact_held_out": 0.5 * exact * last.alpha**2,
            }
        )
    return {"rows": rows, "forget_loss_before": start.forget_loss}


if __name__ == "__main__":
    main()
