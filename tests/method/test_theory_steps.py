"""What steps, objectives, step sizes and runs must do in theory.

As in test_theory.py, each test also shows the wrong version failing.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from helpers import flat, measured_kl, random_sequences, relative_error, same_bits, tiny_llama
from oracles import loops

import kfade
from kfade import (
    EKFAC,
    KFAC,
    Damping,
    InputError,
    Update,
    cross_entropy,
    make_batches,
    margin,
)
from kfade.curvature.block import EigenBlock
from kfade.curvature.eigh import eigendecompose
from kfade.curvature.factors import CovarianceSum
from kfade.method.gauge import Gauge, parameter_changes
from kfade.method.gradient import forget_gradient
from kfade.method.measure import divergence
from kfade.method.objectives import BoundedMargin
from kfade.method.search import Probe, UnreachedError
from kfade.method.settings import DEFAULT_BOUND, DEFAULT_NOISE
from kfade.method.size import NoRiseError, StepSize, choose_alpha, where_most_is_forgotten
from kfade.method.step import gauss_newton_step

OBJECTIVES = (margin, cross_entropy, BoundedMargin(2.0))


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- 6. On least squares, one step is retraining ------------------------------------------------


def test_one_step_on_least_squares_is_retraining_without_the_forget_rows():
    """Guo et al. 2019: W + H_r⁻¹ ∇L_f is the minimiser without the forget rows, if H is theirs.

    Outputs are Gaussian, so G = I ⊗ XᵀX/n; the objective is the forget rows' squared loss.
    """
    x, y, forget = randn(40, 6), randn(40, 3, seed=1), 8
    x_forget, y_forget, x_retain, y_retain = x[:forget], y[:forget], x[forget:], y[forget:]
    trained = torch.linalg.lstsq(x, y).solution.T
    retrained = torch.linalg.lstsq(x_retain, y_retain).solution.T
    assert relative_error(trained, retrained) > 0.1  # there is something to forget
    # Mean per retain row, as G is: the sums' scales cancel in G⁻¹g.
    gradient = (x_forget @ trained.T - y_forget).T @ x_forget / len(x_retain)

    def step(rows, scale: float = 1.0) -> torch.Tensor:
        covariance = CovarianceSum(6, torch.float64, rows.device)
        covariance.add(rows)
        values, q_in = eigendecompose(covariance.mean(len(x_retain)), "A")
        return trained + scale * EigenBlock(None, q_in, values.expand(3, 6)).solve(gradient, 0.0)

    # 1e-10: the condition of XᵀX is below 100, so rounding stays far under.
    assert relative_error(step(x_retain), retrained) < 1e-10
    assert relative_error(step(x), retrained) > 1e-2  # the forget rows in the Hessian
    assert relative_error(step(x_retain, scale=0.9), retrained) > 1e-2  # not all the way
    assert relative_error(step(x_retain, scale=-1.0), retrained) > 0.1  # downhill
    # With the forget rows in, the step is too short, but better than none.
    assert (step(x) - trained).norm() < (step(x_retain) - trained).norm()


# --- 8. Signs, predictions, and the margin ------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("fit", [KFAC, EKFAC])
def test_a_small_step_forgets_and_its_change_is_predicted(model, batches, targets, fit, objective):
    forget = random_sequences(3, seed=7)
    gradient = forget_gradient(model, make_batches(forget), targets, objective)
    curvature = fit().fit(model, batches, targets)
    step = gauss_newton_step(curvature, gradient, damping=Damping())
    assert curvature.quadratic(step.direction) == pytest.approx(1.0)
    assert step.predicted_kl(0.2) == pytest.approx(0.5 * 0.2**2)
    changes = parameter_changes(targets, step.direction)

    def after(alpha: float, what) -> float:
        with Update({}).plus(changes, alpha).applied_to(model):
            return loops.mean_objective(model, forget, what).item()

    # Cross-entropy is minus the mean log-probability of the targets.
    loss, value = after(0.0, cross_entropy), after(0.0, objective)
    assert after(1e-3, cross_entropy) > loss > after(-1e-3, cross_entropy)
    # Curvature of the objective makes an error linear in α, α / 10 a tenth of it.
    off = {
        alpha: abs((after(alpha, objective) - value) / (step.slope * alpha) - 1)
        for alpha in (3.0, 1e-3, 1e-4)
    }
    assert off[3.0] > 0.1
    assert off[1e-4] < min(1e-2, 0.2 * off[1e-3])


def test_the_margin_of_the_papers_text_would_raise_the_target(model, targets):
    """Its ℓ = z_y − log Σ_{i≠y} exp z_i, ascended as printed, teaches what it should remove."""
    forget = random_sequences(3, seed=7)
    before = loops.mean_objective(model, forget, cross_entropy)
    for objective, sign in ((margin, 1), (lambda z, y: -margin(z, y), -1)):
        gradient = forget_gradient(model, make_batches(forget), targets, objective)
        changes = parameter_changes(targets, gradient)
        with Update({}).plus(changes, 1e-3).applied_to(model):
            after = loops.mean_objective(model, forget, cross_entropy)
        assert sign * (after - before) > 0


def test_forget_gradient_is_autograds_mean_per_loss_token(model, targets):
    sequences = random_sequences(5, seed=7)
    loss_tokens = sum(s.loss_tokens for s in sequences)
    for objective in OBJECTIVES:
        mean = loops.mean_objective(model, sequences, objective)
        looped = loops.weight_gradients(mean, model, targets)
        ours = forget_gradient(model, make_batches(sequences, budget=15), targets, objective)
        for name in looped:
            assert relative_error(ours[name], looped[name]) < 1e-11  # another order of sums
            assert relative_error(ours[name], loss_tokens / 5 * looped[name]) > 1e-2


def test_margin_equals_its_formula_and_its_gradient_keeps_its_size():
    """∇ce = (1 − p_y) ∇margin, and ∇margin is −1 at y whatever p_y is."""
    z, target = 3 * randn(6, 9), torch.arange(6)
    z[:3, :3] += 10 * torch.eye(3)  # three targets nearly certain
    logits = z.clone().requires_grad_()
    for row, y in enumerate(target.tolist()):
        others = torch.cat([z[row, :y], z[row, y + 1 :]])
        assert margin(z, target)[row] == pytest.approx((others.logsumexp(0) - z[row, y]).item())
    by_margin = torch.autograd.grad(margin(logits, target).sum(), logits)[0]
    by_ce = torch.autograd.grad(cross_entropy(logits, target).sum(), logits)[0]
    p_y = z.softmax(1).gather(1, target[:, None])
    assert relative_error(by_ce, (1 - p_y) * by_margin) < 1e-12  # rounding of a few operations
    assert relative_error(by_ce, by_margin) > 0.1
    at_y = by_margin.gather(1, target[:, None])
    assert relative_error(at_y, -torch.ones_like(at_y)) < 1e-12


@pytest.mark.parametrize("limit", [-1.0, 0.0, 3.0])
def test_a_bounded_margin_lets_go_of_a_token_beyond_its_limit(limit):
    """Its gradient is σ(limit − m) times the margin's, and that of log(1 − p_y) at limit 0."""
    z, target = 3 * randn(8, 9), torch.arange(8)
    z[:4, :4] += 20 * torch.eye(4)  # four targets nearly certain
    z[4, 4] -= 40  # and one forgotten
    logits = z.clone().requires_grad_()
    m = margin(z, target)
    by_margin = torch.autograd.grad(margin(logits, target).sum(), logits)[0]
    bounded = BoundedMargin(limit)
    by_bounded = torch.autograd.grad(bounded(logits, target).sum(), logits)[0]
    part = (1 / (1 + (m - limit).exp()))[:, None]
    # 1e-12: rounding of a few operations.
    assert relative_error(by_bounded, part * by_margin) < 1e-12
    assert by_bounded[4].abs().max() < 1e-12
    assert by_margin[4].abs().max() > 0.1  # it pulls on
    assert relative_error(by_bounded[:4], by_margin[:4]) < 0.05  # certain tokens: the same pull
    p_y = z.softmax(1).gather(1, target[:, None])[:, 0]
    unlikelihood = torch.log1p(-p_y)
    assert (relative_error(bounded(z, target), unlikelihood) < 1e-6) == (limit == 0)
    assert relative_error(BoundedMargin(1e4)(z, target) + 1e4, m) < 1e-9


def test_margin_is_exact_where_the_target_is_certain():
    """A gap of 60 in float32: p_y rounds to 1, and log p − log1p(−p) is infinite."""
    logits = torch.tensor([[60.0, 0.0, 1.0, -2.0]], requires_grad=True)
    target = torch.tensor([0])
    exact = logits.detach().double()[0, 1:].logsumexp(0) - 60.0
    log_p = logits.detach().log_softmax(1)[0, 0]
    naive = -(log_p - torch.log1p(-log_p.exp()))
    assert torch.isinf(naive)
    assert torch.autograd.grad(cross_entropy(logits, target).sum(), logits)[0][0, 0] == 0.0
    value = margin(logits, target)
    assert value.item() == pytest.approx(exact.item(), rel=1e-6)  # float32 rounds at 6e-8
    gradient = torch.autograd.grad(value.sum(), logits)[0][0]
    expected = torch.cat([-torch.ones(1), logits.detach()[0, 1:].softmax(0)])
    assert torch.allclose(gradient, expected, atol=1e-6)


def test_a_direction_of_no_length_is_refused(model, batches, targets):
    zero = {t.name: torch.zeros(t.shape, dtype=torch.float64) for t in targets}
    curvature = KFAC().fit(model, batches, targets)
    with pytest.raises(InputError, match="the forget gradient is zero in all targeted weights"):
        gauss_newton_step(curvature, zero, damping=Damping())
    broken = {name: torch.full_like(matrix, math.nan) for name, matrix in zero.items()}
    with pytest.raises(InputError, match="squared length in the G-norm is nan"):
        gauss_newton_step(curvature, broken, damping=Damping())


# --- 12. Runs repeat, and resume ----------------------------------------------------------------


def run(model, **changes):
    data = {
        "forget": random_sequences(4, seed=7),
        "retain": random_sequences(6, seed=8),
        "held_out": random_sequences(3, seed=9),
    }
    return kfade.unlearn(model, **flat(**{**data, "kl": 0.01, "batch_tokens": 20, **changes}))


def same_update(one: Update, other: Update) -> bool:
    assert one.deltas.keys() == other.deltas.keys()
    return all(same_bits(delta, other.deltas[name]) for name, delta in one.deltas.items())


def test_a_seed_gives_one_update_and_another_seed_another(model):
    first = run(model, seed=3)
    assert same_update(first, run(model, seed=3))
    assert first.provenance == run(model, seed=3).provenance
    assert not same_update(first, run(model, seed=4))
    # A model of the same weights built anew gives the same update too.
    assert same_update(first, run(tiny_llama(), seed=3))
    assert not same_update(first, run(tiny_llama(seed=1), seed=3))


@pytest.mark.parametrize("refit", [True, False])
@pytest.mark.parametrize("size", [{"kl": 0.01}, {"kl": None, "alpha": 0.1}], ids=["kl", "alpha"])
def test_a_resumed_run_equals_an_uninterrupted_one(model, tmp_path, refit, size):
    options = {"fit": EKFAC(), "steps": 2, "forget_batch": 2, "refit": refit, **size}
    saved = []

    def save(update):
        saved.append(tmp_path / f"{len(saved)}.safetensors")
        update.save(saved[-1])

    whole = run(model, on_step=save, **options)
    assert len(saved) == len(whole.provenance["steps"]) == 2
    halfway = Update.load(saved[0])
    assert not same_update(whole, halfway)
    resumed = run(model, start=halfway, **options)
    assert same_update(whole, resumed)
    assert resumed.provenance == whole.provenance
    restarted = run(model, start=Update(halfway.deltas, {**halfway.provenance, "steps": []}),
                    **options)  # fmt: skip
    assert not same_update(whole, restarted)


def test_every_step_draws_labels_of_its_own(model):
    seen = []

    def noted(p_NV, key_N):
        seen.append(set(key_N.tolist()))
        return kfade.square_root_draw(p_NV, key_N)

    run(model, fit=EKFAC(noted), steps=2, batch_tokens=1000)
    assert len(seen) == 4  # two passes of EK-FAC a step, one batch a pass
    assert len(set.union(*seen)) == sum(map(len, seen))
    run(model, fit=EKFAC(noted), steps=1, batch_tokens=1000)
    assert seen[4:] == seen[:2]  # the same keys would have shown


def test_a_run_meets_its_kl_and_records_what_it_did(model):
    update = run(model, kl=0.01, steps=2)
    first, last = update.provenance["steps"]
    assert last["retain_kl"] == pytest.approx(0.01, rel=0.1)  # the tolerance of the search
    assert first["retain_kl"] < 0.5 * last["retain_kl"]
    held_out = make_batches(random_sequences(3, seed=9))
    assert measured_kl(model, held_out, update) == pytest.approx(last["retain_kl"])
    assert measured_kl(model, held_out, Update({})) == 0.0
    assert last["forget_loss_after"] > first["forget_loss_before"]
    assert run(model, kl=0.01, max_kl=0.005).provenance["steps"][0]["retain_kl"] <= 0.005


def test_settings_left_out_are_steps_by_the_margin_to_a_hundredth_of_a_nat(model):
    sets = {name: random_sequences(4, seed=i) for i, name in enumerate(("forget", "retain"))}
    sets["held_out"] = random_sequences(3, seed=9)
    update = kfade.unlearn(model, **sets)
    *_, step = update.provenance["steps"]
    assert step["retain_kl"] == pytest.approx(0.01, rel=0.1)
    told = {
        "objective": margin,
        "weigh_texts": True,
        "damping": None,
        "bands": 3,
        "bound": 0.0,  # of texts that are not known by heart
        "noise": 0.0,
        "kl": 0.01,
        "steps": kfade.Run.steps,
        "first_share": 0.5,  # the texts are not known by heart
        "refit": False,
        "correction": kfade.Correction(count=1),
        "seed": 0,
    }
    assert same_update(update, kfade.unlearn(model, **sets, **flat(**told)))
    spread = {"bound": DEFAULT_BOUND, "noise": DEFAULT_NOISE}
    bounded = kfade.unlearn(model, **sets, direction=kfade.Direction(bound=DEFAULT_BOUND))
    assert same_update(bounded, kfade.unlearn(model, **sets, **flat(**{**told, **spread})))
    for name, value in spread.items():
        other = kfade.unlearn(model, **sets, **flat(**{**told, name: value}))
        assert not any(same_update(other, made) for made in (update, bounded))
    assert not same_update(update, kfade.unlearn(model, **sets, **flat(damping=0.2)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: kfade.Run(steps=0), "--steps 0: give 1 or more"),
        (lambda: kfade.Direction(bound=math.inf), "--bound inf: give a positive, finite number"),
        (lambda: kfade.Direction(bound=math.nan), "--bound nan: give a positive, finite number"),
        (
            lambda: kfade.Direction(objective=cross_entropy, bound=2.0),
            "--bound 2 is of the margin",
        ),
        (lambda: kfade.Direction(refine=-1), "--refine -1: give 0 or more"),
        (lambda: kfade.Direction(refine_sequences=0), "--refine-sequences 0: give 1 or more"),
        (lambda: Damping(-1.0, relative=False), "--damping -1.0: give a finite number, 0 or more"),
        (lambda: Damping(math.nan), "--relative-damping nan: give a finite number"),
        (lambda: kfade.StepSize(), "give exactly one of alpha, kl and until"),
    ],
)
def test_settings_check_themselves(make, message):
    with pytest.raises(InputError, match=re.escape(message)):
        make()
    assert (kfade.Run(), kfade.Direction()) == (
        kfade.Run(steps=6, refit=False),
        kfade.Direction(damping=None),
    )


def test_a_bound_and_noise_are_the_default_of_several_steps_by_the_margin():
    size, papers = kfade.StepSize(kl=0.01), kfade.StepSize(alpha=0.01)

    def spread(
        size: kfade.StepSize, steps: int = 2, loss: float = 0.1, **options
    ) -> tuple[float, float]:
        direction = kfade.Direction(**options).decided(size, steps, loss)
        assert direction.decided(papers, 1, 9.0) == direction
        return direction.bound, direction.noise

    assert spread(size) == (DEFAULT_BOUND, DEFAULT_NOISE)
    assert spread(size, steps=1) == (0.0, 0.0)
    assert spread(size, steps=1, bound=3.0) == (3.0, DEFAULT_NOISE)
    assert spread(papers) == (0.0, 0.0)
    assert spread(papers, bound=3.0) == (3.0, DEFAULT_NOISE)
    assert spread(size, bound=0.0) == (0.0, 0.0)
    assert spread(size, noise=0.0) == (DEFAULT_BOUND, 0.0)
    assert spread(size, bound=0.0, noise=0.5) == (0.0, 0.5)
    assert spread(size, objective=cross_entropy) == (0.0, 0.0)
    later = spread(size, objective=cross_entropy, later_objective=margin)
    assert later == (DEFAULT_BOUND, DEFAULT_NOISE)
    assert spread(size, loss=math.log(2) - 1e-9) == (DEFAULT_BOUND, DEFAULT_NOISE)
    assert spread(size, loss=math.log(2)) == (0.0, 0.0)  # not known by heart
    assert spread(size, loss=3.0, bound=3.0) == (3.0, DEFAULT_NOISE)
    assert spread(size, loss=3.0, noise=0.5) == (0.0, 0.5)


def test_a_later_step_tries_first_how_far_the_last_one_went(model):
    records = run(model, kl=0.01, steps=3).provenance["steps"]
    for before, after in pairwise(records):
        part = after["probes"][0]["alpha"] / after["alpha"]
        assert after["exact_kl"] * part**2 == pytest.approx(before["exact_kl"])


def test_a_run_ends_where_its_objective_has_no_gradient_left(model, monkeypatch):
    """Each step goes further; from the second one on nothing is below the objective's limit."""

    def limited(logits_NV, target_N):
        return cross_entropy(logits_NV, target_N).clamp(max=2.5)

    with pytest.raises(InputError, match="the forget gradient is zero"):
        run(model, objective=lambda z, y: cross_entropy(z, y).clamp(max=0.1))
    kept: list[Update] = []
    said: list[str] = []
    monkeypatch.setattr("kfade.method.unlearn.say", said.append)
    far = {"fit": EKFAC(), "kl": None, "alpha": 3.0, "steps": 4, "refit": False}
    update = run(model, objective=limited, **far, on_step=kept.append)
    assert 1 <= len(update.provenance["steps"]) < 4
    assert same_update(update, kept[-1])
    number = len(kept)  # the end is told, too
    assert said == [f"step {number}: no gradient of the objective is left, so the run ends here"]


def test_a_run_to_a_kl_ends_where_a_step_would_forget_less(model, monkeypatch):
    """Its later objective teaches the forget set: a step by it to the KL would undo the first."""
    said: list[str] = []
    monkeypatch.setattr("kfade.method.unlearn.say", said.append)

    def teaches(logits_NV, target_N):
        return -cross_entropy(logits_NV, target_N)

    with pytest.raises(
        InputError, match=r"--kl 0\.01: no length of the step raises the forget loss"
    ):
        run(model, objective=teaches)
    options = {"objective": margin, "steps": 3, "refit": False}
    whole = run(model, **options, on_step=(kept := []).append)
    update = run(model, **options, later_objective=teaches)
    assert [len(u.provenance["steps"]) for u in (update, whole)] == [1, 3]
    assert same_update(update, kept[0])
    assert said == ["step 2: no length of it raises the forget loss, so the run ends here"]


def test_a_run_ends_where_no_length_of_a_later_step_has_its_size(model, monkeypatch):
    """The measured KL rises to 0.004 and no further: two of three steps to 0.01 can be met."""
    said: list[str] = []
    monkeypatch.setattr("kfade.method.unlearn.say", said.append)
    options = {"kl": 0.01, "steps": 3, "refit": False}
    whole = run(model, **options, on_step=(kept := []).append)
    assert (len(whole.provenance["steps"]), said) == (3, [])
    measure = Gauge.measure

    def limited(*arguments, **more) -> Probe:
        found = measure(*arguments, **more)
        return replace(found, retain_kl=min(found.retain_kl, 0.004))

    monkeypatch.setattr(Gauge, "measure", limited)
    update = run(model, **options)
    *_, last = update.provenance["steps"]
    assert len(update.provenance["steps"]) == 2
    assert same_update(update, kept[1])
    [why] = said
    assert why == f"step 3: {last['ended_by']}, so the run ends here"
    assert re.fullmatch(
        r"step 3: --kl 0\.01 cannot be reached in one step \(at alpha [^ ]+: added KL 0\), so the "
        "run ends here",
        why,
    )
    with pytest.raises(UnreachedError, match=r"--kl 0\.01 cannot be reached in one step"):
        run(model, **{**options, "steps": 1})


def test_a_step_to_a_kl_is_no_longer_than_it_forgets(model, monkeypatch):
    """Of a random model the forget loss rises and then falls: at a KL of 1 nat it is lower than on
    the way. Without the look back the step goes all the way."""
    said: list[str] = []
    monkeypatch.setattr("kfade.method.trial.say", said.append)
    options = {"objective": margin, "kl": 1.0, "steps": 1}
    [step] = run(model, **options).provenance["steps"]
    monkeypatch.setattr(
        "kfade.method.trial.where_most_is_forgotten", lambda _, probes, *__, **___: probes
    )
    [far] = run(model, **options).provenance["steps"]
    assert far["retain_kl"] == pytest.approx(1.0, rel=0.1)
    assert far["forget_loss_after"] < step["forget_loss_after"]
    assert far["retain_kl"] > step["retain_kl"]
    assert said == [
        f"the step ends at a retain KL of {step['retain_kl']:.2e} nats/token: at "
        f"{far['retain_kl']:.2e} it would forget less"
    ]


def test_a_bound_is_of_the_forget_loss_before_each_step(model):
    options = {"steps": 3, "refit": False}
    run(model, on_step=(kept := []).append, bound=2.0, **options)
    start, after = None, run(model, on_step=(free := []).append, **options)
    for index, ours in enumerate(kept):
        loss = ours.provenance["steps"][index]["forget_loss_before"]
        objective = BoundedMargin(2.0 * loss)
        run(model, on_step=(by_hand := []).append, start=start, objective=objective, **options)
        assert same_update(ours, by_hand[0])
        # What a step has done to its objective is measured by that step's own.
        changes = {
            u.provenance["steps"][index]["measured_objective_change"] for u in (ours, by_hand[0])
        }
        assert len(changes) == 1
        start = ours
    assert not same_update(kept[-1], after)
    assert not same_update(kept[0], free[0])


def test_a_later_objective_is_that_of_every_step_but_the_first(model):
    options = {"steps": 3, "refit": False}
    run(model, on_step=(firsts := []).append, objective=margin, **options)
    by_hand = run(model, start=firsts[0], objective=cross_entropy, **options)
    update = run(model, objective=margin, later_objective=cross_entropy, **options)
    for name, delta in update.deltas.items():
        assert same_bits(delta, by_hand.deltas[name])
        assert not same_bits(delta, firsts[-1].deltas[name])
    assert update.provenance["steps"] == by_hand.provenance["steps"]  # measured by it, too
    last = update.provenance["steps"][-1]
    rise = last["forget_loss_after"] - last["forget_loss_before"]
    assert last["measured_objective_change"] == pytest.approx(rise)  # so it is of cross-entropy
    last = firsts[-1].provenance["steps"][-1]
    rise = last["forget_loss_after"] - last["forget_loss_before"]
    assert last["measured_objective_change"] != pytest.approx(rise)


def test_a_run_meets_its_forgetting_target(model):
    """Measured here text by text, not as the run does."""
    update = run(model, kl=None, until_probability=0.02, steps=2)

    def mean_probability() -> float:
        found = []
        for sequence in random_sequences(4, seed=7):
            [batch] = make_batches([sequence])
            with torch.no_grad():
                logits = model(batch.input_BT).logits[batch.loss_BT]
            loss = torch.nn.functional.cross_entropy(logits, batch.target_BT[batch.loss_BT])
            found.append(math.exp(-loss))
        return sum(found) / len(found)

    first, last = update.provenance["steps"]
    start = mean_probability()
    assert first["forget_probability_before"] == pytest.approx(start)
    with update.applied_to(model):
        end = mean_probability()
    assert last["forget_probability_after"] == pytest.approx(end)
    way = math.log(first["forget_probability_after"] / 0.02)  # of the last step
    assert abs(math.log(end / 0.02)) < 0.03 * way
    assert end < first["forget_probability_after"] < start
    with pytest.raises(InputError, match=r"forget_probability=0\.5: .* already"):
        run(model, kl=None, until_probability=0.5)


# --- 13. The search for the size of a step ------------------------------------------------------


def rising(alpha: float) -> float:
    return 1.0 + alpha


START = Probe(
    alpha=0.0, retain_kl=0.0, forget_loss=1.0, forget_probability=math.exp(-0.5), objective=0.0
)
SHAPES = {
    "quadratic": lambda a: a**2,
    "steeper": lambda a: a**2 + 50 * a**4,
    "flatter": lambda a: math.log1p(a**2),
    "with a knee": lambda a: 1e-3 * a if a < 0.5 else 5e-4 + (a - 0.5) * 3,
    "not finite beyond 2": lambda a: 0.3 * a**2 if a < 2 else math.nan,
    "infinite beyond 2": lambda a: 0.3 * a**2 if a < 2 else math.inf,
}


def search(
    shape, size: StepSize, *, guess=0.1, share=1.0, start=START, first=None, loss=rising
) -> list[Probe]:
    def probe(alpha: float) -> Probe:
        kl = start.retain_kl + shape(alpha)
        nats = loss(alpha)  # of the mean probability half as many, as where texts differ
        found = replace(start, alpha=alpha, retain_kl=kl, forget_loss=nats)
        return replace(found, forget_probability=math.exp(min(0, -nats / 2)))

    return choose_alpha(probe, size, share=share, start=start, first=first, guess=guess)


@pytest.mark.parametrize("guess", [1e-6, 1e-2, 1.0, 1e6])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_search_meets_the_kl_within_a_tenth(shape, guess):
    for aim in (0.02, 1.0):
        probes = search(shape, StepSize(kl=aim), guess=guess)
        assert probes[-1].retain_kl == pytest.approx(aim, rel=0.1)
    # The first guess alone would not do.
    assert search(shape, StepSize(alpha=guess))[-1].retain_kl != pytest.approx(0.02, rel=0.1)


def test_search_of_a_quadratic_needs_two_probes():
    assert len(search(lambda a: a**2, StepSize(kl=0.02), guess=1.0)) == 2
    assert len(search(SHAPES["with a knee"], StepSize(kl=0.02), guess=1.0)) > 2


@pytest.mark.parametrize(
    "shape",
    [lambda a: 1.1 * a / (1 + a), lambda a: 1 - math.exp(-a), lambda a: a**3 / (1 + a**2)],
    ids=["saturating", "exponential", "cubic at first"],
)
@pytest.mark.parametrize("guess", [0.1, 1.0])
def test_search_learns_the_power_that_a_measure_follows(shape, guess):
    # By the square root of what is missing every time it takes 6 to 11.
    assert len(search(shape, StepSize(kl=0.02), guess=guess)) <= 4


def test_a_part_of_the_way_aims_at_its_share():
    """KL grows with the square of the way: half the steps, a quarter of it; losses by half."""
    part = search(lambda a: a**2, StepSize(kl=0.04), share=0.5)[-1]
    assert part.retain_kl == pytest.approx(0.01, rel=0.1)
    part = search(lambda a: a**2, StepSize(until=3.0), share=0.5)[-1]
    assert part.forget_loss == pytest.approx(2.0, abs=0.03 * 1.0)  # 3 % of the rise of 1


def test_a_share_is_of_the_way_that_is_left():
    """From 0.01, half the way to 0.09 in sqrt(KL): from 0.1 to 0.2 of 0.3. Loss: from 2 to 2.5."""
    begun = replace(START, retain_kl=0.01, forget_loss=2.0)
    further = {"share": 0.5, "start": begun}
    part = search(lambda a: a**2, StepSize(kl=0.09), **further)[-1]
    assert part.retain_kl == pytest.approx(0.04, abs=0.2 * 0.03)  # a fifth of what is added
    part = search(lambda a: a**2, StepSize(until=3.0), loss=lambda a: 2 + a, **further)[-1]
    assert part.forget_loss == pytest.approx(2.5, abs=0.2 * 0.5)


def test_on_the_way_a_fifth_less_or_a_fifth_more_will_do():
    near = 0.109  # 1.19 of the KL aimed at
    assert len(search(lambda a: a**2, StepSize(kl=0.04), share=0.5, guess=near)) == 1
    assert len(search(lambda a: a**2, StepSize(kl=0.01), share=1.0, guess=near)) == 2
    assert len(search(lambda a: a**2, StepSize(kl=0.04), share=0.5, guess=2 * near)) == 2


def most(loss, size: StepSize, **options) -> list[Probe]:
    """What a step ends with: the KL is α², and the forget loss ``loss`` of α."""
    probes = search(lambda a: a**2, size, loss=loss, **options)
    made: list[Probe] = []

    def probe(alpha: float) -> Probe:
        made.append(replace(START, alpha=alpha, retain_kl=alpha**2, forget_loss=loss(alpha)))
        return made[-1]

    start = replace(START, alpha=7.0, forget_loss=loss(0.0))  # the last step's α
    found = where_most_is_forgotten(probe, probes, size, share=1.0, start=start, first=START)
    assert found == [*probes, *made]
    return found


@pytest.mark.parametrize("peak", [0.02, 0.1, 0.6])
def test_a_step_to_a_kl_ends_where_most_is_forgotten(peak):
    """The loss rises to 2 at the peak, to fall below its start beyond twice the peak. At 0.6 it is
    above it at the KL, but below a shorter trial."""

    def loss(a: float) -> float:
        return 2 - (a / peak - 1) ** 2

    last = most(loss, StepSize(kl=1.0), guess=0.7)[-1]
    # The best of x, x/2, x/4, ... is from 2/3 to 4/3 of the peak: 8/9 of the rise or more.
    assert last.forget_loss >= 1 + 8 / 9
    assert last.alpha < 0.9
    # A target of forgetting is met as ever, and so is a norm.
    assert most(loss, StepSize(until=1.5), guess=peak / 3)[-1].forget_loss == pytest.approx(
        1.5, abs=0.02
    )
    assert most(loss, StepSize(alpha=1.0))[-1].alpha == 1.0


def test_a_step_that_forgets_more_and_more_goes_to_its_kl_without_another_trial():
    plain = search(lambda a: a**2, StepSize(kl=1.0))
    assert most(rising, StepSize(kl=1.0)) == plain
    assert plain[-1].retain_kl == pytest.approx(1.0, rel=0.1)


def test_a_step_that_forgets_less_at_every_length_is_an_error_that_tells_the_losses():
    message = r"--kl 1: no length of the step raises the forget loss \(before it 1 nats, at the KL "
    with pytest.raises(NoRiseError, match=message + "asked for 0, at 0.00024 nats of KL 0.9844"):
        most(lambda a: 1 - a, StepSize(kl=1.0), guess=1.0)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_step_to_a_kl_raises_the_forget_loss_no_more_than_it_may(shape):
    """The loss is 1 + α. Each step takes its share of the rise that is left."""
    free, capped = StepSize(kl=1.0), StepSize(kl=1.0, max_rise=0.25)
    assert search(shape, free)[-1].forget_loss > 1.3
    assert search(shape, capped)[-1].forget_loss == pytest.approx(1.25, abs=0.03 * 0.25)
    first = search(shape, capped, share=0.25)[-1]
    assert first.forget_loss == pytest.approx(1.0625, abs=0.2 * 0.0625)
    half = replace(START, forget_loss=1.125)
    options = {"first": START, "loss": lambda a: 1.125 + a}
    later = search(shape, capped, share=0.5, start=half, **options)[-1]
    assert later.forget_loss == pytest.approx(1.1875, abs=0.2 * 0.0625)
    # What rises less goes to the KL as ever; so do sizes that are no KL.
    assert search(shape, replace(capped, max_rise=1e9)) == search(shape, free)
    assert search(shape, StepSize(until=1.5, max_rise=0.25))[-1].forget_loss > 1.48
    with pytest.raises(UnreachedError, match=r"at most 0.25 nats leaves no further step: ask for"):
        search(shape, capped, start=replace(START, forget_loss=1.247), **options)


@pytest.mark.parametrize("peak", [0.2, 0.6])
def test_a_loss_that_rises_and_falls_on_the_way_to_a_kl_stays_within_its_rise(peak):
    """It rises by 1 nat to its peak; at the KL it is below 0.25 again, or just above the start."""

    def loss(a: float) -> float:
        return 2 - (a / peak - 1) ** 2

    size = StepSize(kl=(1.95 * peak) ** 2, max_rise=0.25)
    assert most(loss, replace(size, max_rise=9.0), guess=peak)[-1].forget_loss > 1.8
    last = most(loss, size, guess=peak)[-1]
    assert 1.1 < last.forget_loss <= 1.25 * (1 + 0.03)
    assert last.alpha < peak


def test_a_step_of_which_every_trial_forgets_too_much_is_shortened():
    """At the KL the loss is below its start, at all the halves that are tried beyond its rise."""

    def loss(a: float) -> float:
        return 1 + 4 * (1 - (a / 0.3 - 1) ** 2)

    last = most(loss, StepSize(kl=1.0, max_rise=0.25), guess=1.0)[-1]
    assert loss(1.0) < 1 < loss(2.0**-6) - 0.25 * 1.03
    assert last.forget_loss == pytest.approx(1.25, abs=0.03 * 0.25)


def test_a_kl_that_is_out_of_reach_does_not_keep_a_step_from_its_rise():
    def saturates(a: float) -> float:
        return 0.01 * math.tanh(a)

    capped = search(saturates, StepSize(kl=0.02, max_rise=2.0))
    assert capped[-1].forget_loss == pytest.approx(3.0, abs=0.03 * 2)
    with pytest.raises(UnreachedError, match=r"--kl 0\.02 cannot be reached"):
        search(saturates, StepSize(kl=0.02, max_rise=2.0), loss=lambda a: 2 - math.exp(-a))


def test_a_run_to_a_kl_ends_where_its_rise_is_used_up(model, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr("kfade.method.unlearn.say", said.append)

    ends: list[str] = []

    def rises(**changes) -> list[float]:
        update = run(model, **{"kl": 1.0, "steps": 4, "refit": False, **changes})
        steps = update.provenance["steps"]
        ends.append(steps[-1]["ended_by"])
        return [step["forget_loss_after"] - steps[0]["forget_loss_before"] for step in steps]

    free = rises()
    assert not said
    assert free[-1] > 1.5
    even = rises(max_rise=0.6)
    assert even == pytest.approx([0.15, 0.3, 0.45, 0.6], abs=0.05)  # a third of a step
    assert said == [
        "the forget loss has risen by 0.6 nats/token, of at most 0.6, so the run ends here"
    ]
    assert ends == ["", said[0].removesuffix(", so the run ends here")]
    assert rises(max_rise=math.inf) == free
    # A token that was certain may become as likely as any.
    assert StepSize(kl=1.0).decided(17) == StepSize(kl=1.0, max_rise=math.log(17))
    for decided in (StepSize(kl=1.0, max_rise=2.0), StepSize(until=3.0), StepSize(alpha=0.1)):
        assert decided.decided(17) == decided


@pytest.mark.parametrize("guess", [1e-6, 1.0, 1e6])
def test_search_reaches_a_forgetting_target(guess):
    losses = (lambda a: 1 + a, lambda a: 1 + 4 * a**3 / (1 + a**3), lambda a: 1 + a**2)
    for loss in losses:
        last = search(lambda a: a**2, StepSize(until=2.5), guess=guess, loss=loss)[-1]
        assert last.forget_loss == pytest.approx(2.5, abs=0.03 * 1.5)
        size = StepSize(until_probability=math.exp(-2))
        last = search(lambda a: a**2, size, guess=guess, loss=loss)[-1]
        assert last.forget_probability == pytest.approx(math.exp(-2), rel=math.expm1(0.03 * 1.5))
        assert last.forget_loss == pytest.approx(4, abs=2 * 0.03 * 1.5)


def test_a_probability_that_underflows_is_too_far():
    size = StepSize(until_probability=0.1)
    last = search(lambda a: a**2, size, guess=1e6, loss=lambda a: 1 + a**2)[-1]
    assert last.forget_probability == pytest.approx(0.1, rel=0.06)  # 3 % of 1.8 nats


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(
    "size", [{"alpha": 1.7}, {"alpha": 5.0}, {"kl": 0.5}, {"until": 2.6}], ids=str
)
def test_a_cap_on_kl_is_never_exceeded(shape, size):
    for start in (START, replace(START, retain_kl=0.045)):
        capped = search(shape, StepSize(**size, max_kl=0.05), start=start)[-1]
        assert 0.045 <= capped.retain_kl <= 0.05
        assert not search(shape, StepSize(**size), start=start)[-1].retain_kl <= 0.05


def test_a_cap_that_is_kept_changes_nothing():
    free, capped = (search(lambda a: a**2, StepSize(alpha=0.1, max_kl=cap)) for cap in (None, 0.02))
    assert free == capped
    assert len(free) == 1


UNREACHED = {
    "saturates": (
        (lambda a: 0.01 * math.tanh(a), rising, {"kl": 0.02}),
        r"--kl 0.02 cannot be reached in one step \(at alpha [^ ]+: KL 0.01\): ask for less, or "
        r"take more --steps",
    ),
    "flat": ((lambda a: 0.0, rising, {"kl": 0.02}), r"\(at alpha [^ ]+: KL 0\): ask for less, or"),
    "jumps": (
        (lambda a: 0.001 if a < 1 else 1.0, rising, {"kl": 0.02}),
        r"\(at alpha 0.99999[0-9]+: KL 0.001, at alpha 1[.0-9]*: KL 1; nothing between\): ask for "
        r"about one of these$",
    ),
    "too much at once": (
        (lambda a: 1.0, rising, {"kl": 0.02}),
        r"\(at alpha [^ ]+: KL 1\): ask for more$",
    ),
    "breaks": (
        (lambda a: 1e-3 * a if a < 1 else math.nan, rising, {"kl": 0.02}),
        r"\(at alpha 0.99999[0-9]+: KL 0.001, from alpha 1 on the model's outputs are not "
        r"finite\): ask for less, or take more --steps$",
    ),
    "never finite": (
        (lambda a: math.nan, rising, {"kl": 0.02}),
        r"\(from alpha [^ ]+ on the model's outputs are not finite\): look at the model",
    ),
    "loss stays": (
        (lambda a: a**2, lambda a: 1.5, {"until": 3.0}),
        r"--until forget_loss=3 \(a rise of 2 nats in this step\) cannot be reached in one step "
        r"\(at alpha [^ ]+: rise 0.5\)",
    ),
    "loss falls": ((lambda a: a**2, lambda a: 1 - a, {"until": 3.0}), "rise -"),
    "loss rises and falls": (  # the last trial is not the nearest
        (lambda a: a**2, lambda a: 1 + a * math.exp(-a), {"until": 3.0}),
        r"\(at alpha 0.47[^ ]+: rise 0.29",
    ),
    "probability stays": (
        (lambda a: a**2, lambda a: 1.5, {"until_probability": 0.1}),
        r"--until forget_probability=0.1 \(a rise of 1.80. nats in this step\)",
    ),
    "cap below all": (
        (lambda a: 1.0, rising, {"alpha": 1.0, "max_kl": 0.02}),
        r"--max-kl 0.02 cannot be reached in one step \(at alpha [^ ]+: KL 1\)",
    ),
}


@pytest.mark.parametrize(("run", "message"), UNREACHED.values(), ids=UNREACHED)
def test_what_cannot_be_reached_is_an_error_that_tells_the_nearest(run, message):
    shape, loss, size = run
    with pytest.raises(InputError, match=message):
        search(shape, StepSize(**size), loss=loss)


def test_a_share_of_the_way_that_cannot_be_reached_is_told_with_the_whole():
    with pytest.raises(InputError, match=r"--kl 0.5 \(0.125 nats after this step\) cannot be"):
        search(lambda a: 0.01, StepSize(kl=0.5), share=0.5)
    with pytest.raises(InputError, match=r"--until forget_loss=3 \(a rise of 1 nats in this step"):
        search(lambda a: a**2, StepSize(until=3.0), share=0.5, loss=lambda a: 1.1)


def jump(alpha: float) -> float:
    """The KL of a mixture of experts: at 0.3 the first token changes its experts."""
    return alpha**2 if alpha < 0.3 else 0.5 + alpha


@pytest.mark.parametrize("size", [{"alpha": 2.0}, {"kl": 1.0}, {"until": 2.0}], ids=str)
def test_a_cap_that_lies_in_a_jump_takes_the_longest_step_below_it(size):
    probes = search(jump, StepSize(**size, max_kl=0.4))
    assert probes[-1].alpha == pytest.approx(0.3, rel=1e-5)
    assert probes[-1].retain_kl == pytest.approx(0.09, rel=1e-4)
    assert probes[-1].alpha == max(p.alpha for p in probes if p.retain_kl <= 0.4)


def test_a_capped_step_is_shorter_than_the_one_without_a_cap():
    tried = [
        p.alpha for p in search(lambda a: 0.1 - 0.05 * (a < 0.01), StepSize(alpha=1.0, max_kl=0.09))
    ]
    assert tried[0] == 1.0 == max(tried)
    assert tried[-1] == pytest.approx(0.01, rel=1e-5)


@pytest.mark.parametrize("name", ["alpha", "kl", "until", "max_kl"])
@pytest.mark.parametrize("value", [-1.0, 0.0, math.nan, math.inf])
def test_step_size_refuses_what_is_not_a_positive_number(name, value):
    others = {"kl": 0.02} if name == "max_kl" else {}
    flag = name.replace("_", "-")
    with pytest.raises(InputError, match=f"--{flag} {value}: give a positive, finite number"):
        StepSize(**{name: value, **others})
    assert getattr(StepSize(**{name: 0.5, **others}), name) == 0.5


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"max_kl": 1.0},
        {"alpha": 1.0, "kl": 1.0},
        {"kl": 1.0, "until": 1.0},
        {"until": 1.0, "until_probability": 0.5},
    ],
    ids=str,
)
def test_step_size_wants_exactly_one_way(sizes):
    with pytest.raises(InputError, match="exactly one of alpha, kl and until"):
        StepSize(**sizes)


# --- 14. KL is accurate at every scale ----------------------------------------------------------


def logits_pairs(dtype: torch.dtype, scale: float):
    """Rows of logits, float32 numbers, and the same rows moved by about ``scale``."""
    base = (3 * randn(6, 40)).float()
    return base.to(dtype), (base + scale * randn(6, 40, seed=1).float()).to(dtype)


def naive(base, edited):
    """The textbook's formula: cancels where the rows are close."""
    p, q = base.log_softmax(1), edited.log_softmax(1)
    return (p.exp() * (p - q)).sum(1)


def worst_error(formula, base, edited) -> float:
    ours = formula(base, edited).double().tolist()
    exact = [loops.textbook_divergence(*rows) for rows in zip(base, edited, strict=True)]
    return max(abs(o / e - 1) for o, e in zip(ours, exact, strict=True))


SCALES = [10.0, 3.0, 1.0, 0.3, 0.1, 3e-2, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6]


@pytest.mark.parametrize("scale", SCALES)
def test_divergence_is_accurate_from_tens_of_nats_to_1e_13(scale):
    # float64: the series leaves out 4e-11.
    assert worst_error(divergence, *logits_pairs(torch.float64, scale)) < 1e-10
    # float32: each log p of size 10 is rounded by 5e-7, and so is each p, relatively.
    assert worst_error(divergence, *logits_pairs(torch.float32, scale)) < 2e-6
    if scale <= 1e-3:
        assert worst_error(naive, *logits_pairs(torch.float32, scale)) > 0.05


def test_divergence_is_accurate_where_one_rare_token_moves_far():
    """KL of 1e-9 with a change of 4 in one logit: no row-wise choice of formula sees both."""
    base, edited = logits_pairs(torch.float32, 1e-5)
    base[:, 0] = edited[:, 0] = -20.0
    edited[:, 0] += 4.0
    assert worst_error(divergence, base, edited) < 2e-6
    assert worst_error(naive, base, edited) > 0.05


def test_divergence_of_equal_rows_is_zero_and_of_far_rows_finite():
    base, _ = logits_pairs(torch.float32, 0.0)
    assert torch.equal(divergence(base, base), torch.zeros(6))
    # A constant changes nothing but the last bit of each logit.
    assert divergence(base, base + 2.0).max() < 1e-12
    far = torch.full_like(base, -300.0)
    far[:, 0] = 300.0  # e^600 is not a float32
    assert worst_error(divergence, base, far) < 2e-6
    assert torch.isnan(divergence(base, torch.full_like(base, math.nan))).all()
