"""Each baseline's loss against a slow formula; what it computes and what it does not."""

from __future__ import annotations

import math

import pytest
import torch
import zoo
from helpers import Snapshot, random_sequences, relative_error, tiny_llama
from slow_terms import (
    both_agree,
    gradient,
    log_probabilities,
    moved,
    net_of,
    rows_of,
    slow_nll,
    value_of,
)
from torch.nn.functional import cosine_similarity

from kfade.baselines import losses, methods, rmu
from kfade.baselines.elm import (
    Guidance,
    fluent_prompt,
    soft_cross_entropy,
    steered_sample,
    steered_target,
)
from kfade.baselines.losses import Net
from kfade.baselines.sophia import TOKENS, Sophia
from kfade.data.batches import make_batches
from kfade.data.sequences import TokenSequence
from kfade.errors import InputError
from kfade.method.update import Update
from kfade.models.head import hidden_states, read_head

pytestmark = pytest.mark.usefixtures("short_chunks")


def test_likelihood_is_mean_cross_entropy_per_token(model, sequences):
    tokens = sum(s.loss_tokens for s in sequences)
    slow = -sum(slow_nll(model, s) for s in sequences) / tokens
    both_agree(losses.likelihood("forget", -1.0), model, sequences, slow)


def test_npo_is_minus_two_over_beta_log_sigma(sequences):
    base, beta = tiny_llama(), 0.3
    model = moved(tiny_llama())
    ratios = [slow_nll(base, s).detach() - slow_nll(model, s) for s in sequences]  # log p/p_base
    slow = sum(-(2 / beta) * torch.log(1 / (1 + torch.exp(beta * r))) for r in ratios)
    term = losses.preference(beta, 1.0)
    rows = rows_of(term, net_of(base), sequences)
    both_agree(term, model, sequences, slow / len(sequences), rows)


def test_simnpo_is_by_length_and_has_no_reference(model, sequences):
    beta, gamma, weight = 2.5, 0.7, 0.1375
    values = [beta * (slow_nll(model, s) / s.loss_tokens - gamma) for s in sequences]
    slow = sum(-(2 / beta) * torch.log(1 / (1 + torch.exp(-v))) for v in values)
    term = losses.simple_preference(beta, gamma, weight)
    both_agree(term, model, sequences, weight * slow / len(sequences))
    assert all(term.reference is None for term in methods.simnpo().terms)
    assert any(term.reference is not None for term in methods.npo().terms)


def test_kl_term_is_the_divergence_from_the_base_model(sequences):
    base, model = tiny_llama(), moved(tiny_llama())
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for sequence in sequences:
        log_p = log_probabilities(base, sequence).detach()
        log_q = log_probabilities(model, sequence)
        for t, scored in enumerate(sequence.scored):
            if scored:
                p = log_p[t - 1].exp()
                total = total + (p * (log_p[t - 1] - log_q[t - 1])).sum()
                tokens += 1
    term = losses.closeness(1.0)
    rows = rows_of(term, net_of(base), sequences)
    # The model's head has moved too, so the base model is read by a head of its own.
    net = Net(model, read_head(model), read_head(base))
    ours, slow = value_of(term, net, sequences, rows), total / tokens
    assert ours.item() == pytest.approx(slow.item(), rel=1e-10)
    assert relative_error(gradient(ours, model), gradient(slow, model)) < 1e-10
    wrong = value_of(term, net_of(model), sequences, rows)  # by one head
    assert abs(wrong.item() / slow.item() - 1) > 0.01


def test_kl_term_has_no_gradient_at_the_start(model, sequences):
    term, net = losses.closeness(1.0), net_of(model)
    rows = rows_of(term, net, sequences)
    at_start = gradient(value_of(term, net, sequences, rows), model).norm()
    afterwards = gradient(value_of(term, net_of(moved(model)), sequences, rows), model).norm()
    assert at_start < 1e-12 * afterwards
    assert afterwards > 1e-3


def test_npo_tends_to_gradient_difference_as_beta_falls():
    # One scored token each: a mean over sequences is then a mean over tokens.
    forget = random_sequences(6, seed=1, one_loss_token=True)
    retain = random_sequences(6, seed=2)
    base, model = tiny_llama(), moved(tiny_llama(), 0.2)

    def direction(method: methods.Method) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for term in method.terms:
            own = forget if term.on == "forget" else retain
            rows = rows_of(term, net_of(base), own) if term.reference else None
            total = total + value_of(term, net_of(model), own, rows)
        return gradient(total, model)

    difference = direction(methods.gradient_difference())
    cosines = {
        beta: cosine_similarity(direction(methods.npo(beta=beta)), difference, dim=0).item()
        for beta in (1e-6, 1e-2, 3.0)
    }
    assert cosines[1e-6] > 1 - 1e-10
    assert cosines[1e-6] > cosines[1e-2] > cosines[3.0]
    assert cosines[3.0] < 0.99


def test_soul_is_gradient_difference_by_sophia(model, sequences):
    method = methods.soul(gamma=3.0)
    assert [(t.on, t.weight) for t in method.terms] == [("forget", -1.0), ("retain", 3.0)]
    assert method.defaults.optimizer is Sophia


# RMU


def test_rmu_terms_against_loops(sequences):
    base, model = tiny_llama(layers=3), moved(tiny_llama(layers=3))
    vector_D = rmu.control_vector(8, 6.5, seed=3).to(torch.get_default_device())

    def hidden(of, sequence):  # hidden_states[0] are embeddings, so [2] is block 1's output
        tokens = torch.tensor([sequence.tokens[: sequence.live]])
        return of(input_ids=tokens, output_hidden_states=True).hidden_states[2][0]

    steered = held = torch.zeros((), dtype=torch.float64)
    positions = 0
    for sequence in sequences:
        for h, h_base in zip(hidden(model, sequence), hidden(base, sequence).detach(), strict=True):
            steered = steered + ((h - vector_D) ** 2).sum()
            held = held + ((h - h_base) ** 2).sum()
            positions += 1
    term = rmu.steering(rmu.find_block(model, 1), vector_D)
    both_agree(term, model, sequences, steered / positions)
    rows = rows_of(rmu.holding(rmu.find_block(base, 1), 7.0), net_of(base), sequences)
    term = rmu.holding(rmu.find_block(model, 1), 7.0)
    both_agree(term, model, sequences, 7 * held / positions, rows)


def test_rmu_stops_at_its_block(sequences):
    model = tiny_llama(layers=4)
    block = rmu.find_block(model, 1)
    ran: list[str] = []
    for name, module in model.named_modules():
        if name in ("model.norm", "lm_head") or name.count(".") == 2:
            module.register_forward_hook(lambda m, a, o, name=name: ran.append(name))
    (batch,) = make_batches(sequences, budget=10_000)
    before = Snapshot.of(model)
    rmu.live_output(model, block, batch)
    assert ran == ["model.layers.0", "model.layers.1"]
    assert not before.differences(model)
    ran.clear()
    model(input_ids=batch.input_BT)
    assert ran == [*(f"model.layers.{i}" for i in range(4)), "model.norm", "lm_head"]


LAST_MAPS = {
    "llama": "mlp.down_proj",
    "gemma2": "mlp.down_proj",
    "phi": "mlp.fc2",
    "gpt_neox": "mlp.dense_4h_to_h",
    "gpt2": "mlp.c_proj",
}


@pytest.mark.parametrize("family", list(LAST_MAPS))
def test_rmu_finds_blocks_and_weights_of_any_family(family):
    model = zoo.tiny(family)
    (batch,) = make_batches(zoo.sequences((6, 4)), budget=100)
    with zoo.Double(), torch.no_grad():
        ours = rmu.live_output(model, rmu.find_block(model, 0), batch)
        whole = model(input_ids=batch.input_BT, output_hidden_states=True).hidden_states[1]
    assert torch.equal(ours, whole[batch.live_BT])
    blocks = zoo.FAMILIES[family].blocks
    assert rmu.trained_weights(model, 1) == [
        f"{blocks}.{i}.{LAST_MAPS[family]}.weight" for i in (0, 1)
    ]


def test_rmu_trains_three_blocks_up_to_its_own():
    model = tiny_llama(layers=5)
    names = [f"model.layers.{i}.mlp.down_proj.weight" for i in range(5)]
    assert rmu.trained_weights(model, 3) == names[1:4]
    assert rmu.trained_weights(model, 0) == names[:1]
    with pytest.raises(InputError, match="--layer 5: this model has blocks 0 to 4"):
        methods.rmu(model, layer=5)


def test_control_vector_has_its_length_and_no_negative_entry():
    vector_D = rmu.control_vector(64, 6.5, seed=0)
    assert vector_D.norm().item() == pytest.approx(6.5, rel=1e-6)
    assert vector_D.min() >= 0
    assert torch.equal(vector_D, rmu.control_vector(64, 6.5, seed=0))
    assert not torch.equal(vector_D, rmu.control_vector(64, 6.5, seed=1))


# ELM


def guidance(**other) -> Guidance:
    texts = {"expert": (1, 3, 4), "novice": (1, 5, 6, 7, 8), "bridge": (9, 10)}
    return Guidance(**{**texts, "bos": 1, "eos": 2, "window": 64, "kept": 5, **other})


@pytest.mark.parametrize("first", [1, 11])  # with a BOS of its own, and without
def test_erasure_target_is_steered_away_from_the_expert(model, first):
    sequence = TokenSequence((first, 4, 9, 12, 7), (False, False, True, True, True))
    steering = guidance()
    p_NK, index_NK = steered_target(net_of(model), sequence, steering)

    def log_p(prefix, t):  # of the token at t, all that precedes it given
        own = sequence.tokens[1:t] if prefix and first == 1 else sequence.tokens[:t]
        logits = model(input_ids=torch.tensor([[*prefix, *own]])).logits[0, -1]
        return (logits / 1.2).log_softmax(dim=-1)

    for n, t in enumerate((2, 3, 4)):
        eta = 1 + (1000 - 1) * n / 2
        steered = log_p((), t) + eta * (log_p(steering.novice, t) - log_p(steering.expert, t))
        best = sorted(range(17), key=lambda v: -steered[v].item())[:5]
        assert index_NK[n].tolist() == best
        weights = [math.exp(steered[v].item() - steered[best[0]].item()) for v in best]
        expected = [w / sum(weights) for w in weights]
        assert p_NK[n].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-12)


def test_erasure_target_is_the_base_model_where_the_texts_are_one(model):
    sequence = random_sequences(1)[0]
    same = guidance(novice=(1, 3), expert=(1, 3), kept=17, temperature=1.0)
    p_NK, index_NK = steered_target(net_of(model), sequence, same)
    p_NV = torch.zeros(p_NK.shape[0], 17).scatter(1, index_NK, p_NK)
    log_p = log_probabilities(model, sequence)
    expected = [log_p[t - 1].exp() for t, scored in enumerate(sequence.scored) if scored]
    assert torch.allclose(p_NV.double(), torch.stack(expected), atol=1e-6)


def test_soft_cross_entropy_by_hand():
    logits = torch.tensor([[0.0, math.log(3.0), math.log(4.0)]])  # q = 1/8, 3/8, 4/8
    p, index = torch.tensor([[0.25, 0.75]]), torch.tensor([[2, 0]])
    expected = -(0.25 * math.log(0.5) + 0.75 * math.log(0.125))
    assert soft_cross_entropy(logits, p, index).item() == pytest.approx(expected, rel=1e-6)


def test_erasure_and_fluency_terms_against_loops(model, sequences):
    steering = guidance(fluent_tokens=4)
    erasure, _, fluency = methods.elm(steering).terms
    net = net_of(model)
    rows = rows_of(erasure, net, sequences)
    slow, tokens = torch.zeros((), dtype=torch.float64), 0
    for sequence, (p_NK, index_NK) in zip(sequences, rows, strict=True):
        log_q = log_probabilities(model, sequence)
        scored = [t for t, flag in enumerate(sequence.scored) if flag]
        for n, t in enumerate(scored):
            for p, v in zip(p_NK[n].tolist(), index_NK[n].tolist(), strict=True):
                slow = slow - p * log_q[t - 1, v]
        tokens += len(scored)
    both_agree(erasure, model, sequences, slow / tokens, rows)

    rows = rows_of(fluency, net, sequences)
    slow, tokens = torch.zeros((), dtype=torch.float64), 0
    for sequence, (whole, scored) in zip(sequences, rows, strict=True):
        whole, kept = whole.tolist(), len(sequence.tokens[: sequence.live + 1])
        assert whole[:kept] == list(sequence.tokens[:kept])
        assert whole[kept : kept + 2] == [9, 10]
        flags = tuple(t >= kept for t in range(len(whole)))
        assert sum(flags) == scored
        slow = slow + slow_nll(model, TokenSequence(tuple(whole), flags))
        tokens += sum(flags)
    both_agree(fluency, model, sequences, slow / tokens, rows)


def test_continuations_are_drawn_as_without_a_cache(model):
    steering = guidance(fluent_tokens=6, eos=None)
    net, prompt = net_of(model), [11, 4, 9]
    drawn = steered_sample(net, prompt, steering)
    assert len(drawn) == 6
    assert drawn == steered_sample(net, prompt, steering)
    seeds = [steered_sample(net, prompt, guidance(fluent_tokens=6, seed=s)) for s in range(5)]
    assert any(other != drawn for other in seeds)

    def log_p(prefix, so_far):
        logits = model(input_ids=torch.tensor([[*prefix, *so_far]])).logits[0, -1]
        return logits.log_softmax(dim=-1)

    # Each token was likely enough where it was drawn, and the most of them where η is large.
    strong = steered_sample(net, prompt, guidance(fluent_tokens=6, eos=None, fluent_eta=1e4))
    for n, token in enumerate(strong):
        novice, expert = (log_p(t, strong[:n]) for t in (steering.novice, steering.expert))
        assert token == int((novice - expert).argmax())
    ends = steered_sample(net, prompt, guidance(fluent_tokens=6, eos=drawn[2]))
    assert ends == drawn[: drawn.index(drawn[2]) + 1]


def test_elm_refuses_what_is_over_the_window(model):
    sequence = random_sequences(1, shortest=9, longest=9)[0]
    with pytest.raises(InputError, match="make 14 tokens, over the model's window of 12"):
        steered_target(net_of(model), sequence, guidance(window=12))
    with pytest.raises(InputError, match="window of 6 tokens is too short"):
        fluent_prompt(sequence.tokens, guidance(window=6, fluent_tokens=4))
    cut = fluent_prompt((5, 6, 7, 8, 2), guidance(window=9, fluent_tokens=4))
    assert cut == [5, 6, 7, 9, 10]  # and four more: the window
    assert fluent_prompt((5, 6, 2), guidance(fluent_tokens=4)) == [5, 6, 9, 10]  # no EOS


# Sophia


def test_sophia_against_a_hand_written_loop():
    lr, (b1, b2), rho, decay = 0.1, (0.9, 0.95), 0.04, 0.2
    start = [1.0, -2.0, 0.5, 3.0]
    gradients = [[1e-3, 2.0, 0.0, -5.0], [-4e-3, 1e-2, 1e-4, 5.0], [2e-3, -3.0, 0.0, 5.0]]
    tensor = torch.tensor(start, dtype=torch.float64)
    optimizer = Sophia([tensor], lr, betas=(b1, b2), rho=rho, weight_decay=decay)
    theta, m, h = list(start), [0.0] * 4, [0.0] * 4
    clipped = free = 0
    for g in gradients:
        tensor.grad = torch.tensor(g, dtype=torch.float64)
        optimizer.step()
        for i in range(4):
            m[i] = b1 * m[i] + (1 - b1) * g[i]
            h[i] = b2 * h[i] + (1 - b2) * g[i] ** 2
            theta[i] *= 1 - lr * decay
            ratio = abs(m[i]) / (rho * TOKENS * h[i] + 1e-15)
            clipped, free = clipped + (ratio > 1), free + (0 < ratio <= 1)
            theta[i] -= lr * math.copysign(min(ratio, 1), m[i]) if m[i] else 0.0
        assert tensor.tolist() == pytest.approx(theta, rel=1e-12)
    assert clipped >= 2  # both regimes were there
    assert free >= 2


def test_updates_of_the_head_are_measured_by_two_heads(tmp_path):
    # kfade eval kl: the base model's outputs are read by the base model's head.
    from kfade.evaluate.divergence import divergences, grouped
    from kfade.runs.eval_kl import _in_memory
    from kfade.runs.evaluation import EvaluatedModel

    model, sequences = tiny_llama(), random_sequences(5)
    update = Update({"lm_head.weight": torch.randn(17, 8, dtype=torch.float64) * 0.3})
    subject = EvaluatedModel("model", model, None, update, None, {})
    groups = grouped(make_batches(sequences, budget=20))
    found = dict(divergences(groups, _in_memory(subject, groups), subject.edited))
    edited = tiny_llama()
    update.apply(edited)
    for index, sequence in enumerate(sequences):
        with torch.no_grad():
            log_p, log_q = (log_probabilities(m, sequence) for m in (model, edited))
        kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
        expected = [kl[t - 1] for t, scored in enumerate(sequence.scored) if scored]
        assert found[index].tolist() == pytest.approx(torch.stack(expected).tolist(), rel=1e-9)


def test_hidden_states_are_what_the_terms_see(model, sequences):
    # The reference of the KL term: [n, D] of each sequence at its scored tokens.
    rows = rows_of(losses.closeness(1.0), net_of(model), sequences)
    for sequence, (hidden_nD,) in zip(sequences, rows, strict=True):
        with torch.no_grad():
            whole = hidden_states(model, torch.tensor([sequence.tokens]))[0]
        scored = [t - 1 for t, flag in enumerate(sequence.scored) if flag]
        assert torch.allclose(hidden_nD, whole[scored], atol=1e-12)
