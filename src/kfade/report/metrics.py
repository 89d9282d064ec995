"""What each known number is: group, name, unit, formula, and which way is better."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Group = Literal["Forgetting", "Specificity", "Utility", "Further"]
GROUPS: tuple[Group, ...] = ("Forgetting", "Specificity", "Utility", "Further")
NATS, SHARE, PLAIN = "nats/token", "%", ""


@dataclass(frozen=True)
class Metric:
    """What a number is."""

    group: Group
    name: str
    unit: str
    formula: str
    better: Literal["higher", "lower", ""] = ""
    before: float | None = None
    """The value of the unedited model, where it is so by definition."""

    @property
    def unit_shown(self) -> str:
        """What stands beside the name; a percent sign stands beside each number instead."""
        return "" if self.unit == SHARE else self.unit


FORGET_LOSS = Metric(
    "Forgetting",
    "loss on the forget set",
    NATS,
    "Mean of −log p(token) over the loss tokens of the forget sequences, e^(−loss) being the "
    "probability of a typical token.",
    "higher",
)
RETAIN_KL = Metric(
    "Specificity",
    "KL on held-out retain data",
    NATS,
    "KL(base ‖ edited) = Σ_v p(v) log(p(v)/q(v)) over the whole vocabulary, teacher-forced, mean "
    "over the loss tokens of retain sequences that no fit saw.",
    "lower",
    before=0.0,
)
BENIGN_KL = Metric(
    "Specificity",
    "KL on benign completions",
    NATS,
    "KL(base ‖ edited) over the whole vocabulary at each token of completions that the base model "
    "wrote, mean over tokens; 95 % bootstrap interval.",
    "lower",
    before=0.0,
)
FORGET_QUALITY = Metric(
    "Forgetting",
    "TOFU forget quality",
    "p-value",
    "Two-sided Kolmogorov–Smirnov test between the truth ratios of this model and of the retain "
    "model on the forget split. Near 1: not told apart from a model that never saw it.",
    "higher",
)
MODEL_UTILITY = Metric(
    "Utility",
    "TOFU model utility",
    PLAIN,
    "Harmonic mean of nine: ROUGE-L recall, probability and truth ratio on retain, real authors "
    "and world facts.",
    "higher",
)
MT_BENCH = Metric(
    "Utility",
    "MT-Bench",
    "of 10",
    "Mean rating of the answers, 1 to 10, by the judge; interval from the standard error over "
    "runs, over questions where there was one run.",
    "higher",
)
KL_TAIL = Metric(
    "Specificity",
    "KL that 5 % of completions exceed",
    NATS,
    "The 95 % quantile over completions of the mean KL of their tokens; 95 % bootstrap interval.",
    "lower",
    before=0.0,
)
# By the aggregate's key: name, formula, and the item's value, for the interval.
TOFU_FORGET = {
    "rouge_l": (
        "ROUGE-L recall",
        "Longest common subsequence of what the model says and the true answer, over the answer's "
        "length, words stemmed; mean over questions.",
        "rouge_l",
    ),
    "probability": (
        "probability",
        "exp(−loss per token) of the true answer; mean over questions.",
        "probability",
    ),
    "truth_ratio": (
        "truth ratio",
        "min(TR, 1/TR), TR = p(paraphrased answer) / geometric mean of p(wrong answers), "
        "each per token; mean over questions.",
        "evenness",
    ),
}
SCORINGS = {
    "text_per_token": (
        "text",
        "The choice whose text is likeliest per token after the question is the answer.",
    ),
    "letters": (
        "letter",
        "All choices are shown; the likeliest letter after “Answer:” is the answer.",
    ),
}
FORGET_WORDS = ("forget", "wmdp")
ACCURACIES = ("acc", "acc_norm")
LM_EVAL = "As lm-evaluation-harness computes it."
MEMORISATION = {
    "exact_memorisation": (
        "exact memorisation",
        "Share of tokens that the model's likeliest token equals, given the text before; mean over "
        "texts.",
    ),
    "extraction_strength": (
        "extraction strength",
        "1 − k/n: k of a text's n tokens have to be given before all others come by themselves; "
        "mean over texts.",
    ),
    "perplexity": ("perplexity", "exp of the mean loss per token over all texts."),
}
AUC = (
    "P(a text that was trained on scores higher than one that was not). 0.5: it cannot be told; "
    "compare with the retain model's."
)
SURVIVING = (
    "⟨E, ΔW⟩ / ‖ΔW‖², E the change seen once all weights are rounded: 100 % when all of the "
    "update is there, 0 % when none is."
)
