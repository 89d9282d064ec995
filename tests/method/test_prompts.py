"""A gradient of the positions before the answers only."""

from __future__ import annotations

import pytest
import torch
from helpers import flat, random_sequences, relative_error, same_bits, tiny_llama

import kfade
from kfade import KFAC, Damping, make_batches, margin
from kfade.curvature.estimators import Identity
from kfade.curvature.product import quadratic_form
from kfade.data.sequences import TokenSequence
from kfade.method.gradient import forget_gradient
from kfade.method.objectives import cross_entropy
from kfade.method.step import gauss_newton_step
from kfade.method.trial import Trial
from kfade.models.layers import find_targets

FORGET = random_sequences(6, seed=7, shortest=6)  # the first third of each is a prompt
SETS = {"retain": random_sequences(12, seed=8), "held_out": random_sequences(8, seed=9)}


def updated(forget=FORGET, **options) -> kfade.Update:
    options = {"fit": KFAC(), "damping": 0.1, "refit": False, "kl": 1e-3, **options}
    return kfade.unlearn(tiny_llama(), forget=forget, **SETS, **flat(**options))


def vector(update: kfade.Update) -> torch.Tensor:
    return torch.cat([update.deltas[name].flatten() for name in sorted(update.deltas)])


def test_live_positions_are_those_before_the_first_that_predicts_a_scored_token():
    texts = [
        TokenSequence((1, 2, 3, 4, 5, 6), (False, False, False, True, False, True)),
        TokenSequence((1, 2, 3, 4), (False, True, True, True)),  # no prompt
        TokenSequence((1, 2, 3), (False, False, True)),
    ]
    [batch] = make_batches(texts)
    shown = batch.before_answers()
    found = {int(i): live.tolist() for i, live in zip(shown.id_B, shown.live_BT, strict=True)}
    # Position t holds token t and predicts the next: token 3 is predicted at position 2.
    assert found == {
        0: [True, True, False, False, False],
        1: [True, True, True, False, False],
        2: [True, False, False, False, False],
    }
    assert torch.equal(shown.loss_BT, batch.loss_BT)
    assert (shown.full, shown.lengths) == (False, [int(live.sum()) for live in shown.live_BT])


@pytest.mark.parametrize("objective", [margin, cross_entropy])
def test_the_gradient_is_of_a_change_at_those_positions(objective):
    """∂/∂δ of the objective where the layers' outputs get δa at the prompts' positions only."""
    model = tiny_llama()
    targets = find_targets(model)
    [batch] = make_batches(FORGET)
    shown = batch.before_answers()
    deltas = {
        t.name: torch.zeros(t.shape, dtype=torch.float64, requires_grad=True) for t in targets
    }

    def hook(name):
        def add(_, inputs, output):
            return output + shown.live_BT[..., None] * (inputs[0] @ deltas[name].T)

        return add

    handles = [t.module.register_forward_hook(hook(t.name)) for t in targets]
    logits_BTV = model(batch.input_BT).logits
    value = objective(batch.at_loss(logits_BTV), batch.at_loss(batch.target_BT)).mean()
    oracle = dict(zip(deltas, torch.autograd.grad(value, [*deltas.values()]), strict=True))
    for handle in handles:
        handle.remove()
    ours = forget_gradient(model, [shown], targets, objective)
    whole = forget_gradient(model, [batch], targets, objective)
    last = max(t.block for t in targets)
    for target in targets:
        # 1e-11: another order of sums in float64.
        scale = whole[target.name].norm()
        assert (ours[target.name] - oracle[target.name]).norm() < 1e-11 * scale
        assert relative_error(whole[target.name], ours[target.name]) > 0.1 or target.block == last
        # Nothing after the last block mixes positions.
        assert (ours[target.name].norm() == 0) == (target.block == last)


def test_a_step_is_along_that_gradient():
    """Without curvature. The gradient of all positions has another direction."""
    model = tiny_llama()
    targets = find_targets(model)
    batches = make_batches(FORGET)
    both = {
        True: forget_gradient(model, [b.before_answers() for b in batches], targets, margin),
        False: forget_gradient(model, batches, targets, margin),
    }
    for prompts in both:
        step = vector(updated(fit=Identity(), at_prompts=prompts))
        along = {
            of: torch.nn.functional.cosine_similarity(
                step, torch.cat([g[n].flatten() for n in sorted(g)]), dim=0
            ).item()
            for of, g in both.items()
        }
        assert along[prompts] == pytest.approx(1, abs=1e-9)  # rounding in float64
        assert along[not prompts] < 0.9


def test_texts_without_a_prompt_keep_all_positions():
    plain = [TokenSequence(s.tokens, (False, *[True] * (len(s.tokens) - 1))) for s in FORGET]
    one, other = (updated(plain, at_prompts=prompts) for prompts in (True, False))
    assert all(same_bits(delta, other.deltas[name]) for name, delta in one.deltas.items())
    assert relative_error(vector(updated(at_prompts=True)), vector(updated())) > 0.1


def test_the_damping_is_chosen_by_the_rise_at_all_positions():
    model = tiny_llama()
    targets = find_targets(model)
    merits = updated(at_prompts=True, damping=None).provenance["damping"]["merits"]
    batches, held_out = make_batches(FORGET), make_batches(SETS["held_out"])
    curvature = KFAC().fit(model, make_batches(SETS["retain"]), targets)
    shown = forget_gradient(model, [b.before_answers() for b in batches], targets, margin)
    whole = forget_gradient(model, batches, targets, margin)
    assert len(merits) > 1
    for value, merit in merits.items():
        step = gauss_newton_step(curvature, shown, Damping(float(value)))
        form = quadratic_form(model, held_out, targets, step.direction)
        rise = sum((whole[n] * r).sum().item() for n, r in step.direction.items())
        # 1e-6: curvature of the retain set in batches of another order.
        assert merit == pytest.approx(rise**2 / form, rel=1e-6)
        assert merit != pytest.approx(step.slope**2 / form, rel=0.05)


def test_bands_are_measured_at_the_first_step_too(monkeypatch):
    """What the gradient of some positions predicts is not what a step does."""
    measured, real = [], Trial._rise

    def noting(self, *given):
        measured.append(len(self._update.provenance["steps"]))
        return real(self, *given)

    monkeypatch.setattr(Trial, "_rise", noting)
    updated(bands=2, steps=2)
    assert measured == [1, 1]
    measured.clear()
    updated(bands=2, steps=2, at_prompts=True)
    assert measured == [0, 0, 1, 1]


def test_a_resumed_run_equals_an_uninterrupted_one():
    options = {"steps": 3, "bound": 2.0, "noise": 0.5, "weigh_texts": True, "at_prompts": True}
    kept = []
    whole = vector(updated(**options, on_step=kept.append))
    for start in kept[:-1]:
        assert torch.equal(vector(updated(**options, start=start)), whole)
