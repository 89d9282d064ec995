"""Check: tests the assumptions of the method on a given model, before a long run."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any

import torch
from cyclopts import Parameter
from torch import nn

from kfade.curvature.damping import Damping
from kfade.curvature.estimators import Estimator
from kfade.curvature.product import quadratic_form
from kfade.data.batches import make_batches
from kfade.data.sequences import TokenSequence
from kfade.demo.data import data_file
from kfade.errors import InputError, first_line
from kfade.evaluate.division import undivided
from kfade.evaluate.generation import Decoding, generate
from kfade.evaluate.routing import rerouted_share
from kfade.evaluate.tokens import log_likelihoods
from kfade.method.gauge import Gauge, parameter_changes
from kfade.method.gradient import forget_gradient
from kfade.method.objectives import margin
from kfade.method.preflight import preflight
from kfade.method.step import gauss_newton_step
from kfade.method.update import Update
from kfade.models.layers import find_targets, has_experts
from kfade.models.lengths import length_class, model_window
from kfade.models.targets import named
from kfade.models.weights import Weights
from kfade.runs import options as o
from kfade.runs.choices import draw_of, estimator_of
from kfade.runs.config import CurvatureConfig, ModelConfig, RetainConfig
from kfade.runs.experts import leave_out_rare
from kfade.runs.session import Loaded, load, read_source, selection, to_tokens
from kfade.runtime import distributed, progress
from kfade.runtime.counts import counted
from kfade.runtime.stages import Clock, stage, timing

SEQUENCES, LENGTH, BLOCKS = 8, 97, 4  # small, so that a check takes a minute on a laptop
SHORT, BEYOND = 10, 32  # tokens of a short sequence; tokens beyond the last border of lengths
PROMPTS, NEW_TOKENS = (2, 20, 5, 9, 20), 8  # lengths of prompts; two are equal
SMALL_KLS = (1e-4, 1e-6, 1e-8)  # nats; tried until the third order is negligible
ABOVE_ROUNDING = 10  # smallest KL of a step, as a multiple of the KL of rounding


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    name: str
    passed: bool
    text: str


@o.settings()
@dataclass(frozen=True)
class CheckRequest:
    """The model to check, and the curvature."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The model."""
    curvature: CurvatureConfig = field(default_factory=CurvatureConfig, kw_only=True)
    """The estimator, the weights to change, and the pseudo-labels."""
    retain: Annotated[str | None, Parameter(group=o.DATA)] = field(default=None, kw_only=True)
    """Texts to check on, in the same formats as for kfade unlearn. Unset: those of the demo."""
    seed: Annotated[int, Parameter(group=o.RUN)] = field(default=0, kw_only=True)
    """Random seed of the pseudo-labels."""
    shard: Annotated[bool, o.FLAG, Parameter(group=o.RUN)] = field(default=False, kw_only=True)
    """Shard the weights of the model's blocks over the processes of torchrun."""


def check(request: CheckRequest) -> dict[str, Any]:
    """Test the assumptions of the method on a few short texts; returns the findings.

    The targets are found. Padding and batch size change neither gradients nor generated texts. The
    length of a sequence does not change the numbers of other sequences. The measured KL of a small
    step agrees with the exact quadratic form, and the predicted KL is positive.

    Raises:
        InputError: the model is not supported, or the gradient is zero on these texts.
    """
    curvature = request.curvature
    fit = estimator_of(curvature.estimator, draw_of(curvature.labels))
    clock = Clock()
    with timing(clock):
        examples = read_source(request.retain or str(data_file("retain.jsonl")), "--retain")
        loaded = load(request.model, curvature, shard=request.shard)
        preflight(loaded.model, loaded.targets, recompute=curvature.recompute)
        length = min(LENGTH, model_window(loaded.model) or LENGTH)
        plain = RetainConfig(template="plain", sequence_length=length)
        texts = [example for example in examples if example.text] or examples
        tokens = to_tokens(texts[: 4 * SEQUENCES], loaded, plain)[:SEQUENCES]
        findings = [_targets(loaded), _padding(loaded, tokens), *_lengths(loaded, tokens)]
        findings.append(_generation(loaded, tokens))
        few = _few_blocks(loaded, curvature)
        seen = replace(curvature, expert_rows=1)
        few = leave_out_rare(few, tokens, seen, LENGTH)
        findings += _small_step(few, tokens, fit, request.seed)
    return {
        "passed": all(finding.passed for finding in findings),
        "findings": [vars(finding) for finding in findings],
        "seconds": clock.total,
    }


def _targets(loaded: Loaded) -> Finding:
    """The names and shapes of the targets; experts of a layer together."""
    names = [target.name.split(f".{target.block}.", 1)[-1] for target in loaded.targets]
    shapes = [target.shape for target in loaded.targets]
    kinds = Counter(zip((name.partition("[")[0] for name in names), shapes, strict=True))
    parts = [f"{count} x {name} {list(shape)}" for (name, shape), count in kinds.items()]
    return Finding("targets", True, "; ".join(parts))


def _padding(loaded: Loaded, tokens: list[TokenSequence]) -> Finding:
    """Compare the gradient of one padded batch with that of one sequence at a time."""
    cut = _unequal(tokens, model_window(loaded.model))
    device = loaded.targets[0].device
    results = []
    for budget in (1, 10**9):
        group = length_class(loaded.model)
        batches = make_batches(cut, budget=budget, device=device, group=group)
        results.append(forget_gradient(loaded.model, batches, loaded.targets, margin))
    alone, together = results
    difference = sum((alone[n] - together[n]).square().sum().item() for n in alone) ** 0.5
    size = sum(alone[n].square().sum().item() for n in alone) ** 0.5
    if size == 0:
        raise InputError(
            f"the gradient is zero in all targeted weights ({named(alone)}) on these texts: target "
            "others with --target or --layers, or give other texts with --retain"
        )
    limit = _rounding(loaded)
    return Finding(
        "padding and batch size",
        difference <= limit * size,
        f"gradients of {counted(len(cut), 'sequence')} alone and in one padded batch differ by "
        f"{difference / size:.1e} (limit {limit:.0e})",
    )


def _unequal(tokens: list[TokenSequence], window: int | None) -> list[TokenSequence]:
    """``SEQUENCES`` sequences of different lengths, made of ``tokens``.

    Long sequences are cut and short ones repeated. All tokens except the first are scored.
    """
    longest = max(min(2 * SEQUENCES, window or LENGTH), *(len(s.tokens) for s in tokens))
    made = []
    for i in range(SEQUENCES):
        text = tokens[i % len(tokens)].tokens
        length = max(2, longest * (SEQUENCES + 1 - i) // (SEQUENCES + 1))
        text = (text * (length // len(text) + 1))[:length]
        made.append(TokenSequence(text, (False,) + (True,) * (length - 1)))
    return made


def _rounding(loaded: Loaded) -> float:
    """Tolerance for rounding: relative for a gradient, in nats for a log-probability.

    Rounding errors grow with depth, to about a thousand units in the last place. The error of a
    wrong mask is of order 1.
    """
    return max(1e-3, 16 * torch.finfo(loaded.targets[0].dtype).eps)


def _lengths(loaded: Loaded, tokens: list[TokenSequence]) -> list[Finding]:
    """Compare log-likelihoods of sequences alone, in one batch, and after longer sequences.

    Their lengths are on both sides of the length at which the rotary frequencies change. Empty for
    a model whose frequencies do not change.
    """
    borders = length_class(loaded.model).borders
    if not borders:
        return []
    stream = [token for sequence in tokens for token in sequence.tokens]
    lengths = [min(SHORT, borders[0]), borders[-1] + BEYOND // 2, borders[-1] + BEYOND]
    sequences = []
    for length in lengths:
        text = (stream * (length // len(stream) + 1))[:length]
        sequences.append(TokenSequence(tuple(text), (False,) + (True,) * (length - 1)))
    rising = [log_likelihoods(loaded.model, [one])[0] for one in sequences]
    together = log_likelihoods(loaded.model, sequences, batch_tokens=10**9)
    falling = [log_likelihoods(loaded.model, [one])[0] for one in sequences[::-1]][::-1]
    difference = max(
        (max(values) - min(values)) / one.loss_tokens
        for one, *values in zip(sequences, rising, together, falling, strict=True)
    )
    limit = _rounding(loaded)
    return [
        Finding(
            "sequence length",
            difference <= limit,
            f"the model's rotary frequencies change beyond {', '.join(map(str, borders))} "
            f"positions; log-likelihoods of {lengths[0]}, {lengths[1]} and {lengths[2]} tokens "
            f"alone, together and after longer ones differ by {difference:.1e} nats per token "
            f"(limit {limit:.0e})",
        )
    ]


def _generation(loaded: Loaded, tokens: list[TokenSequence]) -> Finding:
    """Compare greedy continuations of prompts of several lengths, in a batch and one by one."""
    name = "batched generation"
    texts = [tokens[i % len(tokens)].tokens for i in range(len(PROMPTS))]
    longest = max(1, (model_window(loaded.model) or LENGTH) - NEW_TOKENS)
    prompts = [text[: min(length, longest)] for text, length in zip(texts, PROMPTS, strict=True)]
    results: list[dict[int, list[int]]] = [{}, {}]
    for found, budget in zip(results, (10**9, 1), strict=True):
        decoding = Decoding(NEW_TOKENS, budget)
        try:
            with undivided():  # a process may fail alone
                found.update(generate(loaded.model, loaded.tokenizer, prompts, decoding))
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
            return Finding(name, False, f"it fails: {reason}")
    together, alone = results
    gaps = [
        _gap(loaded, prompt, together[i], alone[i])
        for i, prompt in enumerate(prompts)
        if together[i] != alone[i]
    ]
    limit = _rounding(loaded)
    text = f"{counted(len(prompts), 'prompt')} continued in batches and one by one: "
    text += f"{len(prompts) - len(gaps)} alike"
    if gaps:
        text += (
            f", the others apart where the two tokens' log-probabilities differ by up to "
            f"{max(gaps):.1e} nats (a tie up to {limit:.0e})"
        )
    return Finding(name, all(gap <= limit for gap in gaps), text)


def _gap(loaded: Loaded, prompt: tuple[int, ...], one: list[int], other: list[int]) -> float:
    """Difference of the log-probabilities of the first tokens at which two continuations differ."""
    place = next(t for t, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    texts = [(*prompt, *tokens[: place + 1]) for tokens in (one, other)]
    last = [TokenSequence(text, (False,) * (len(text) - 1) + (True,)) for text in texts]
    first, second = log_likelihoods(loaded.model, last)
    return abs(first - second)


def _few_blocks(loaded: Loaded, curvature: CurvatureConfig) -> Loaded:
    """The model with the targets of at most ``BLOCKS`` blocks, evenly spaced."""
    blocks = sorted({t.block for t in loaded.targets})
    if len(blocks) > BLOCKS:
        blocks = [blocks[i * (len(blocks) - 1) // (BLOCKS - 1)] for i in range(BLOCKS)]
    targets = find_targets(
        loaded.model, **{**selection(curvature), "layers": ",".join(map(str, blocks))}
    )
    return replace(loaded, targets=targets)


def _after_rounding(model: nn.Module, update: Update) -> Update:
    """The part of ``update`` that remains after rounding to the model's dtype."""
    weights = Weights(model)
    left = {}
    for name, delta in update.deltas.items():
        own = distributed.gather_full(weights[name].detach())
        weight = own.to(delta.dtype)
        left[name] = (weight + delta).to(own.dtype).to(delta.dtype) - weight
    return Update(left)


@dataclass(frozen=True)
class Trial:
    """KL of a small step, in nats per token."""

    exact: float
    """KL by the exact quadratic form."""
    measured: float
    """KL by forward passes."""
    predicted: float
    """KL by the fitted curvature."""
    rerouted: float | None
    """Share of positions that it sends to other experts; None without routed experts."""

    @property
    def ratio(self) -> float:
        """Measured over exact KL; 1 if the quadratic form holds."""
        return self.measured / self.exact


def _small_step(
    few: Loaded, tokens: list[TokenSequence], fit: Estimator, seed: int
) -> list[Finding]:
    """Compare predicted, exact-quadratic and measured KL of a small step, on the fit's sequences.

    The KL approaches the quadratic form as the step becomes smaller. If the two differ, smaller
    steps are tried.
    """
    model, targets = few.model, few.targets
    group = length_class(model)
    batches = make_batches(tokens, device=targets[0].device, group=group)
    gauge = Gauge(model, batches, batches[-1:])
    head = gauge.head
    with stage("fit"):
        curvature = fit.fit(model, batches, targets, seed=seed, head=head)
    gradient = forget_gradient(model, batches[-1:], targets, margin, head=head)
    step = gauss_newton_step(curvature, gradient, Damping())
    floor = ABOVE_ROUNDING * gauge.rounding_kl(targets)
    exact = quadratic_form(model, batches, targets, step.direction, head=head)
    # In 16 bits the KL of rounding adds a tenth, forward-mode products are rounded too, and the
    # larger step has a larger third-order term. The error of a wrong product is of order 1.
    limit = 0.1 if floor == 0 else 0.5
    trials: list[Trial] = []
    for kl in sorted({max(kl, floor) for kl in SMALL_KLS}, reverse=True):
        alpha = (2 * kl / exact) ** 0.5
        # In 16 bits much of a small step is lost to rounding: compare the part that remains.
        update = Update({}).plus(parameter_changes(targets, step.direction), alpha)
        left = _after_rounding(model, update)
        remains = {target.name: target.from_parameters(left.deltas) for target in targets}
        exact_kl = 0.5 * quadratic_form(model, batches, targets, remains, head=head)
        measured = gauge.measure(left, margin).retain_kl
        rerouted = rerouted_share(model, batches, partial(gauge.applied, left))
        trials.append(Trial(exact_kl, measured, step.predicted_kl(alpha), rerouted))
        if abs(trials[-1].ratio - 1) <= limit:
            break
    blocks = sorted({t.block for t in targets})
    scored = sum(batch.loss_tokens for batch in batches)
    progress.say(f"small step on blocks {blocks}, {counted(scored, 'token')}")
    last = trials[-1]
    passed = abs(last.ratio - 1) <= limit
    rounding = f"; KL of rounding alone {floor / ABOVE_ROUNDING:.1e}" if floor else ""
    text = (
        f"it predicts {last.exact:.1e} nats, {last.measured:.2e} were measured "
        f"(ratio {last.ratio:.3f}, limit 1 ± {limit}{rounding})"
    )
    if len(trials) > 1:
        tried = ", ".join(f"{trial.ratio:.3g} at {trial.exact:.0e}" for trial in trials[:-1])
        text += f"; for larger steps the ratio is {tried}"
        if passed:
            why = "beyond it terms of higher order matter"
            if has_experts(model):
                why = "beyond it the router chooses other experts"
            text += f": the form holds up to about {last.exact:.0e} nats, {why}"
    seen = last.predicted
    return [
        Finding("exact quadratic form", passed, text),
        *_routing(trials),
        Finding(
            "fitted curvature",
            seen > 0,
            f"it predicts {seen:.1e} nats, {last.measured:.2e} were measured: the fit sees "
            f"1/{last.measured / seen if seen else math.inf:.0f} of this step's KL; choose a "
            "step's size by --kl, not by --alpha",
        ),
    ]


def _routing(trials: list[Trial]) -> list[Finding]:
    """The share of positions that the steps send to other experts; empty without routed experts."""
    shares = [
        f"{100 * trial.rerouted:.2g} % at a KL of {trial.measured:.0e} nats"
        for trial in trials
        if trial.rerouted is not None
    ]
    if not shares:
        return []
    text = (
        f"positions that go to other experts than before, on average over layers: "
        f"{', '.join(shares)}; predictions hold where few do. If kfade unlearn reports a large "
        "share, compare with --experts none, or with later blocks only (--layers)"
    )
    return [Finding("routing", True, text)]
