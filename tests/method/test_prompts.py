"""A gradient of the positions before the answers only."""

from __future__ import annotations

import pytest
import torch
from helpers import flat, random_sequences, relative_error, same_bits, tiny_llama
from zoo.mixtures import mixture
from zoo.rotary import MODELS, TRAINED

import kfade
from kfade import KFAC, Damping, make_batches, margin
from kfade.curvature.estimators import Identity
from kfade.curvature.product import quadratic_form
from kfade.data.noise import noisy
from kfade.data.sequences import TokenSequence
from kfade.method.gradient import forget_gradient
from kfade.method.objectives import cross_entropy
from kfade.method.step import gauss_newton_step
from kfade.method.trial import Trial
from kfade.models.layers import find_targets

FORGET = random_sequences(6, seed=7, shortest=12, longest=18)  # the first third of each is a prompt
SETS = {"retain": random_sequences(12, seed=8), "held_out": random_sequences(8, seed=9)}


def updated(forget=FORGET, **options) -> kfade.Update:
    options = {"fit": KFAC(), "damping": 0.1, "refit": False, "kl": 1e-3, **options}
    return kfade.unlearn(tiny_llama(), forget=forget, **SETS, **flat(**options))


def vector(update: kfade.Update) -> torch.Tensor:
    return torch.cat([update.deltas[name].flatten() for name in sorted(update.deltas)])


def test_live_positions_are_those_before_the_one_that_predicts_an_answers_first_token():
    n = False
    texts = [
        TokenSequence((1, 2, 3, 4, 5, 6, 7), (n, n, n, n, True, n, True)),
        TokenSequence((1, 2, 3, 4), (n, True, True, True)),  # no prompt
        TokenSequence((1, 2, 3, 4, 5), (n, n, n, True, True)),  # its tokens may be special ones
        TokenSequence((1, 2, 3, 4, 5, 6), (n, n, n, n, n, True), answer=4),
    ]
    [plain], [batch] = make_batches(texts), make_batches(texts, prompts=True)
    found = {int(i): live.tolist() for i, live in zip(batch.id_B, batch.live_BT, strict=True)}
    # Position t holds token t and predicts the next: token 4 is predicted at position 3.
    assert found == {
        0: 3 * [True] + 3 * [False],
        1: 3 * [True] + 3 * [False],  # all of it
        2: 4 * [True] + 2 * [False],
        3: 3 * [True] + 3 * [False],
    }
    assert torch.equal(batch.loss_BT, plain.loss_BT)
    assert batch.lengths == [found[int(i)].count(True) for i in batch.id_B]
    assert batch.reaches == plain.reaches == plain.lengths
    assert not batch.full


def test_the_prompt_of_a_copy_is_that_of_its_text():
    """A token that is replaced at the beginning of an answer does not become a prompt."""
    texts = random_sequences(30, seed=3, shortest=12, longest=16)
    plain = [TokenSequence(s.tokens, (False, *[True] * (len(s.tokens) - 1))) for s in texts]
    for given in (texts, plain):
        copies = noisy(given, range(len(given)), 0.5, seed=0)
        assert len(copies) == len(given)
        assert [copy.prompt for copy in copies] == [s.prompt for s in given]
        moved = [
            c.scored.index(True) > s.scored.index(True) for c, s in zip(copies, given, strict=True)
        ]
        assert any(moved)
    assert all(s.prompt >= 3 for s in texts)
    assert not any(s.prompt for s in plain)


@pytest.mark.parametrize("objective", [margin, cross_entropy])
def test_the_gradient_is_of_a_change_at_those_positions(objective):
    """∂/∂δ of the objective where the layers' outputs get δa at the prompts' positions only."""
    model = tiny_llama()
    targets = find_targets(model)
    [batch], [shown] = make_batches(FORGET), make_batches(FORGET, prompts=True)
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
    both = {
        prompts: forget_gradient(model, make_batches(FORGET, prompts=prompts), targets, margin)
        for prompts in (True, False)
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


def test_texts_without_a_prompt_keep_all_positions(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr("kfade.method.unlearn.say", said.append)
    plain = [TokenSequence(s.tokens, (False, *[True] * (len(s.tokens) - 1))) for s in FORGET]
    one, other = (
        updated(plain, at_prompts=prompts, noise=0.5, bound=2.0) for prompts in (True, False)
    )
    assert all(same_bits(delta, other.deltas[name]) for name, delta in one.deltas.items())
    assert [line.partition(",")[0] for line in said] == [
        "note: no text of the forget set has a prompt of 4 tokens or more"
    ]
    assert other.provenance["at_prompts"] is one.provenance["at_prompts"] is False
    some, none = (updated([*plain, *FORGET], at_prompts=prompts) for prompts in (True, False))
    assert relative_error(vector(some), vector(none)) > 0.1
    assert len(said) == 1


def test_the_damping_is_chosen_by_the_rise_at_all_positions():
    model = tiny_llama()
    targets = find_targets(model)
    merits = updated(at_prompts=True, damping=None).provenance["damping"]["merits"]
    held_out = make_batches(SETS["held_out"])
    curvature = KFAC().fit(model, make_batches(SETS["retain"]), targets)
    shown = forget_gradient(model, make_batches(FORGET, prompts=True), targets, margin)
    whole = forget_gradient(model, make_batches(FORGET), targets, margin)
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
        measured.append(len(self.update.provenance["steps"]))
        return real(self, *given)

    monkeypatch.setattr(Trial, "_rise", noting)
    updated(bands=2, steps=2)
    assert measured == [1, 1]
    measured.clear()
    updated(bands=2, steps=2, at_prompts=True)
    assert measured == [0, 0, 1, 1]


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_prompts_are_shorter_than_their_texts_on_models_that_follow_the_length(build):
    model = build()
    long = {"shortest": TRAINED + 2, "longest": TRAINED + 10}
    sets = {"retain": random_sequences(6, seed=8), "held_out": random_sequences(4, seed=9)}
    forget = [*random_sequences(3, seed=1, **long), *FORGET]
    options = flat(kl=1e-3, at_prompts=True, steps=2)
    steps = kfade.unlearn(model, forget=forget, **sets, **options).provenance["steps"]
    assert steps[-1]["retain_kl"] == pytest.approx(1e-3, rel=0.1)
    assert steps[-1]["forget_loss_after"] > steps[0]["forget_loss_before"]


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen3_moe"])
def test_the_gradient_of_a_mixture_in_a_batch_is_that_of_its_texts_one_by_one(family):
    model = mixture(family)
    targets = find_targets(model)
    whole = forget_gradient(model, make_batches(FORGET, prompts=True), targets, margin)
    tokens = sum(s.loss_tokens for s in FORGET)
    for target in targets:
        alone = sum(
            forget_gradient(model, make_batches([s], prompts=True), [target], margin)[target.name]
            * (s.loss_tokens / tokens)
            for s in FORGET
        )
        # 1e-6: these models' norms are in float32, where the order of a batch rounds otherwise.
        assert (whole[target.name] - alone).norm() <= 1e-6 * alone.norm()
    assert any(whole[target.name].norm() > 0 for target in targets)


@pytest.mark.parametrize("damping", [None, 0.1])
def test_the_last_block_alone_is_refused(damping):
    model = tiny_llama()
    options = {"at_prompts": True, "kl": 1e-3, "targets": find_targets(model, layers="1")}
    options |= {"damping": damping}
    with pytest.raises(kfade.InputError, match="--at-prompts: no gradient of the forget set's"):
        kfade.unlearn(model, forget=FORGET, **SETS, **flat(**options))


def test_a_resumed_run_equals_an_uninterrupted_one():
    options = {"steps": 3, "bound": 2.0, "noise": 0.5, "weigh_texts": True, "at_prompts": True}
    kept = []
    whole = vector(updated(**options, on_step=kept.append))
    for start in kept[:-1]:
        assert torch.equal(vector(updated(**options, start=start)), whole)
