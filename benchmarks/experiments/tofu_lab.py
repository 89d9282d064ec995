"""What the pieces of TOFU-small share: its models and data, and how each method is measured."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from lab.baselines import at_target, method_of
from lab.forgetting import BUDGET, EVERY, Group, Ruler, Search, forgetting, text_kls
from lab.lab import Lab
from lab.pieces import Piece, Results, make_once, options_of, read_options, run
from lab.records import RESULTS, Record
from lab.tuning import START_RATES
from tofu_data import Data, Sizes, answer, encode, train_model

import kfade
from kfade.curvature.curvature import Curvature
from kfade.data.sequences import TokenSequence
from kfade.evaluate.completions import Prompt, completed
from kfade.evaluate.generation import Decoding, generate
from kfade.evaluate.memorisation import MEMORISED, memorised, token_statistics
from kfade.evaluate.relearning import Examination
from kfade.evaluate.tofu_logs import aggregate
from kfade.evaluate.tofu_read import log_of
from kfade.evaluate.tokens import token_values
from kfade.method.gradient import forget_gradient
from kfade.method.size import StepSize
from kfade.method.update import Update
from kfade.models.lengths import batches_for

FILE = RESULTS / "tofu_small.jsonl"
SHOWN = 6  # forgotten questions whose answers are kept
OWN_TOKENS = 48  # of a turn that the model generates
TURNS = ("<|im_start|>user\n", "\n<|im_start|>assistant\n")  # before a question, and after it
PART = 4  # the cheap request looks at one question in so many
START_RATE = 2e-4  # learning rate that tuning begins with
QUANTILES = (0.5, 0.75, 0.9, 0.97)  # of the loss of the forgotten answers' tokens
FAR_LOSS = 8.0  # nats; what a token loses beyond them makes no difference to what is said
RMU_STEPS = 3  # RMU takes so many times the steps; each costs a third, up to its block


class Memorised(Group):
    """What is forgotten, measured by the share of its tokens that are still predicted."""

    def forgotten(self, model: Any) -> dict[str, float]:
        """``forget_probability``: exact memorisation, mean over the measured answers."""
        return {"forget_probability": left_of(model, self)["exact_memorisation"]}


def left_of(model: Any, group: Group) -> dict[str, float]:
    """What a model still knows of the answers by which targets are measured."""
    return Examination(model, forget=group.forget[::EVERY], batch_tokens=BUDGET)(model).values


class TofuLab(Lab):
    """The full model, and what it is asked to forget."""

    def __init__(
        self,
        data: Data,
        base: str,
        sizes: Sizes,
        cache: Path,
        results: Results,
        device: str | None = None,
    ) -> None:
        super().__init__(sizes, cache, results, device)
        self.data, self._base = data, base
        self._scaled: dict[str, tuple[Record, Update | None]] = {}

    def train_once(self, name: str) -> Record:
        """Train ``full`` or ``retrained`` and keep it, if it is not there: how it was trained."""
        examples = self.data.of("common", "tuning", *(("report",) if name == "full" else ()))
        train = partial(train_model, self._base, examples, self.sizes, device=self.device)
        return make_once(self.folder(name), train)

    def folder(self, name: str) -> Path:
        """Where ``full`` or ``retrained`` is kept."""
        return self.cache / name

    def load(self, name: str) -> tuple[Any, Any]:
        """(model, tokenizer) of ``full`` or ``retrained``."""
        self.train_once(name)
        return kfade.load_model(str(self.folder(name)), device=self.device)

    @cached_property
    def loaded(self) -> tuple[Any, Any]:
        return self.load("full")

    @cached_property
    def slices(self) -> dict[str, Sequence[TokenSequence]]:
        return {name: encode(own, self.tokenizer) for name, own in self.data.slices().items()}

    def sequences(self, role: str) -> list[TokenSequence]:
        """All questions of the authors of a role: report, tuning, unseen."""
        return encode(self.data.of(role), self.tokenizer)

    def group(self, name: str) -> Group:
        """The authors of the role ``report`` or ``tuning``."""
        found = self.results["targets"]
        # Without authors that no model knows, those that the retrained one does not know.
        aim = found["unseen" if name == "tuning" and "unseen" in found else "retrained"]
        start = found[name]["forget_probability"]
        return Group(name, self.sequences(name), start, aim["forget_probability"])

    @cached_property
    def text(self) -> list[TokenSequence]:
        """WikiText, as many sequences as in the fit and about as long."""
        text = kfade.encode(self.data.paragraphs(), self.tokenizer, length=65)
        return text[: len(self.slices["fit"])]

    def own_text(self) -> list[TokenSequence]:
        """Questions and answers that the model generates itself at temperature 1 (as in Magpie, Xu
        et al. 2024), as many as there are questions in the fit."""
        user, assistant = (
            tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in TURNS
        )

        def continued(prompts: list[tuple[int, ...]], seed: int) -> list[tuple[int, ...]]:
            decoding = Decoding(OWN_TOKENS, BUDGET, temperature=1.0, seed=seed)
            found = dict(generate(self.model, self.tokenizer, prompts, decoding))
            return [tuple(found[index]) for index in range(len(prompts))]

        asked = continued([user] * len(self.slices["fit"]), self.sizes.seed)
        prompts = [(*user, *question, *assistant) for question in asked]
        answers = continued(prompts, self.sizes.seed + 1)
        return [
            completed(Prompt("", prompt), tokens)
            for prompt, tokens in zip(prompts, answers, strict=True)
        ]

    def split_fit(self, share: int) -> Curvature:
        """EK-FAC with bases from one in ``share`` retain sequences, eigenvalues from the others."""
        every = self.slices["fit"]
        rest = [sequence for i, sequence in enumerate(every) if i % share]
        first, second = (batches_for(self.model, part, BUDGET) for part in (every[::share], rest))
        kfac = kfade.KFAC().fit(self.model, first, self.targets)
        return kfade.EKFAC().correct(kfac, self.model, second, self.targets)

    def measure_targets(self) -> Record:
        """Forget probabilities of the full model and of the retrained one."""
        roles = [role for role in ("report", "tuning", "unseen") if self.data.authors[role]]
        found = {role: forgetting(self.model, self.sequences(role)) for role in roles}
        retrained, _ = self.load("retrained")
        found["retrained"] = {
            **forgetting(retrained, self.sequences("report")),
            "kl": self.ruler.kl("held_out", retrained),
            "report_kl": self.ruler.kl("report", retrained),
        }
        return found

    def one_step(
        self,
        group: str,
        curvature: Curvature | str,
        damping: float,
        keep: str = "",
        **options: Any,
    ) -> Record:
        """One step of K-FADE by that curvature, or by the fit of that name."""
        if isinstance(curvature, str):
            curvature = self.curvature(curvature)
        row, update = self.step(group, curvature, damping, **options)
        return self._reported(group, row, update, keep)

    def several_steps(
        self, fit: str, damping: float | None, keep: str = "", **options: Any
    ) -> Record:
        """``kfade.unlearn`` on the report authors; its update is then scaled to the target, which
        the run measures on all questions."""
        size = StepSize(until_probability=self.group("report").target)
        try:
            states, told = self.unlearn("report", fit, size, damping, **options)
        except kfade.InputError as error:  # the target cannot be reached
            return {"failure": str(error), "curve": []}
        row, found = self.search("report").along(states[-1].deltas)
        return self._reported("report", {**row, **told}, found, keep)

    def cheap_request(self, damping: float) -> Record:
        """A request whose gradient and step size look at every ``PART``-th forget question and
        held-out question only.

        ``request``: what it measured on that part, and its seconds. The rest of the row is measured
        at the target like all others, and is not part of the request.
        """
        group, curvature = self.group("report"), self.curvature("ekfac")
        few, held_out = group.forget[::PART], self.slices["held_out"][::PART]
        start = time.perf_counter()
        begin = forgetting(self.model, few)["forget_probability"]
        small = replace(group, name="part", forget=few, start=begin)
        batches = batches_for(self.model, few, BUDGET)
        gradient = forget_gradient(self.model, batches, self.targets, kfade.margin)
        ruler = Ruler(self.model, {"held_out": held_out})
        told, update = Search(self.model, ruler, small).step(
            curvature, gradient, self.targets, damping=damping
        )
        seconds = time.perf_counter() - start
        if update is None:
            return told
        row, update = self.search("report").along(update.deltas)
        row |= {"request": {**told, "seconds": seconds}, "damping": damping}
        return self._reported("report", row, update)

    def baseline(self, name: str, rate: float, group: str, keep: str = "") -> Record:
        """Train a baseline until it is at the target or below and the held-out KL, which training
        on retain data may lower again, stops falling; or until the steps are over.

        The update is that of the evaluation with the lowest KL at the target or below; the last one
        if there is none.
        """
        ruler = self.ruler  # made of the model before it is trained
        target, reporting = self.group(group).target, group == "report"
        method = method_of(name, self.model, self.group(group).forget)
        steps = steps_of(name, rate, self.sizes)
        every, limit = self.sizes.every * steps // self.sizes.steps, steps * (1 + reporting)
        report_kls, best, least_kl = [0.0], Update({}), math.inf

        def enough(checkpoint: Any, update: Update) -> bool:
            nonlocal best, least_kl
            report_kls.append(ruler.kl("report") if reporting else math.nan)
            *_, before, now = (point["retain_kl"] for point in checkpoint.curve)
            if checkpoint.curve[-1]["forget_probability"] > target:
                return False
            if now < least_kl:
                best, least_kl = update, now
            return now >= before

        start = time.perf_counter()
        try:
            update = self.train(method, group, rate, limit, every, enough)
        except kfade.InputError as error:  # the loss is not finite
            return {"failure": str(error), "curve": [], "rate": rate}
        row: Record = {"run_seconds": time.perf_counter() - start, "rate": rate, "curve": []}
        kept = ("step", "forget_loss", "forget_probability", "retain_loss")
        for point, report_kl in zip(update.provenance["curve"], report_kls, strict=True):
            own = {**{key: point[key] for key in kept}, "kl": point["retain_kl"]}
            row["curve"].append({**own, "report_kl": report_kl} if reporting else own)
        found = at_target(row["curve"], target)
        if found is None:
            least = min(point["forget_probability"] for point in row["curve"])
            found = {"failure": f"not reached: {least:.3f} in {limit} steps"}
            best = update
        return self.keep(keep, {**row, **found}, best if keep else None)

    def tofu(self, row: str, factor: float = 1.0) -> Record:
        """TOFU's items of ``full``, ``retrained``, or a row's update times a factor."""
        path = self.cache / f"tofu-{self.sizes.utility}" / f"{row} x{factor:g}.jsonl"
        model, update = self.edited(row, factor)
        with update.applied_to(model) as edited:
            items = answer(edited, self.tokenizer, self.data.questions(), path)
        figures = aggregate(log_of(items, row))
        print(f"  utility {figures['model_utility']:.3f}, forget {figures['forget']}", flush=True)
        forget = [item for name, item in items.items() if name.startswith("forget/")]
        keys = ("answer_loss", "base_loss", "false_losses", "rouge_l")
        return {
            "items": {n: {k: rounded(item[k]) for k in keys} for n, item in items.items()},
            "answers": [
                {key: item[key] for key in ("question", "answer", "generated")}
                for item in forget[:: max(1, len(forget) // SHOWN)][:SHOWN]
            ],
        }

    def by_question(self, row: str) -> Record:
        """KL question by question of ``retrained``, or of a row's update scaled to the target.

        Lists of (KL per token, tokens): ``report``, on the report slice; ``others``, on the tuning
        authors, who are kept here and were shown to no method.
        """
        model, update, told = self.at_target(row)
        return told if update is None else {**told, **self._question_kls(model, update)}

    def by_memorisation(self, row: str) -> Record:
        """As :meth:`by_question`, of a row's update scaled so that as many tokens of the forgotten
        answers are still predicted as by the retrained model (``forget_probability`` is that
        share), and ``left``: the forget probability and the extraction strength there."""
        start, target = (
            self.exact_memorisation(f"by token {name}") for name in ("full", "retrained")
        )
        group = Memorised("report", self.sequences("report"), start, target)
        told, update = Search(self.model, self.ruler, group).along(self.kept(row).deltas)
        if update is None:
            return told
        with update.applied_to(self.model):
            told["left"] = left_of(self.model, group)
        return {**told, **self._question_kls(self.model, update)}

    def exact_memorisation(self, piece: str) -> float:
        """Exact memorisation of that model, over the answers by which targets are measured."""
        return statistics.fmean(self.results[piece]["exact_memorisation"][::EVERY])

    def _question_kls(self, model: Any, update: Update) -> Record:
        own = {"report": self.slices["report"], "others": self.sequences("tuning")}
        return {name: text_kls(self.model, model, update, texts) for name, texts in own.items()}

    def by_token(self, row: str) -> Record:
        """What is left of the forgotten answers token by token, at the target: figures of each
        answer (:mod:`kfade.evaluate.memorisation`), and quantiles of the tokens' loss."""
        model, update, told = self.at_target(row)
        if update is None:
            return told
        texts = self.sequences("report")
        with update.applied_to(model) as edited:
            found = dict(token_values(edited, texts, token_statistics, name=row))
        items = [memorised(found[i]) for i in range(len(texts))]
        losses = -torch.cat([found[i][:, 0] for i in range(len(texts))])
        return {
            **told,
            "above": ((losses - FAR_LOSS).clamp(min=0).sum() / losses.sum()).item(),
            "quantiles": losses.quantile(losses.new_tensor(QUANTILES)).tolist(),
            **{name: [item[name] for item in items] for name in MEMORISED},
        }

    def at_target(self, row: str) -> tuple[Any, Update | None, Record]:
        """A model and the update to apply to it, scaled to the target if there is one (None if it
        cannot be), and what the search says."""
        model, update = self.edited(row)
        if not update.deltas:
            return model, update, {}
        if row not in self._scaled:
            self._scaled[row] = self.search("report").along(update.deltas)
        told, found = self._scaled[row]
        return model, found, dict(told)

    def edited(self, row: str, factor: float = 1.0) -> tuple[Any, Update]:
        """A model and the update to apply to it, which is empty for ``full`` and ``retrained``."""
        if row == "retrained":
            return self.load(row)[0], Update({})
        deltas = {} if row == "full" else self.kept(row).deltas
        return self.model, Update({}).plus(deltas, factor)

    def has(self, name: str) -> bool:
        return name in ("full", "retrained") or super().has(name)

    def _reported(self, group: str, row: Record, update: Update | None, keep: str = "") -> Record:
        """The row with the KL on the report slice, if it is of the report authors."""
        ruler = self.ruler  # made of the unedited model
        if update is not None and group == "report":
            with update.applied_to(self.model):
                row["report_kl"] = ruler.kl("report")
        return self.keep(keep, row, update if keep else None)


def start_rate(name: str) -> float:
    """The learning rate that the tuning of a baseline begins with."""
    return START_RATES.get(name, START_RATE)


def steps_of(name: str, rate: float, sizes: Sizes) -> int:
    """Steps of a baseline while it is tuned, at most; when it is reported it has twice as many.

    A lower rate than the first has more steps, in proportion.
    """
    longer = max(1.0, start_rate(name) / rate) * (RMU_STEPS if name == "rmu" else 1)
    return round(sizes.steps * longer)


def rounded(value: Any) -> Any:
    """Losses as the results keep them: five digits after the point."""
    return [round(x, 5) for x in value] if isinstance(value, list) else round(value, 5)


def run_pieces(
    description: str | None,
    pieces: Callable[[Any, Results], Iterator[Piece]],
    kind: type[TofuLab] = TofuLab,
    file: Path = FILE,
    *,
    data: type[Data] = Data,
    sizes: Sizes | None = None,
    models: str = "tofu-small",
) -> None:
    """Run one of the scripts of TOFU-small, or of a setting like it. All of them share their
    options.

    Args:
        kind: the laboratory that ``pieces`` works in.
        file: of the results.
        data: who or what is forgotten and kept.
        sizes: the default of each size; those of TOFU-small when None.
        models: what the folders of its models in the cache begin with.
    """
    given, own, results = read_options(options_of(description, file), sizes or Sizes())
    trained = (own.authors, own.questions, own.rate, own.epochs, own.seed)
    cache = given.cache / f"{models}-{own.model}-{'-'.join(f'{x:g}' for x in trained)}"
    lab = kind(data(given.data, own), given.model, own, cache, results, given.device)
    run(pieces(lab, results), results, given)
