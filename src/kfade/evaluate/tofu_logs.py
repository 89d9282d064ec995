"""TOFU's figures from per-item losses: forget quality, model utility and its nine parts.

The formulas are those of the benchmark's own aggregation (Maini et al. 2024, section 2.2 and
``aggregate_eval_stat.py`` of locuslab/tofu). The truth ratio in its ``utils.py`` is different.
All losses are per token: an answer's summed cross-entropy over its number of scored tokens.

    log TR = mean_j loss(false_j) − loss(base)          base: the paraphrase, or the answer itself
    forget quality = p of the two-sample Kolmogorov-Smirnov test of TR on the forget set against
                     the retain model's
    model utility = harmonic mean of {ROUGE-L recall, probability, truth ratio} on the retain set,
                    the real authors and the world facts
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from statistics import fmean, harmonic_mean
from typing import Any

from kfade.errors import InputError

UTILITY_SETS = ("retain", "real_authors", "world_facts")
SETS = (*UTILITY_SETS, "forget")
# Keys of a log's header that describe its prompts -> their names in messages.
PROMPTS = {
    "prompt_format": "prompts",
    "template_sha256": "template file",
    "template_args": "template arguments",
    "prompt_date": "date in the prompts",
}


@dataclass(frozen=True)
class TofuItem:
    """The values of one question; losses in nats per token."""

    answer_loss: float
    base_loss: float
    """Of the paraphrased answer; of the answer where the set has no paraphrases."""
    false_losses: tuple[float, ...]
    """Of the perturbed, wrong answers."""
    rouge_l: float
    """ROUGE-L recall of the generated answer."""
    question: str = ""

    @property
    def log_truth_ratio(self) -> float:
        """mean_j loss(false_j) − loss(base): positive where the model prefers the true answer."""
        return fmean(self.false_losses) - self.base_loss

    @property
    def evenness(self) -> float:
        """min(TR, 1/TR): 1 where true and wrong answers are equally likely."""
        return math.exp(-abs(self.log_truth_ratio))

    @property
    def probability(self) -> float:
        """exp(−loss): the geometric mean over tokens of the answer's probabilities."""
        return math.exp(-self.answer_loss)

    @property
    def share(self) -> float:
        """p(answer) / (p(answer) + Σ_j p(false_j)), probabilities per token."""
        smallest = min(self.answer_loss, *self.false_losses)  # keeps the sum from underflowing
        true = math.exp(smallest - self.answer_loss)
        return true / (true + sum(math.exp(smallest - loss) for loss in self.false_losses))


@dataclass(frozen=True)
class TofuLog:
    """The measured items of one model, by set and number."""

    where: str
    """Where it was read, for messages."""
    sets: Mapping[str, Mapping[int, TofuItem]]
    notes: tuple[str, ...] = ()
    """Remarks for people: what reading changed in its values."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """Its header, with what decided its values; empty where there is none."""

    def items(self, name: str) -> list[TofuItem]:
        """Items of a set in the order of their numbers.

        Raises:
            InputError: the log lacks the set.
        """
        if not self.sets.get(name):
            raise InputError(
                f"{self.where}: holds no items of the set {name}; evaluate all four sets"
            )
        return [item for _, item in sorted(self.sets[name].items())]


def utility_parts(log: TofuLog) -> dict[str, float]:
    """The nine parts of model utility, ``{set}_{rouge_l | probability | truth_ratio}``.

    Probability: mean p(answer) on the retain set, the mean share among the choices on the other
    two. Truth ratio: mean max(0, 1 − 1/TR).
    """
    parts = {}
    for name in UTILITY_SETS:
        items = log.items(name)
        parts[f"{name}_rouge_l"] = fmean(item.rouge_l for item in items)
        parts[f"{name}_probability"] = fmean(
            item.probability if name == "retain" else item.share for item in items
        )
        parts[f"{name}_truth_ratio"] = fmean(
            -math.expm1(-max(0.0, item.log_truth_ratio)) for item in items
        )
    return parts


def forget_parts(log: TofuLog) -> dict[str, float]:
    """The same three figures of the forget set, with mean min(TR, 1/TR) as ``truth_ratio``."""
    items = log.items("forget")
    return {
        "rouge_l": fmean(item.rouge_l for item in items),
        "probability": fmean(item.probability for item in items),
        "truth_ratio": fmean(item.evenness for item in items),
    }


def model_utility(parts: Mapping[str, float]) -> float:
    """Harmonic mean of the nine parts; 0 where one of them is 0."""
    assert len(parts) == 9
    return harmonic_mean(parts.values())


def forget_quality(items: Iterable[TofuItem], retain: Iterable[TofuItem]) -> tuple[float, float]:
    """(p-value, statistic) of the two-sided Kolmogorov-Smirnov test between truth ratios.

    The test depends on the order of the values only; it is made on log TR, which cannot overflow.

    Raises:
        InputError: scipy is not installed.
    """
    test = load_ks_test()
    with warnings.catch_warnings():
        # For the smallest p-values scipy uses the asymptotic form, and warns each time.
        warnings.filterwarnings("ignore", "ks_2samp: Exact calculation unsuccessful")
        result = test([i.log_truth_ratio for i in items], [i.log_truth_ratio for i in retain])
    return float(result.pvalue), float(result.statistic)


def load_ks_test() -> Callable[..., Any]:
    """scipy's two-sample test. Call it before long work, so that a missing scipy is found early.

    Raises:
        InputError: scipy is not installed.
    """
    try:
        from scipy.stats import ks_2samp
    except ImportError:
        raise InputError(
            "forget quality needs the package scipy: pip install 'kfade[tofu]'"
        ) from None
    return ks_2samp


def aggregate(log: TofuLog, retain: TofuLog | None = None) -> dict[str, Any]:
    """All figures of one model, and those of the retain model.

    Returns:
        ``forget_quality`` and ``ks_statistic`` (None without a retain model), ``model_utility``,
        its nine ``parts``, ``forget``, numbers of ``items``, and ``retain_model``: its figures but
        forget quality, which is 1 by definition. Its utility and parts are None where its log holds
        the forget set alone.
    """
    own, p, statistic, beside = _figures(log, utility_parts(log)), None, None, None
    if retain is not None:
        p, statistic = forget_quality(log.items("forget"), retain.items("forget"))
        whole = all(retain.sets.get(name) for name in UTILITY_SETS)
        beside = _figures(retain, utility_parts(retain) if whole else None)
    return {"forget_quality": p, "ks_statistic": statistic, **own, "retain_model": beside}


def _figures(log: TofuLog, parts: Mapping[str, float] | None) -> dict[str, Any]:
    return {
        "model_utility": None if parts is None else model_utility(parts),
        "parts": parts,
        "forget": forget_parts(log),
        "items": {name: len(log.sets[name]) for name in SETS if log.sets.get(name)},
    }


def notes_on(log: TofuLog, retain: TofuLog | None) -> list[str]:
    """Remarks on two logs: what reading changed in them, and why they may not be comparable.

    They are not where their questions differ, or how their prompts were made.
    """
    if retain is None:
        return list(log.notes)
    ours, theirs = log.sets["forget"], retain.sets["forget"]
    notes = [*log.notes, *retain.notes]
    if len(ours) != len(theirs):
        notes.append(
            f"{len(ours)} forget questions in {log.where}, {len(theirs)} in {retain.where}: forget "
            "quality compares truth ratios of different questions"
        )
    pairs = [(ours[number].question, theirs[number].question) for number in ours.keys() & theirs]
    # A reference log holds the whole prompt, so one text need only lie within the other.
    differing = sum(a not in b and b not in a for a, b in pairs)
    if differing:
        notes.append(
            f"{differing} forget questions of the same number differ between {log.where} and "
            f"{retain.where}: were they made with one split?"
        )
    digests = [one.about.get("data_sha256") for one in (log, retain)]
    if len(ours) == len(theirs) and not differing and None not in digests and len({*digests}) > 1:
        notes.append(
            f"the questions or answers of {log.where} and {retain.where} are not all the same "
            "(data_sha256): were they made with one split, of one copy of the data set?"
        )
    return [*notes, *_notes_on_prompts(log, retain)]


def _notes_on_prompts(log: TofuLog, retain: TofuLog) -> list[str]:
    """Differences in how the prompts of two logs were made, where both logs tell."""
    if not all("prompt_format" in one.about for one in (log, retain)):
        return []
    notes = []
    for key, called in PROMPTS.items():
        ours, theirs = (one.about.get(key) for one in (log, retain))
        if ours != theirs:
            notes.append(
                f"other {called}: {_shown(ours)} in {log.where}, {_shown(theirs)} in "
                f"{retain.where}; evaluate the retain model as the other"
            )
    return notes


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "none" if value is None else str(value)[:40]


@dataclass(frozen=True)
class RowChoice:
    """The run of a sweep to report, chosen on all forget questions and on half of them."""

    best: str
    """Run of the largest forget quality × utility on all items, which are also those reported."""
    best_forget_quality: float
    best_utility: float
    held_out: str
    """Run chosen by the same rule on every other forget question."""
    held_out_forget_quality: float
    """On the forget questions that this choice did not use."""
    held_out_utility: float


def choose_row(logs: Mapping[str, TofuLog], retain: TofuLog) -> RowChoice:
    """Choose one of a sweep's runs by name; the first of equals.

    Utility does not depend on forget questions, so it is the same in both choices.

    Raises:
        InputError: there are no runs.
    """
    if not logs:
        raise InputError("no runs to choose from: give at least one log")
    utility = {name: model_utility(utility_parts(log)) for name, log in logs.items()}

    def quality(name: str, part: slice) -> float:
        ours, theirs = logs[name].items("forget"), retain.items("forget")
        return forget_quality(ours[part], theirs[part])[0]

    def largest(part: slice) -> str:
        return max(logs, key=lambda name: quality(name, part) * utility[name])

    everything, chosen_on, reported_on = slice(None), slice(0, None, 2), slice(1, None, 2)
    best, held_out = largest(everything), largest(chosen_on)
    return RowChoice(
        *(best, quality(best, everything), utility[best]),
        *(held_out, quality(held_out, reported_on), utility[held_out]),
    )
