"""What the curvature must be in theory, in float64, against slow oracles.

Every test of an equality also shows a wrong version that breaks it. Unless a comment says
otherwise, EXACT is the tolerance: two float64 computations of one number in another order, a few
thousand operations of relative error 1e-16 each.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from helpers import (
    VOCABULARY,
    measured_kl,
    one_of_all_draws,
    random_sequences,
    relative_error,
    tiny_llama,
)
from oracles import loops
from oracles.dense import flatten, gauss_newton_matrix, unflatten

import kfade.models.head
from kfade import (
    EKFAC,
    KFAC,
    Damping,
    Diagonal,
    Identity,
    cross_entropy,
    find_targets,
    make_batches,
    margin,
    sampled_labels,
    square_root_draw,
)
from kfade.curvature import factors
from kfade.curvature.block import EigenBlock
from kfade.curvature.draws import token_keys
from kfade.curvature.eigh import eigendecompose
from kfade.curvature.factors import (
    CovarianceSum,
    add_sequence_squares,
    rows_first,
)
from kfade.curvature.fit import COVARIANCE_STREAM, EIGENVALUE_STREAM
from kfade.curvature.product import gauss_newton_product, gram_matrix, quadratic_form
from kfade.data.batches import Batch
from kfade.data.sequences import TokenSequence
from kfade.method.gauge import parameter_changes
from kfade.method.gradient import forget_gradient
from kfade.method.update import Update
from kfade.models.head import read_head

EXACT = 1e-11
# Eigenvectors turn rounding into an angle of rounding / gap between eigenvalues; the gaps of these
# random factors are above 1e-5 of the largest eigenvalue.
EIGENVECTORS = 1e-8
# Where a wrong version must differ, it differs by at least this much.
PLAIN = 1e-2

KINDS = ("identity", "diagonal", "kfac", "ekfac")
DRAWS = (sampled_labels, square_root_draw)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_block(kind: str, n_out: int, n_in: int) -> EigenBlock:
    if kind == "identity":
        return EigenBlock(None, None, torch.ones(1, 1, dtype=torch.float64))
    grid = randn(n_out, n_in, seed=1).square()
    if kind == "diagonal":
        return EigenBlock(None, None, grid)
    q_out = torch.linalg.qr(randn(n_out, n_out, seed=2)).Q
    q_in = torch.linalg.qr(randn(n_in, n_in, seed=3)).Q
    if kind == "kfac":
        grid = torch.outer(grid[:, 0], grid[0])
    return EigenBlock(q_out, q_in, grid)


# --- 1. A block is dense Kronecker algebra ------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_block_equals_its_dense_matrix(kind):
    block, x = random_block(kind, 3, 5), randn(3, 5)
    g, eye = loops.block_matrix(block, (3, 5)), torch.eye(15).double()
    vector = x.reshape(-1)
    assert relative_error(block.matvec(x).reshape(-1), g @ vector) < EXACT
    assert relative_error(block.quadratic(x), vector @ g @ vector) < EXACT
    for relative in (False, True):
        damping = Damping(0.3, relative).of(block.mean_eigenvalue)
        assert damping == pytest.approx(0.3 * (g.trace().item() / 15 if relative else 1.0))
        solved = torch.linalg.solve(g + damping * eye, vector)
        assert relative_error(block.solve(x, damping).reshape(-1), solved) < EXACT


@pytest.mark.parametrize("kind", ["diagonal", "kfac", "ekfac"])
def test_another_blocks_matrix_is_told_apart(kind):
    block, x = random_block(kind, 3, 5), randn(3, 5)
    g = loops.block_matrix(random_block("identity", 3, 5), (3, 5))
    assert relative_error(block.matvec(x).reshape(-1), g @ x.reshape(-1)) > PLAIN
    if kind != "diagonal":  # bases the wrong way round
        turned = EigenBlock(block.q_out.T, block.q_in.T, block.eigenvalues)
        assert relative_error(turned.matvec(x), block.matvec(x)) > PLAIN


def test_row_major_vec_puts_the_output_factor_first():
    """vec(S X A) = (S ⊗ A) vec(X), row by row; A ⊗ S is another matrix."""
    x, s, a = randn(3, 5), randn(3, 3, seed=1), randn(5, 5, seed=2)
    s, a = s @ s.T, a @ a.T
    product = (s @ x @ a).reshape(-1)
    assert relative_error(torch.kron(s, a) @ x.reshape(-1), product) < EXACT
    assert relative_error(torch.kron(a, s) @ x.reshape(-1), product) > PLAIN


def test_kfac_solve_damps_the_product_not_the_factors():
    s, a, x = randn(3, 4, seed=1), randn(5, 6, seed=2), randn(3, 5)
    s, a = s @ s.T, a @ a.T
    (s_values, q_out), (a_values, q_in) = eigendecompose(s, "S"), eigendecompose(a, "A")
    block = EigenBlock(q_out, q_in, torch.outer(s_values, a_values))
    damped = torch.kron(s, a) + 0.1 * torch.eye(15).double()
    solved = block.solve(x, 0.1).reshape(-1)
    assert relative_error(solved, torch.linalg.solve(damped, x.reshape(-1))) < EXACT
    root = math.sqrt(0.1)
    split = torch.kron(s + root * torch.eye(3).double(), a + root * torch.eye(5).double())
    assert relative_error(solved, torch.linalg.solve(split, x.reshape(-1))) > PLAIN


def test_identity_fit_is_plain_gradient_direction(model, batches, targets):
    curvature = Identity().fit(model, batches, targets)
    x = {t.name: randn(*t.shape, seed=i) for i, t in enumerate(targets)}
    for name, solved in curvature.solve(x, damping=Damping(0.0, relative=False)).items():
        assert torch.equal(solved, x[name])
    kfac = KFAC().fit(model, batches, targets).solve(x, damping=Damping(1e-3))
    assert all(relative_error(kfac[name], x[name]) > PLAIN for name in x)


# --- 2. K-FAC and EK-FAC are exact where theory says so, and only there -------------------------


def test_exhaustive_draws_sum_to_the_fisher():
    p = randn(VOCABULARY).softmax(0)
    draws = [one_of_all_draws(k)(p[None], torch.zeros(1))[0] for k in range(VOCABULARY)]
    total = sum(torch.outer(u, u) for u in draws)
    assert relative_error(total, loops.fisher(p)) < EXACT
    missing_one = total - torch.outer(draws[0], draws[0])
    assert relative_error(missing_one, loops.fisher(p)) > PLAIN


def summed_blocks(fit, model, batches, targets) -> dict[str, torch.Tensor]:
    """Σ_k of the fitted blocks, as dense matrices, over all V draws."""
    totals = {t.name: 0.0 for t in targets}
    for k in range(VOCABULARY):
        curvature = fit(one_of_all_draws(k)).fit(model, batches, targets)
        for t in targets:
            totals[t.name] += loops.block_matrix(curvature.blocks[t.name], t.shape)
    return totals


def kfac_errors(model, sequences: list[TokenSequence]) -> list[float]:
    """Distance of K-FAC, its draws replaced by their exact average, from the exact Fisher."""
    targets, batches = find_targets(model), make_batches(sequences)
    kfac = summed_blocks(KFAC, model, batches, targets)
    exact = {t.name: gauss_newton_matrix(model, batches, [t]) for t in targets}
    return [relative_error(kfac[t.name], exact[t.name]) for t in targets]


def test_kfac_is_exact_when_all_inputs_are_the_same(model):
    """One position a sequence, always the same: a is constant, so S and A factorise."""
    same = TokenSequence((3, 5), (False, True))
    assert max(kfac_errors(model, [same] * 4)) < EXACT


def test_kfac_is_not_exact_when_inputs_and_gradients_vary_together(model):
    one_position = [TokenSequence((token, 5), (False, True)) for token in range(4)]
    assert min(kfac_errors(model, one_position)) > PLAIN
    one_sequence = [TokenSequence((3, 5, 7, 1), (False, True, True, True))]
    assert min(kfac_errors(model, one_sequence)) > PLAIN


def test_kronecker_product_is_exact_when_a_and_g_are_independent():
    """Every g with every a: mean of gg ⊗ aa = (mean of gg) ⊗ (mean of aa)."""
    a, g = randn(4, 5), randn(6, 3, seed=1)
    a_rows, g_rows = a.repeat(6, 1), g.repeat_interleave(4, dim=0)
    assert factorisation_error(a_rows, g_rows) < EXACT
    paired = g_rows * a_rows[:, :1]  # g now depends on a
    assert factorisation_error(a_rows, paired) > PLAIN


def factorisation_error(a_rows, g_rows) -> float:
    count = len(a_rows)
    sums = [CovarianceSum(rows.shape[1], torch.float64, rows.device) for rows in (g_rows, a_rows)]
    for covariance, rows in zip(sums, (g_rows, a_rows), strict=True):
        covariance.add(rows)
    s, a = (covariance.mean(count) for covariance in sums)
    pairs = zip(g_rows, a_rows, strict=True)
    exact = sum(torch.kron(torch.outer(g, g), torch.outer(a, a)) for g, a in pairs) / count
    return relative_error(torch.kron(s, a), exact)


def bases_then_draw(k: int, loss_tokens: int) -> Callable:
    """One and the same draw while the bases are fitted (their pass comes first), then draw k."""
    seen = 0

    def two_passes(p_NV, key_N):
        nonlocal seen
        chosen = 0 if seen < loss_tokens else k
        seen += len(p_NV)
        return one_of_all_draws(chosen)(p_NV, key_N)

    return two_passes


def test_ekfac_keeps_the_exact_diagonal_in_its_basis(model, targets):
    """With one loss token a sequence and all draws: ΣΛ = diag(Qᵀ G Q); K-FAC's grid is not it."""
    batches = make_batches(random_sequences(6, one_loss_token=True), budget=20)
    loss_tokens = sum(b.loss_tokens for b in batches)
    fits = [
        EKFAC(bases_then_draw(k, loss_tokens)).fit(model, batches, targets)
        for k in range(VOCABULARY)
    ]
    kfac = [KFAC(one_of_all_draws(k)).fit(model, batches, targets) for k in range(VOCABULARY)]
    for t in targets:
        first = fits[0].blocks[t.name]
        grids = [fit.blocks[t.name].eigenvalues for fit in fits]
        q = torch.kron(*loops.bases(first, t.shape))
        rotated = q.T @ gauss_newton_matrix(model, batches, [t]) @ q
        assert relative_error(sum(grids).reshape(-1), rotated.diagonal()) < EXACT
        kfac_total = sum(loops.block_matrix(fit.blocks[t.name], t.shape) for fit in kfac)
        kfac_diagonal = (q.T @ kfac_total @ q).diagonal()
        assert relative_error(kfac_diagonal, rotated.diagonal()) > PLAIN


def test_diagonal_is_the_exact_diagonal_with_one_loss_token_a_sequence(model, targets):
    def error(sequences) -> float:
        batches = make_batches(sequences, budget=20)
        fits = [
            Diagonal(one_of_all_draws(k)).fit(model, batches, targets) for k in range(VOCABULARY)
        ]
        total = {t.name: sum(f.blocks[t.name].eigenvalues for f in fits) for t in targets}
        exact = gauss_newton_matrix(model, batches, targets).diagonal()
        return relative_error(flatten(total, targets), exact)

    assert error(random_sequences(6, one_loss_token=True)) < EXACT
    # The same k at several tokens of a sequence: no longer independent, cross terms remain.
    assert error(random_sequences(6)) > PLAIN


# --- 3. The fits equal a loop over sequences, given the same draws ------------------------------


@pytest.fixture(params=[False, True], ids=["weights", "joint bias"])
def biased(request):
    """(model, targets): weights only, or with biases as one more column."""
    model = tiny_llama(mlp_bias=request.param)
    return model, find_targets(model, joint_bias=request.param)


@pytest.mark.parametrize("draw", DRAWS)
def test_kfac_factors_equal_a_loop_over_tokens(biased, sequences, batches, draw):
    model, targets = biased
    curvature = KFAC(draw).fit(model, batches, targets, seed=3)
    for t in targets:
        s, a = loops.kronecker_factors(model, sequences, t, draw, 3, COVARIANCE_STREAM)
        ours = loops.block_matrix(curvature.blocks[t.name], t.shape)
        assert relative_error(ours, torch.kron(s, a)) < EXACT
        s, a = loops.kronecker_factors(model, sequences, t, draw, 3, EIGENVALUE_STREAM)
        assert relative_error(ours, torch.kron(s, a)) > PLAIN  # another draw is another matrix


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("fit", [EKFAC, Diagonal])
def test_eigenvalues_equal_a_loop_over_sequences(biased, sequences, batches, fit, draw):
    model, targets = biased
    curvature = fit(draw).fit(model, batches, targets, seed=3)
    loss_tokens = sum(s.loss_tokens for s in sequences)
    gradients, same_draw = (
        loops.pseudo_gradients_of(model, sequences, targets, draw, 3, stream)
        for stream in (EIGENVALUE_STREAM, COVARIANCE_STREAM)
    )
    for t in targets:
        block = curvature.blocks[t.name]
        looped = loops.eigenvalues(gradients, loss_tokens, t.name, block)
        assert relative_error(block.eigenvalues, looped) < EXACT
        # Not the square of the minibatch's gradient, not per sequence instead of per loss token,
        # and not from the draw that A and S were made of.
        summed = {t.name: sum(gradient[t.name] for gradient in gradients)}
        squared = loops.eigenvalues([summed], loss_tokens, t.name, block)
        per_sequence = loops.eigenvalues(gradients, len(sequences), t.name, block)
        stale = loops.eigenvalues(same_draw, loss_tokens, t.name, block)
        for wrong in (squared, per_sequence, stale):
            assert relative_error(block.eigenvalues, wrong) > PLAIN


def test_several_panels_give_the_same_factors(model, batches, targets, monkeypatch):
    """A and S are computed one triangle at a time, in panels of columns."""
    whole = KFAC().fit(model, batches, targets)
    monkeypatch.setattr(factors, "PANEL", 5)
    panels = KFAC().fit(model, batches, targets)
    assert operator_error(panels, whole, targets) < EXACT
    rows = randn(7, 12)
    covariance = CovarianceSum(12, torch.float64, rows.device)
    covariance.add(rows)
    assert relative_error(covariance.sum_, rows.T @ rows) > PLAIN  # it is one triangle only
    assert relative_error(covariance.mean(7), rows.T @ rows / 7) < EXACT


@pytest.mark.parametrize("rotated", ["neither", "outputs", "inputs", "both"])
def test_sequence_squares_square_after_the_sum(rotated):
    g, a, lengths = randn(7, 3), randn(7, 5, seed=1), [4, 2, 1]
    q_out = torch.linalg.qr(randn(3, 3, seed=2))[0] if rotated in ("outputs", "both") else None
    q_in = torch.linalg.qr(randn(5, 5, seed=3))[0] if rotated in ("inputs", "both") else None
    total = torch.zeros(3, 5).double()
    add_sequence_squares(total, g, a, lengths, q_out=q_out, q_in=q_in)
    turned_g, turned_a = g if q_out is None else g @ q_out, a if q_in is None else a @ q_in
    parts = list(zip(turned_g.split(lengths), turned_a.split(lengths), strict=True))
    assert relative_error(total, sum((gs.T @ rows) ** 2 for gs, rows in parts)) < EXACT
    assert relative_error(total, (turned_g**2).T @ turned_a**2) > PLAIN  # squared token by token


@pytest.mark.parametrize("rotated", [False, True], ids=["plain", "rotated"])
@pytest.mark.parametrize(
    ("lengths", "together", "batched"),
    [
        ([4, 4, 4, 4], 4, [4]),
        ([6, 5, 5, 4, 3], 2, [2, 2]),  # ragged, and one sequence that is left over
        ([6, 5, 0, 5], 4, [4]),
        ([20, 3, 3, 3, 3], 3, [2]),  # the first group would be mostly padding
        ([4, 4, 4], 1, []),
    ],
)
def test_squares_of_several_sequences_at_once(rotated, lengths, together, batched, monkeypatch):
    g, a = randn(sum(lengths), 3), randn(sum(lengths), 5, seed=1)
    turns = {}
    if rotated:
        turns = {"q_out": torch.linalg.qr(randn(3, 3, seed=2))[0]}
        turns |= {"q_in": torch.linalg.qr(randn(5, 5, seed=3))[0]}
    one_by_one, at_once = randn(3, 5, seed=4), randn(3, 5, seed=4)
    add_sequence_squares(one_by_one, g, a, lengths, **turns)
    sizes, bmm = [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda x, y: sizes.append(len(x)) or bmm(x, y))
    monkeypatch.setitem(factors.SLAB_BYTES, "cpu", together * 3 * 5 * 8 + 7)
    add_sequence_squares(at_once, g, a, lengths, **turns)
    assert sizes == batched
    assert relative_error(at_once, one_by_one) < 1e-12
    assert relative_error(at_once, randn(3, 5, seed=4)) > PLAIN  # something was added


def test_the_cheaper_side_is_turned_first():
    """Multiplications counted by hand: R·D² for rows, O·I·D a sequence for products."""
    # Two sequences of 20 rows, so R = 40, and D = 10.
    assert rows_first(20, 21)  # 40·100 = 4000 against 2·10·21·10 = 4200
    assert not rows_first(20, 19)  # 4000 against 3800
    assert rows_first(20, 11, readers=2)  # 4000 once against 2·2·10·11·10 = 4400


@pytest.mark.parametrize("first", [True, False], ids=["rows first", "product first"])
def test_eigenvalues_do_not_depend_on_how_they_are_computed(
    model, batches, targets, first, monkeypatch
):
    usual = EKFAC().fit(model, batches, targets)
    monkeypatch.setattr("kfade.curvature.sums.rows_first", lambda *_: first)
    assert operator_error(EKFAC().fit(model, batches, targets), usual, targets) < EXACT


# --- 4. Padding, batch size and order do not matter ---------------------------------------------


def operator_error(ours, theirs, targets) -> float:
    """The largest distance between two curvatures, as operators."""
    return max(
        relative_error(
            loops.block_matrix(ours.blocks[t.name], t.shape),
            loops.block_matrix(theirs.blocks[t.name], t.shape),
        )
        for t in targets
    )


def widened(batch: Batch, columns: int) -> Batch:
    """``batch`` with more padding on the right, of a token that is not the usual 0."""

    def pad(x, value):
        return torch.nn.functional.pad(x, (0, columns), value=value)

    return Batch(
        pad(batch.input_BT, 11), pad(batch.target_BT, 5), pad(batch.loss_BT, False),
        pad(batch.live_BT, False), batch.id_B,
    )  # fmt: skip


def fits_differ(fit, model, targets, first: list[Batch], second: list[Batch]) -> float:
    one = fit(sampled_labels).fit(model, first, targets, seed=5)
    return operator_error(fit(sampled_labels).fit(model, second, targets, seed=5), one, targets)


@pytest.mark.parametrize("fit", [KFAC, EKFAC, Diagonal])
def test_fit_does_not_depend_on_batches_padding_or_order(model, sequences, targets, fit):
    alone = make_batches(sequences, budget=1)
    assert len(alone) == len(sequences)
    together = make_batches(sequences, budget=10**6)
    assert len(together) == 1
    assert not together[0].live_BT.all()
    assert fits_differ(fit, model, targets, alone, together) < EIGENVECTORS
    assert fits_differ(fit, model, targets, alone, [widened(b, 4) for b in alone]) < EIGENVECTORS
    # Another order of the list, each sequence keeping its number.
    order = [5, 2, 7, 0, 1, 6, 4, 3]
    moved = make_batches([sequences[i] for i in order], budget=20)
    assert fits_differ(fit, model, targets, alone, moved) > PLAIN  # numbers went by the new places
    kept = [dataclasses.replace(b, id_B=torch.tensor(order)[b.id_B]) for b in moved]
    assert fits_differ(fit, model, targets, alone, kept[::-1]) < EIGENVECTORS


@pytest.mark.parametrize("fit", [KFAC, EKFAC])
def test_without_the_live_mask_padding_gets_into_the_fit(model, sequences, targets, fit):
    padded = make_batches(sequences, budget=10**6)
    unmasked = [dataclasses.replace(b, live_BT=torch.ones_like(b.live_BT)) for b in padded]
    assert fits_differ(fit, model, targets, padded, unmasked) > PLAIN


@pytest.mark.parametrize("fit", [KFAC, EKFAC, Diagonal])
def test_labels_are_drawn_at_loss_positions_only(model, sequences, targets, fit):
    batches = make_batches(sequences, budget=20)
    everywhere = [dataclasses.replace(b, loss_BT=b.live_BT) for b in batches]
    assert sum(b.loss_tokens for b in everywhere) > sum(b.loss_tokens for b in batches)
    assert fits_differ(fit, model, targets, batches, everywhere) > PLAIN
    seen = []

    def counted(p_NV, key_N):
        seen.extend(key_N.tolist())
        return sampled_labels(p_NV, key_N)

    fit(counted).fit(model, batches, targets)
    passes = 2 if fit is EKFAC else 1
    # Every token once a pass, each time with a number of its own.
    assert len(set(seen)) == len(seen) == passes * sum(s.loss_tokens for s in sequences)


# --- 5. Draws: right in expectation, random, and keyed ------------------------------------------


def keys(count: int, seed: int = 0, stream: int = 0) -> torch.Tensor:
    return token_keys(seed, stream, torch.arange(count), torch.zeros(count, dtype=torch.long))


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("width", [5, 70], ids=["V=5", "V=70"])  # 70: more than one word of signs
def test_draws_have_the_fisher_as_their_covariance(draw, width):
    """‖mean u uᵀ − Fisher‖ falls as 1/√n, so the mean is right and the draws are independent."""
    p = (1.5 * randn(width)).softmax(0)
    counts, total = (64, 1024, 16384), 65536
    u_NV = draw(p.expand(total, width), keys(total))
    exact = loops.fisher(p)
    small, medium, large = (
        math.sqrt(sum(relative_error(u.T @ u / n, exact) ** 2 for u in u_NV.split(n)) * n / total)
        for n in counts
    )
    assert small > 0.1  # a few draws are not the Fisher
    # Each count is 16 times the last, so root mean square errors fall 4-fold. The last is a mean of
    # four, good to some 20 %; a bias of a few percent would show in it.
    assert small / medium == pytest.approx(4, rel=0.2)
    assert medium / large == pytest.approx(4, rel=0.5)
    assert large < 0.05
    # Gradients of a log-likelihood: they sum to 0 over the vocabulary, and average to 0 (the mean
    # of 16384 draws has a squared length of trace / 16384 in expectation; 3 is far outside).
    assert u_NV.sum(1).abs().max() < EXACT
    assert u_NV[-16384:].mean(0).square().sum() < 3 * exact.trace() / 16384


@pytest.mark.parametrize("draw", DRAWS)
def test_a_wrong_draw_is_caught(draw):
    """Without the projection, or with labels of other probabilities, the covariance is wrong."""
    p = (1.5 * randn(5)).softmax(0)
    flatter = p.sqrt() / p.sqrt().sum()
    u_NV = draw(flatter.expand(16384, 5), keys(16384))
    assert relative_error(u_NV.T @ u_NV / 16384, loops.fisher(p)) > 0.1
    assert relative_error(torch.diag(p), loops.fisher(p)) > 0.1


def test_square_root_draw_speaks_where_a_label_says_nothing():
    """p_y = 0.999: a label is the argmax 999 times in 1000, the square-root draw never stays mute.

    Both have the same mean square, so the estimate from labels hangs on a few rare draws.
    """
    p = torch.tensor([0.999, 0.0005, 0.0005], dtype=torch.float64)
    size = {d: d(p.expand(2000, 3), keys(2000)).square().sum(1) for d in DRAWS}
    trace = loops.fisher(p).trace()
    assert (size[sampled_labels] < 0.01 * trace).double().mean() > 0.99
    assert (size[square_root_draw] > 0.1 * trace).double().mean() > 0.45
    assert size[square_root_draw].std() < 0.1 * size[sampled_labels].std()


def test_label_frequencies_match_the_probabilities():
    p = (1.5 * randn(VOCABULARY)).softmax(0)
    count = 20_000
    u_NV = sampled_labels(p.expand(count, -1), keys(count))
    observed = (u_NV + p).round().sum(0)
    assert observed.sum() == count

    def chi_square(p):
        return ((observed - count * p).square() / (count * p)).sum()

    # V − 1 = 16 degrees of freedom: mean 16, standard deviation √32; 16 + 5√32 is one in 10⁵.
    assert chi_square(p) < 16 + 5 * math.sqrt(32)
    assert chi_square(p.roll(1)) > 1000


def test_float32_labels_stay_in_the_vocabulary_and_off_impossible_tokens():
    """Rounding of the running sum must not send a token past the end, or to one with p = 0."""
    p = torch.zeros(50_001)
    p[1:-1] = torch.rand(49_999, generator=torch.Generator().manual_seed(0))
    p /= p.sum()
    assert p.cumsum(0)[-1] != 1.0  # the rounding that the test is about
    u_NV = sampled_labels(p.expand(200, -1), keys(200))
    label_N = (u_NV + p).argmax(1)
    assert (p[label_N] > 0).all()
    assert len(label_N.unique()) > 190


def test_token_keys_are_all_different_and_look_uniform():
    seed_stream = [(seed, stream) for seed in (0, 1, 2, -1) for stream in (0, 1)]
    id_N, position_N = (x.reshape(-1) for x in torch.meshgrid(torch.arange(40), torch.arange(40),
                                                               indexing="ij"))  # fmt: skip
    made = torch.cat([token_keys(seed, stream, id_N, position_N) for seed, stream in seed_stream])
    assert len(made.unique()) == len(made) == 8 * 1600
    naive = torch.cat([seed + stream + id_N + position_N for seed, stream in seed_stream])
    assert len(naive.unique()) < 100  # consecutive numbers do collide unless they are hashed
    # Kolmogorov-Smirnov, in every 16-bit part of the key: 1.95/√n is passed once in 1000.
    for bits in (0, 16, 32, 48):
        uniform = ((made >> bits) & 0xFFFF).double() / 65536
        assert kolmogorov(uniform) < 1.95 / math.sqrt(len(made))
        assert kolmogorov(uniform.square()) > 0.1
        # Neighbours in position and in id are uncorrelated: 4 standard errors of 1/√n.
        grid = uniform.view(8, 40, 40) - 0.5
        for one, other in ((grid[:, :, 1:], grid[:, :, :-1]), (grid[:, 1:], grid[:, :-1])):
            assert 12 * (one * other).mean().abs() < 4 / math.sqrt(one.numel())


def kolmogorov(x_N: torch.Tensor) -> float:
    """Largest distance between the empirical and the uniform distribution function."""
    steps = torch.arange(len(x_N) + 1).double() / len(x_N)
    ordered = x_N.sort().values
    return max((steps[1:] - ordered).max().item(), (ordered - steps[:-1]).max().item())


@pytest.mark.parametrize("draw", DRAWS)
def test_ekfac_trace_and_diagonal_are_those_of_the_exact_matrix_on_average(draw):
    """Many loss tokens a sequence, many seeds: E tr Λ = tr G for each layer; K-FAC's is another."""
    model = tiny_llama(layers=1)
    targets = find_targets(model)
    batches = make_batches(random_sequences(4, longest=7))
    exact = unflatten(gauss_newton_matrix(model, batches, targets).diagonal(), targets)
    fits = {
        fit: [fit(draw).fit(model, batches, targets, seed=seed) for seed in range(seeds)]
        for fit, seeds in ((EKFAC, 60), (Diagonal, 120), (KFAC, 40))
    }
    kfac_scores = []
    for t in targets:
        grids = {
            fit: torch.stack([c.blocks[t.name].eigenvalues for c in made])
            for fit, made in fits.items()
        }
        traces = {fit: grid.sum((1, 2)) for fit, grid in grids.items()}
        for fit in (EKFAC, Diagonal):
            score, standard_error = score_of_mean(traces[fit], exact[t.name].sum())
            assert abs(score) < 4  # standard errors: by chance once in 16000
            assert standard_error < 0.1 * exact[t.name].sum()  # and sharp enough to mean something
        kfac_scores.append(score_of_mean(traces[KFAC], exact[t.name].sum())[0])
        scores, _ = score_of_mean(grids[Diagonal], exact[t.name])
        # 96 entries, each a standard normal: their mean square is 1 ± 0.15; correlated and
        # skewed as they are, 2 is far outside only for a systematic error.
        assert scores.square().mean() < 2
        assert score_of_mean(grids[Diagonal], 1.5 * exact[t.name])[0].square().mean() > 4
    assert max(abs(score) for score in kfac_scores) > 6


def score_of_mean(samples_S, expected):
    """(distance of the samples' mean from ``expected`` in standard errors, standard error)."""
    standard_error = samples_S.std(0) / math.sqrt(len(samples_S))
    return (samples_S.mean(0) - expected) / standard_error, standard_error


# --- 7. The unit: ½ δᵀGδ is the mean KL per loss token -----------------------------------------


def random_direction(targets) -> dict[str, torch.Tensor]:
    return {t.name: randn(*t.shape, seed=i) for i, t in enumerate(targets)}


def test_measured_kl_approaches_the_exact_form(biased, batches):
    model, targets = biased
    direction = random_direction(targets)
    delta = flatten(direction, targets)
    changes = parameter_changes(targets, direction)
    predicted = 0.5 * delta @ gauss_newton_matrix(model, batches, targets) @ delta

    def off(scale: float) -> float:
        """|measured / predicted − 1|, the worse of both signs: odd terms cannot cancel in both."""
        updates = (Update({}).plus(changes, s) for s in (scale, -scale))
        measured = (measured_kl(model, batches, update) for update in updates)
        return max(abs(kl / (scale**2 * predicted) - 1) for kl in measured)

    assert off(1.0) > 0.1  # far out the form does not predict
    # Near by, what is missing is of third order: each tenth of the scale brings a tenth of it.
    assert off(1e-3) < 0.2 * off(1e-2)
    assert off(1e-4) < min(0.2 * off(1e-3), 2e-3)
    # Per loss token: counting all live positions instead is off by their ratio.
    live = sum(int(b.live_BT.sum()) for b in batches)
    assert live > 1.2 * sum(b.loss_tokens for b in batches)


def test_matrix_free_products_equal_the_dense_matrix(biased, batches):
    model, targets = biased
    direction = random_direction(targets)
    delta = flatten(direction, targets)
    g = gauss_newton_matrix(model, batches, targets)
    # 1e-9: forward and reverse mode through two blocks, their norms and a softmax.
    form = quadratic_form(model, batches, targets, direction)
    assert form == pytest.approx((delta @ g @ delta).item(), rel=1e-9)
    product = gauss_newton_product(model, batches, targets, direction)
    assert relative_error(flatten(product, targets), g @ delta) < 1e-9
    # Forms of several vectors, each of some of the layers.
    some = [direction, *({t.name: direction[t.name]} for t in targets[:2])]
    zero = {t.name: torch.zeros(t.shape).double() for t in targets}
    rows = torch.stack([flatten({**zero, **part}, targets) for part in some])
    forms = gram_matrix(model, batches, targets, some)
    assert relative_error(forms, rows @ g @ rows.T) < 1e-9
    # Layers do act on one another: the blocks alone are not the matrix.
    alone = sum(quadratic_form(model, batches, [t], {t.name: direction[t.name]}) for t in targets)
    assert abs(alone / form - 1) > PLAIN


def test_curvature_of_one_layer_does_not_need_the_others(model, batches, targets):
    """A fit of some targets equals that part of the fit of all: lower blocks leave no graph."""
    some = [t for t in targets if t.block == 1]
    assert 0 < len(some) < len(targets)
    for fit in (KFAC, EKFAC, Diagonal):
        part, whole = fit().fit(model, batches, some), fit().fit(model, batches, targets)
        assert operator_error(part, whole, some) < EIGENVECTORS
        other = fit().fit(model, batches, some, seed=1)
        assert operator_error(part, other, some) > PLAIN


# --- 11. Chunks of the head and shared inputs are only ways of computing ------------------------


@pytest.mark.parametrize("draw", DRAWS)
def test_head_in_chunks_equals_the_head_in_one(model, batches, targets, draw, monkeypatch):
    def compute(chunk: int):
        monkeypatch.setattr(kfade.models.head, "chunk_positions", lambda *_: chunk)
        direction = random_direction(targets)
        return (
            EKFAC(draw).fit(model, batches, targets),
            [forget_gradient(model, batches, targets, o) for o in (margin, cross_entropy)],
            quadratic_form(model, batches, targets, direction),
            gauss_newton_product(model, batches, targets, direction),
            measured_kl(model, batches, Update(parameter_changes(targets, direction))),
        )

    small, whole = compute(3), compute(10**6)
    monkeypatch.setattr(kfade.models.head, "chunk_positions", lambda *_: 3)
    assert max(len(list(read_head(model).chunks(torch.zeros(b.loss_tokens)))) for b in batches) > 2
    assert operator_error(small[0], whole[0], targets) < EIGENVECTORS
    for ours, theirs in zip([*small[1], small[3]], [*whole[1], whole[3]], strict=True):
        # The same numbers but for the summation order within a matrix product.
        assert relative_error(flatten(ours, targets), flatten(theirs, targets)) < 1e-12
    assert small[2] == pytest.approx(whole[2], rel=1e-12)
    assert small[4] == pytest.approx(whole[4], rel=1e-12)


def test_a_shared_input_factor_equals_a_separate_one(model, batches, targets):
    """gate and up read one tensor: one A, one basis, the same curvature as with an A each."""
    apart = [dataclasses.replace(t, input_of=t.name) for t in targets]
    readers = [t for t in targets if t.input_of != t.name]
    assert [t.name.split(".")[-2] for t in readers] == ["up_proj", "up_proj"]
    x = random_direction(targets)
    for fit in (KFAC, EKFAC):
        shared, separate = fit().fit(model, batches, targets), fit().fit(model, batches, apart)
        for t in readers:
            assert shared.blocks[t.name].q_in is shared.blocks[t.input_of].q_in
            assert separate.blocks[t.name].q_in is not separate.blocks[t.input_of].q_in
        assert operator_error(shared, separate, targets) < 1e-12
    for ours, theirs in (
        (gauss_newton_product(model, batches, part, x) for part in (targets, apart)),
        (forget_gradient(model, batches, part, margin) for part in (targets, apart)),
    ):
        assert relative_error(flatten(ours, targets), flatten(theirs, targets)) < 1e-12
    # Sharing what is not the same tensor would show: block 0's basis is not block 1's.
    gates = [t for t in targets if t.input_of == t.name and "gate_proj" in t.name]
    q_in = [separate.blocks[t.name].q_in.abs() for t in gates]
    assert relative_error(*q_in) > PLAIN


def test_any_choice_of_targets_can_be_fitted(model, batches, targets):
    """Also one whose input is shared with, and named after, a target that was left out."""
    up = [target for target in targets if "up_proj" in target.name]
    assert all(target.input_of != target.name for target in up)
    whole, part = kfade.KFAC().fit(model, batches, targets), kfade.KFAC().fit(model, batches, up)
    for target in up:
        x = torch.randn(target.shape, dtype=torch.float64)
        ours, theirs = part.blocks[target.name].matvec(x), whole.blocks[target.name].matvec(x)
        # Gradients come from the same backward pass; only summation differs.
        assert relative_error(ours, theirs) < 1e-10
