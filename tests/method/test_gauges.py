"""Steps on the way are measured on a part of the data, the last one and the result on all."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from helpers import flat, measured_kl, random_sequences, tiny_llama

import kfade
from kfade import KFAC, InputError, StepSize, Update, cross_entropy, make_batches, margin
from kfade.method.gauge import Gauge
from kfade.method.gauges import Gauges, part_of
from kfade.method.measure import TokenLosses, mean_objectives
from kfade.method.search import SEARCH, Probe
from kfade.method.size import KL_TOLERANCE
from kfade.runtime.progress import reporting

MANY = {
    "forget": random_sequences(40, seed=7),
    "retain": random_sequences(12, seed=8),
    "held_out": random_sequences(36, seed=9),
}
PARTS = {"forget": 10, "held_out": 9}
ALL = {"forget": 40, "held_out": 36}


def forgetting(model, sequences) -> tuple[float, float]:
    """(loss per token, mean probability) of the sequences."""
    batches, losses = make_batches(sequences), TokenLosses()
    [loss] = mean_objectives(model, batches, (losses,))
    return loss, losses.mean_probability(batches)


@pytest.fixture(autouse=True)
def of_few_tokens(monkeypatch):
    """The texts here are of five scored tokens."""
    monkeypatch.setattr("kfade.method.gauges.LEAST_TOKENS", 10)


def test_a_part_is_a_quarter_but_not_a_handful(monkeypatch):
    monkeypatch.setattr("kfade.method.gauges.LEAST_TOKENS", 1000)
    counts = (3, 8, 20, 32, 80, 256)
    assert [part_of(n, 511 * n) for n in counts] == [3, 8, 8, 8, 20, 64]
    # Of short texts as many as have 1000 tokens, if there are.
    assert [part_of(n, 39 * n) for n in counts] == [3, 8, 20, 26, 26, 64]


def test_every_step_takes_the_whole_forget_set_or_the_batch_asked_for(monkeypatch):
    seen, own = [], kfade.method.unlearn.forget_gradient

    def noting(model, batches, *given, **options):
        seen.append(sum(len(batch.loss_BT) for batch in batches))
        return own(model, batches, *given, **options)

    monkeypatch.setattr("kfade.method.unlearn.forget_gradient", noting)
    options = {"fit": KFAC(), "steps": 3, "refit": False, "kl": 0.01}
    kfade.unlearn(tiny_llama(), **MANY, **flat(**options))
    assert seen == [40, 40, 40]
    seen.clear()
    kfade.unlearn(tiny_llama(), **MANY, **flat(**options, forget_batch=7))
    assert seen == [7, 7, 7]


@pytest.mark.parametrize("size", [{"kl": 0.01}, {"until": 3.8}, {"alpha": 0.05}])
def test_the_last_step_and_the_result_are_measured_on_all_data(size):
    model = tiny_llama()
    before = forgetting(model, MANY["forget"])
    options = {"fit": KFAC(), "steps": 3, "refit": False, **size}
    update = kfade.unlearn(model, **MANY, **flat(**options))
    steps = update.provenance["steps"]
    assert [step["measured_on"] for step in steps] == [PARTS, PARTS, ALL]
    kl = measured_kl(model, make_batches(MANY["held_out"]), update)
    with update.applied_to(model):
        loss, probability = forgetting(model, MANY["forget"])
    # 1e-9: the data are in other batches here; sums in float64 differ by rounding.
    assert steps[-1]["retain_kl"] == pytest.approx(kl, rel=1e-9)
    assert steps[-1]["forget_loss_after"] == pytest.approx(loss, rel=1e-9)
    assert steps[-1]["forget_probability_after"] == pytest.approx(probability, rel=1e-9)
    # Each step begins at the values of all data, where the one before ended.
    assert steps[0]["forget_loss_before"] == pytest.approx(before[0], rel=1e-9)
    assert steps[0]["forget_probability_before"] == pytest.approx(before[1], rel=1e-9)
    for last, this in pairwise(steps):
        assert this["forget_loss_before"] == last["forget_loss_after"]
        assert this["forget_probability_before"] == last["forget_probability_after"]
        assert last["confirmed"]
        trial = last["probes"][-1]
        assert trial["forget_loss"] != last["forget_loss_after"]
        # 0.2 nats: the change of the loss differs from text to text.
        assert trial["forget_loss"] == pytest.approx(last["forget_loss_after"], abs=0.2)


def test_small_data_and_a_single_step_are_measured_on_all():
    model = tiny_llama()
    single = kfade.unlearn(model, **MANY, **flat(fit=KFAC(), kl=0.01))
    assert single.provenance["steps"][0]["measured_on"] == ALL
    few = {name: sequences[:8] for name, sequences in MANY.items()}
    steps = kfade.unlearn(model, **few, **flat(fit=KFAC(), kl=0.01, steps=2)).provenance["steps"]
    assert [step["measured_on"] for step in steps] == 2 * [{"forget": 8, "held_out": 8}]


def test_a_part_estimates_what_all_data_would_measure():
    """Its loss is shifted by a constant, so is the logarithm of its probability, and its KL is
    multiplied by one. Without them the estimate is farther off."""
    model = tiny_llama()
    held_out, forget = make_batches(MANY["held_out"]), make_batches(MANY["forget"])
    few_held_out, few = make_batches(MANY["held_out"][:9]), make_batches(MANY["forget"][:10])
    whole, own = Gauge(model, held_out, forget), Gauge(model, few_held_out, few)
    step = kfade.unlearn(model, **MANY, **flat(fit=KFAC(), kl=1e-4))
    at, near = step, step.plus(step.deltas, 0.5)
    now = whole.measure(at, margin)
    part, begin = own.anchored(at, now, margin)
    assert (begin.retain_kl, begin.forget_loss, begin.forget_probability) == (
        now.retain_kl,
        now.forget_loss,
        now.forget_probability,
    )
    assert begin.objective == own.measure(at, margin).objective  # on its own data
    base = own.measure(at, cross_entropy)
    plain, anchored, right = (g.measure(near, cross_entropy) for g in (own, part, whole))
    # 1e-12: sums and products of two numbers in float64.
    factor = now.retain_kl / base.retain_kl
    assert anchored.retain_kl == pytest.approx(plain.retain_kl * factor, rel=1e-12)
    shift = now.forget_loss - base.forget_loss
    assert anchored.forget_loss == pytest.approx(plain.forget_loss + shift, rel=1e-12)
    ratio = now.forget_probability / base.forget_probability
    assert anchored.forget_probability == pytest.approx(plain.forget_probability * ratio, rel=1e-12)
    for name in ("retain_kl", "forget_loss"):
        error, without = (abs(getattr(g, name) - getattr(right, name)) for g in (anchored, plain))
        assert error < 0.5 * without
    assert own.measure(near, cross_entropy) == plain  # it is as it was


def test_a_part_with_next_to_none_of_the_kl_is_multiplied_by_a_bounded_factor():
    """What that leaves is added, so that it begins at the KL of all data all the same."""
    model = tiny_llama()
    own = Gauge(model, make_batches(MANY["held_out"][:9]), make_batches(MANY["forget"][:10]))
    at = kfade.unlearn(model, **MANY, **flat(fit=KFAC(), kl=1e-4))
    near = at.plus(at.deltas, 0.5)
    plain, farther = own.measure(at, margin), own.measure(near, margin)
    part, _ = own.anchored(at, replace(plain, retain_kl=1.0), margin)
    # 1e-12: sums and products of two numbers in float64.
    assert part.measure(at, margin).retain_kl == pytest.approx(1.0, rel=1e-12)
    added = 10 * (farther.retain_kl - plain.retain_kl)
    assert part.measure(near, margin).retain_kl == pytest.approx(1.0 + added, rel=1e-12)
    nothing = own.measure(Update({}), margin)
    for update, kl, expected in (
        (at, math.nan, plain.retain_kl),
        (Update({}), 0.0, plain.retain_kl),
        (Update({}), 0.1, 0.1 + 10 * plain.retain_kl),  # it sees none of the KL
    ):
        now = replace(plain if update is at else nothing, retain_kl=kl)
        part, begin = own.anchored(update, now, margin)
        assert begin.retain_kl is kl
        assert part.measure(at, margin).retain_kl == pytest.approx(expected, rel=1e-12)


def test_a_probability_that_underflows_in_a_part_is_no_error():
    model = tiny_llama()
    own = Gauge(model, make_batches(MANY["held_out"][:9]), make_batches(MANY["forget"][:10]))
    plain = own.measure(Update({}), margin)
    own.measure = lambda *_: replace(plain, forget_probability=0.0)
    part, begin = own.anchored(Update({}), plain, margin)
    assert begin.forget_probability == plain.forget_probability
    assert 0 < math.exp(part._log_offset) < math.inf


def test_steps_after_the_first_know_how_much_of_the_kl_a_part_has(monkeypatch):
    """A part with a third of the KL of all data: the run takes all of its steps, where without the
    factor it goes too far and has to come back."""
    real = Gauge.measure

    def poor(self, update, objective, alpha=0.0):
        found = real(self, update, objective, alpha)
        share = 0.3 if self.sequences == PARTS else 1.0
        return replace(found, retain_kl=share * found.retain_kl)

    monkeypatch.setattr(Gauge, "measure", poor)
    options = {"fit": KFAC(), "steps": 4, "refit": False, "kl": 0.01}

    def run() -> list[dict]:
        return kfade.unlearn(tiny_llama(), **MANY, **flat(**options)).provenance["steps"]

    steps = run()
    assert [step["scaled_by"] for step in steps] == [1.0] * 4
    assert steps[-1]["retain_kl"] == pytest.approx(0.01, rel=0.1)
    monkeypatch.setattr("kfade.method.gauge.MOST_FACTOR", 1.0)
    *_, last = steps = run()
    assert len(steps) < 4
    assert last["scaled_by"] < 0.95


def test_a_target_that_a_part_reaches_is_confirmed_on_all(monkeypatch):
    """A run whose last step on a part seems to reach the target goes on if all data do not."""
    model, ended = tiny_llama(), []
    start, _ = forgetting(model, MANY["forget"])
    reached = kfade.StepSize.is_reached

    def early(self, first, now) -> bool:
        """Says so once, after the first step."""
        if now.forget_loss != first.forget_loss and not ended:
            ended.append(now)
            return True
        return reached(self, first, now)

    monkeypatch.setattr(kfade.StepSize, "is_reached", early)
    options = {"fit": KFAC(), "steps": 3, "refit": False, "until": start + 0.3}
    steps = kfade.unlearn(model, **MANY, **flat(**options)).provenance["steps"]
    assert [step["measured_on"] for step in steps] == [PARTS, PARTS, ALL]
    assert [step["confirmed"] for step in steps] == [True, True, False]
    assert math.isclose(steps[-1]["forget_loss_after"], start + 0.3, abs_tol=0.01)


def misjudged(monkeypatch, factor: float) -> None:
    """A part that measures ``factor`` times what a step adds to the KL and the forget loss."""
    real = Gauge.anchored

    def anchored(self, update, now, objective):
        part, begin = real(self, update, now, objective)
        whole = Gauge(self.model, make_batches(MANY["held_out"]), make_batches(MANY["forget"]))

        def measure(update, objective, alpha=0.0):
            found = whole.measure(update, objective, alpha)
            part.latest = part.base
            return replace(
                found,
                retain_kl=now.retain_kl + factor * (found.retain_kl - now.retain_kl),
                forget_loss=now.forget_loss + factor * (found.forget_loss - now.forget_loss),
            )

        part.measure = measure
        return part, begin

    monkeypatch.setattr(Gauge, "anchored", anchored)


@pytest.mark.parametrize("size", ["kl", "until"])
@pytest.mark.parametrize("factor", [0.2, 3.0], ids=["too little", "too much"])
def test_steps_that_a_part_misjudges_end_at_the_size_all_the_same(monkeypatch, size, factor):
    """Where a part sees too little, the steps on the way go beyond the size: the run comes back.
    Where it sees too much, they go on, measured on all data."""
    model, said = tiny_llama(), []
    misjudged(monkeypatch, factor)
    monkeypatch.setattr("kfade.method.gauges.say", said.append)
    start, _ = forgetting(model, MANY["forget"])
    asked = {"kl": 0.01} if size == "kl" else {"until": start + 0.3}
    options = {"fit": KFAC(), "steps": 3, "refit": False, **asked}
    update = kfade.unlearn(model, **MANY, **flat(**options))
    *_, last = steps = update.provenance["steps"]
    kl = measured_kl(model, make_batches(MANY["held_out"]), update)
    with update.applied_to(model):
        loss, _ = forgetting(model, MANY["forget"])
    # The tolerances of a size: a tenth of the KL, 3 % of the rise.
    if size == "kl":
        assert kl == pytest.approx(0.01, rel=0.1)
    else:
        assert loss == pytest.approx(start + 0.3, abs=0.03 * 0.3)
    # 1e-9: the data are in other batches here.
    assert last["retain_kl"] == pytest.approx(kl, rel=1e-9)
    assert last["forget_loss_after"] == pytest.approx(loss, rel=1e-9)
    assert last["confirmed"] or last["measured_on"] == ALL
    if factor < 1:  # not all of the three steps, the rest was behind them
        assert len(steps) == {"kl": 2, "until": 1}[size]
        assert 0.1 < last["scaled_by"] < 0.95
        [line] = said
        assert f"so the update is scaled by {last['scaled_by']:.4g}" in line
    else:
        assert [step["scaled_by"] for step in steps] == [1.0] * len(steps)
        assert not said


@pytest.mark.parametrize("size", [{"kl": 0.02}, {"until": 3.8}, {"alpha": 0.08}], ids=str)
def test_a_cap_holds_on_all_data_and_ends_the_run(monkeypatch, size):
    """A part sees a third of the KL, so the steps on the way go beyond the cap."""
    model = tiny_llama()
    misjudged(monkeypatch, 0.3)
    options = {"fit": KFAC(), "steps": 4, "refit": False, **size}
    free = kfade.unlearn(model, **MANY, **flat(**options))
    assert measured_kl(model, make_batches(MANY["held_out"]), free) > 0.0105
    capped = kfade.unlearn(model, **MANY, **flat(**options, max_kl=0.01))
    kl = measured_kl(model, make_batches(MANY["held_out"]), capped)
    # As near to the cap as a KL is met, and not above it.
    assert (1 - 2 * KL_TOLERANCE) * 0.01 < kl <= 0.01
    assert capped.provenance["steps"][-1]["ended"]


@pytest.mark.parametrize("correction", [0, 1], ids=["plain", "corrected"])
def test_a_run_that_ended_before_its_last_step_goes_on_no_more(monkeypatch, correction):
    """Whatever was measured at its end: it may be below the size, as where the KL jumps."""
    model, kept = tiny_llama(), []
    misjudged(monkeypatch, 0.3)
    options = {"fit": KFAC(), "steps": 3, "refit": False, "kl": 0.01}
    options["correction"] = kfade.Correction(correction)
    update = kfade.unlearn(model, **MANY, **flat(**options, on_step=kept.append))
    steps = update.provenance["steps"]
    assert [step["ended"] for step in steps] == [False, True]
    assert kept[-1].provenance == update.provenance
    last = {**steps[-1], "retain_kl": 0.001}  # far below the size
    start = Update(update.deltas, {**update.provenance, "steps": [steps[0], last]})
    again = kfade.unlearn(model, **MANY, **flat(**options, start=start))
    assert again.provenance["steps"] == start.provenance["steps"]
    # From the step before, as after an interruption, it ends in the same place.
    resumed = kfade.unlearn(model, **MANY, **flat(**options, start=kept[0]))
    assert resumed.provenance["steps"][-1]["retain_kl"] == steps[-1]["retain_kl"]


def test_a_run_that_went_too_far_and_cannot_meet_its_size_stays_within_it(monkeypatch):
    """As where tokens change their experts: the KL jumps over the size."""
    model, whole = tiny_llama(), Gauge.measure
    update = kfade.unlearn(model, **MANY, **flat(fit=KFAC(), kl=0.02))

    def jumping(self, update, objective, alpha=0.0):
        found = whole(self, update, objective, alpha)
        kl = found.retain_kl
        return replace(found, retain_kl=0.0112 if kl > 0.004 else kl / 2)

    monkeypatch.setattr(Gauge, "measure", jumping)
    gauge = Gauge(model, make_batches(MANY["held_out"]), make_batches(MANY["forget"]))
    gauges = Gauges(gauge, gauge, gauge.measure(Update({}), cross_entropy), 1)
    [step] = update.provenance["steps"]
    beyond = Update(update.deltas, {"steps": [{**step, "measured_on": {}}]})
    [ended] = gauges.settled(beyond, cross_entropy, StepSize(kl=0.01)).provenance["steps"]
    # 0.0112 is nearer to 0.01, but beyond it. 0.002: half of 0.004, where the KL jumps.
    assert ended["retain_kl"] == pytest.approx(0.002, rel=1e-2)
    assert 0.3 < ended["scaled_by"] < 0.6  # about the square root of 0.004 / 0.02


def scaled(kl_of, loss_of, **size) -> tuple[float, float, float]:
    """(factor, KL, rise of the loss) of a run that ended at a factor of 1 of these two, settled."""

    def measure(update: Update, _, alpha: float) -> Probe:
        c = update.deltas["w"].item()
        return Probe(alpha, kl_of(c), loss_of(c), math.exp(-loss_of(c)), 0.0)

    whole = SimpleNamespace(sequences={"forget": 1, "held_out": 1}, measure=measure)
    end = {"forget_loss_before": loss_of(0), "forget_loss_after": loss_of(1)}
    end |= {f"forget_probability_{when}": 0.1 for when in ("before", "after")}
    end |= {"retain_kl": kl_of(1), "measured_on": whole.sequences}
    gauges = Gauges(whole, whole, Probe(0.0, 0.0, loss_of(0), 1.0, 0.0), 1)
    beyond = Update({"w": torch.ones(1)}, {"steps": [end]})
    [last] = gauges.settled(beyond, cross_entropy, StepSize(**size)).provenance["steps"]
    rise = last["forget_loss_after"] - loss_of(0)
    return last.get("scaled_by", 1.0), last["retain_kl"], rise


def test_a_run_comes_back_to_each_of_its_limits():
    def line(c: float) -> float:
        return 1 + 3 * c

    assert scaled(lambda c: c**2, line, kl=1.0, max_rise=4.0) == (1.0, 1.0, 3.0)
    factor, kl, rise = scaled(lambda c: 2 * c**2, line, kl=1.0, max_rise=4.0)
    assert (kl, rise) == pytest.approx((1.0, 3 * factor), rel=0.1)
    factor, kl, rise = scaled(lambda c: 2 * c**2, line, kl=1.0, max_rise=1.0)
    assert (factor, rise) == pytest.approx((1 / 3, 1.0), rel=0.03)
    # As on real text: the KL of all data is twenty times the size.
    factor, kl, _ = scaled(lambda c: 0.8 * c**5, line, kl=0.04)
    assert (factor, kl) == pytest.approx(((0.04 / 0.8) ** 0.2, 0.04), rel=0.1)
    for broken in (math.inf, math.nan):
        _, kl, _ = scaled(lambda c, end=broken: 2 * c**2 if c < 0.9 else end, line, kl=1.0)
        assert kl == pytest.approx(1.0, rel=0.1)


def test_the_way_back_is_told_of_while_it_is_searched():
    told: list[str] = []
    reporter = SimpleNamespace(
        start=lambda name, total: told.append(f"start {name}") or 7,
        stop=lambda task: told.append(f"stop {task}"),
        say=told.append,
    )
    with reporting(reporter):
        scaled(lambda c: 2 * c**2, lambda c: 1 + 3 * c, kl=1.0)
    assert told[:2] == [f"start {SEARCH}", "stop 7"]
    [said] = told[2:]
    assert said.startswith("the steps went too far, so the update is scaled by 0.7")


def test_the_way_back_is_never_one_forward():
    """A loss that rises late, and falls again beyond the end of the run."""

    def late(c: float) -> float:
        return 1 + (6 * c**12 if c <= 1 else 6 / c**6)

    factor, _, rise = scaled(lambda c: c**2, late, until=4.0)
    assert 0.9 < factor < 1
    assert rise == pytest.approx(3.0, rel=0.03)


def test_a_rise_that_a_part_misjudges_ends_within_its_cap_all_the_same(monkeypatch):
    model = tiny_llama()
    misjudged(monkeypatch, 0.15)
    options = {"fit": KFAC(), "steps": 4, "refit": False, "kl": 1.0}
    update = kfade.unlearn(model, **MANY, **flat(**options, max_rise=0.3))
    steps = update.provenance["steps"]
    first, last = steps[0], steps[-1]
    assert last["forget_loss_after"] - first["forget_loss_before"] == pytest.approx(0.3, rel=0.03)
    assert last["scaled_by"] < 0.9
    assert "of at most 0.3" in last["ended_by"]


def test_a_target_that_is_reached_already_is_refused():
    model = tiny_llama()
    start, _ = forgetting(model, MANY["forget"])
    with pytest.raises(InputError, match=r"the loss is .* already; ask for more"):
        kfade.unlearn(model, **MANY, **flat(fit=KFAC(), steps=3, until=start - 0.1))
