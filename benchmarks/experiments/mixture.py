"""Unlearning in a trained mixture of experts: its experts, its attention, and a dense twin.

    python benchmarks/experiments/mixture.py --data DIR [--cache DIR]

A small mixture and a dense model with as many active weights are trained from scratch on WikiText
and on TOFU's answers about 25 authors (``mixture_models.py``). Five authors are forgotten by EK-FAC
and the margin without a bound, until the mean probability of their answers is ``TARGET``.
Only the weights that may change differ, and the number of steps. KL is that on the answers about
authors which neither the fit nor the size of the step has seen. Nothing is tuned.

Each result is added to ``benchmarks/results/mixture.jsonl`` when it is done and is not computed
again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from lab.forgetting import BUDGET, text_kls
from lab.intervals import Texts, interval
from lab.pieces import make_once
from lab.records import RESULTS, Record, read, write
from mixture_models import DENSE, MIXTURE, Sizes, paragraphs, questions, train

import kfade
from kfade.data.examples import Example
from kfade.data.sequences import TokenSequence
from kfade.evaluate.routing import rerouted_share
from kfade.method.gradient import forget_gradient
from kfade.method.measure import TokenLosses, mean_objectives
from kfade.method.settings import Correction, Direction, Run
from kfade.method.size import StepSize
from kfade.method.update import Update
from kfade.models.lengths import batches_for
from kfade.models.targets import Target

FILE = RESULTS / "mixture.jsonl"
TARGET = 0.1  # forget probability
STEPS = {"1": (1, False), "3": (3, False), "3, refitted": (3, True)}
"""(number of steps, whether each has a fit of its own)"""
FEW = 2  # experts of each layer that are changed in the row of a few experts
PARAGRAPHS, PARAGRAPH_TOKENS = 40, 128
ATTENTION = "*.self_attn.*_proj.weight"


class Trained:
    """A trained model with its data."""

    def __init__(self, folder: Path, data: Path, sizes: Sizes) -> None:
        self._data, self._sizes = data, sizes
        self.model, self._tokenizer = kfade.load_model(str(folder), dtype="float32", device="cpu")

    @cached_property
    def sets(self) -> dict[str, list[TokenSequence]]:
        """Token sequences by the role of their authors, and ``text``, of WikiText."""
        asked = questions(self._data, self._sizes)
        made = {role: kfade.encode(own, self._tokenizer) for role, own in asked.items()}
        lines = paragraphs(self._data, "wikitext-103-valid.tokens.txt")
        text = [Example("wikitext", text=line) for line in lines[: 2 * PARAGRAPHS]]
        packed = kfade.encode(text, self._tokenizer, length=PARAGRAPH_TOKENS)
        return {**made, "text": packed[:PARAGRAPHS]}

    def probabilities(self) -> Record:
        """Mean probability of the answers about the authors of each role."""
        found = {}
        for role in self._sizes.roles:
            batches, losses = batches_for(self.model, self.sets[role], BUDGET), TokenLosses()
            mean_objectives(self.model, batches, [losses])
            found[role] = losses.mean_probability(batches)
        return found

    def unlearnt(self, choose: Callable[[Trained], list[Target]], steps: str) -> Record:
        """Unlearn with the chosen weights, to the target; what it did."""
        start = time.perf_counter()
        targets, (count, refit) = choose(self), STEPS[steps]
        try:
            update = kfade.unlearn(
                self.model,
                forget=self.sets["forget"],
                retain=self.sets["fit"],
                held_out=self.sets["held_out"],
                direction=Direction(bound=0.0),
                size=StepSize(until_probability=TARGET),
                run=Run(
                    targets=targets,
                    steps=count,
                    refit=refit,
                    correction=Correction(count=0),
                    batch_tokens=BUDGET,
                ),
            )
        except kfade.InputError as error:
            return {"failure": str(error)}
        seconds = time.perf_counter() - start
        last = update.provenance["steps"][-1]
        own = self.by_question(update, "report")
        return {
            "weights": sum(target.weight.numel() for target in targets),
            "seconds": seconds,
            "forget_probability": last["forget_probability_after"],
            "held_out_kl": last["retain_kl"],
            "exact_over_measured": [
                step["exact_kl"] / step["measured_kl"] for step in update.provenance["steps"]
            ],
            "report_kl": interval(own),
            "text_kl": interval(self.by_question(update, "text")),
            "rerouted": {name: self.rerouted(update, name) for name in ("report", "forget")},
            "questions": own,
        }

    def by_question(self, update: Update, name: str) -> Texts:
        """The KL of each sequence of a set."""
        return text_kls(self.model, self.model, update, self.sets[name])

    def rerouted(self, update: Update, name: str) -> float | None:
        """The share of a set's positions that go to other experts."""
        batches = batches_for(self.model, self.sets[name], BUDGET)
        return rerouted_share(self.model, batches, partial(update.applied_to, self.model))


def all_feed_forward(trained: Trained) -> list[Target]:
    """All maps outside attention, but routers."""
    return kfade.find_targets(trained.model)


def with_shared_inputs(trained: Trained) -> list[Target]:
    """The same, but the experts of a layer share their input factors."""
    return kfade.find_targets(trained.model, shared_inputs=True)


def attention(trained: Trained) -> list[Target]:
    """The maps of attention."""
    return kfade.find_targets(trained.model, pattern=ATTENTION)


def few_experts(trained: Trained) -> list[Target]:
    """In each layer the ``FEW`` experts of the longest forget gradient."""
    routed = [target for target in kfade.find_targets(trained.model) if target.is_routed]
    batches = batches_for(trained.model, trained.sets["forget"], BUDGET)
    gradient = forget_gradient(trained.model, batches, routed, kfade.margin)
    squares: dict[int, dict[str, float]] = {}
    for target in routed:
        expert = target.name.rpartition("[")[2]
        own = squares.setdefault(target.block, {})
        own[expert] = own.get(expert, 0.0) + gradient[target.name].square().sum().item()
    best = {block: sorted(own, key=lambda e: -own[e])[:FEW] for block, own in squares.items()}
    return [t for t in routed if t.name.rpartition("[")[2] in best[t.block]]


ROWS = {
    MIXTURE: {
        "experts and dense": all_feed_forward,
        "experts and dense, shared inputs": with_shared_inputs,
        "attention": attention,
        "few experts": few_experts,
    },
    DENSE: {"feed-forward": all_feed_forward, "attention": attention},
}


def ratios(results: Mapping[str, Record]) -> Record:
    """KL of other rows over that of the mixture's experts by as many steps, by question."""
    found: Record = {}
    for steps in STEPS:
        experts = results.get(f"{MIXTURE} experts and dense, steps {steps}", {})
        for name, row in results.items():
            is_other = name.endswith(f"steps {steps}") and row is not experts
            if is_other and "questions" in row and "questions" in experts:
                found[name] = interval(row["questions"], experts["questions"])
    return found


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--data", type=Path, required=True, help="with tofu/ and wikitext/")
    options.add_argument("--cache", type=Path, default=Path("~/.cache/kfade").expanduser())
    options.add_argument("--results", type=Path, default=FILE)
    options.add_argument("--models", nargs="*", default=list(ROWS), choices=list(ROWS))
    given = options.parse_args()
    sizes = Sizes()
    settings = {**asdict(sizes), "target": TARGET}
    results: dict[str, Any] = read(given.results) or {"settings": settings}
    if results["settings"] != settings:
        raise SystemExit(f"{given.results} has other settings: give --results FILE")

    def add(name: str, compute: Callable[[], Record]) -> None:
        if name not in results:
            results[name] = compute()
            write(given.results, results)
            shown = {k: v for k, v in results[name].items() if k != "questions"}
            print(f"{name}: {shown}", flush=True)

    for kind in given.models:
        folder = given.cache / f"mixture-{kind}-{sizes.seed}"
        make = partial(train, kind, given.data, sizes)
        add(f"{kind} trained", partial(make_once, folder, make))
        trained = Trained(folder, given.data, sizes)
        add(f"{kind} probabilities", trained.probabilities)
        for steps in STEPS:
            for row, choose in ROWS[kind].items():
                add(f"{kind} {row}, steps {steps}", partial(trained.unlearnt, choose, steps))
    results.pop("ratios", None)
    add("ratios", partial(ratios, results))


if __name__ == "__main__":
    main()
