"""Agreement with curvlinops (Dangel, Eschenhagen, et al.), the library the paper built on.

Both see one tiny Llama on the same sequences: kfade through its batches, curvlinops through a
wrapper that returns logits at the same loss positions. All in float64.

Normalisation. curvlinops takes the loss of D sequences with L loss tokens each and T positions a
sequence. With reduction="mean" over one batch, the output gradients that reach its hooks are those
of the summed log-likelihood divided by the D·L loss tokens, and it multiplies their covariance by
(D·L)² / (D·L); so

    its input covariance     (1 / (D·T)) Σ a aᵀ = (1/M) Σ a aᵀ    ours
    its gradient covariance  (1 / (D·L)) Σ g gᵀ = (1/N) Σ g gᵀ    ours
    its corrected eigenvalues (1 / (D·L)) Σ_sequences (Q_Oᵀ (Σ_t g_t a_tᵀ) Q_I)∘² = ours:

the sum over positions is inside the square in both libraries, so the two agree with weight sharing
too, not only for one position a sequence. With reduction="sum" its gradient covariance and
eigenvalues are not divided: N = D·L times ours.

Labels. Its exact ("type-2") Fisher sends back the V columns √p_k (e_k − p) of a square root of
diag(p) − p pᵀ, each at all positions at once, and adds up the V results. Ours gets the same by V
draws, column k at every token, whose sums are compared. Its Monte-Carlo Fisher is compared with
our sampled labels, which are handed to it.
"""

from __future__ import annotations

import pytest
import torch
import zoo
from torch import nn

import kfade
from kfade.curvature.block import EigenBlock
from kfade.curvature.curvature import Curvature
from kfade.curvature.draws import token_keys
from kfade.curvature.fit import (
    COVARIANCE_STREAM,
    EIGENVALUE_STREAM,
    _fit_bases,
    _fit_eigenvalues,
)

curvlinops = pytest.importorskip("curvlinops")

SEQUENCES, POSITIONS = 8, 7  # 56 positions: more than any layer is wide, so no factor is singular
SEED = 5
# Exact identities, evaluated in another order: rounding of float64, magnified by the closeness of
# eigenvalues where a basis enters.
TOLERANCE = {"rtol": 1e-6, "atol": 1e-12}


class Problem:
    """One data set and model, seen by both libraries.

    The last ``scored`` positions of each sequence carry loss.
    """

    def __init__(self, scored: int):
        self.model = zoo.tiny("llama")
        self.targets = kfade.find_targets(self.model)
        prompt = POSITIONS + 1 - scored
        sequences = zoo.sequences((POSITIONS + 1,) * SEQUENCES, seed=9, prompt=prompt)
        (self.batch,) = kfade.make_batches(sequences)
        self.loss_tokens = SEQUENCES * scored
        assert self.batch.loss_tokens == self.loss_tokens
        assert self.batch.live_BT.all()
        self.network = AtLossPositions(self.model, scored)
        self.parameters = [t.module.weight for t in self.targets]
        self.data = [(self.batch.input_BT, self.batch.target_BT[:, -scored:])]

    def operator(self, kind, reduction="mean", joint=False, **options):
        """curvlinops' operator on this problem."""
        return kind(
            self.network,
            nn.CrossEntropyLoss(reduction=reduction),
            self.parameters,
            self.data,
            check_deterministic=False,
            kfac_approx="expand",
            separate_weight_and_bias=not joint,
            **options,
        )

    def probabilities(self):
        with torch.no_grad():
            logits = self.model(self.batch.input_BT, use_cache=False).logits
        return logits[self.batch.loss_BT].softmax(dim=-1)

    def key(self, target):
        """curvlinops' name of a target's layer."""
        return f"model.{target.name.removesuffix('.weight')}"


class AtLossPositions(nn.Module):
    """Logits [D, V, L] at the last ``scored`` positions, classes second as torch's losses ask."""

    def __init__(self, model, scored):
        super().__init__()
        self.model, self.scored = model, scored

    def forward(self, input_BT):
        logits_BTV = self.model(input_BT, use_cache=False).logits
        return logits_BTV[:, -self.scored :].transpose(1, 2)


@pytest.fixture(params=[POSITIONS, 3, 1], ids=lambda scored: f"{scored} scored")
def problem(request):
    with zoo.Double():
        yield Problem(request.param)


def column(k):
    """The draw √p_k (e_k − p) at every token."""

    def draw(p_NV, key_N):
        u_NV = -p_NV
        u_NV[:, k] += 1
        return u_NV * p_NV[:, k : k + 1].sqrt()

    return draw


def exact_factors(problem):
    """(A, S) of each target by name, S summed over the V columns."""
    a, s = {}, {}
    for k in range(zoo.VOCABULARY):
        found = _fit_bases(problem.model, [problem.batch], problem.targets, column(k), 0)
        for name, (s_values, q_out, a_values, q_in) in found.items():
            a[name] = q_in @ torch.diag(a_values) @ q_in.T
            s[name] = s.get(name, 0) + q_out @ torch.diag(s_values) @ q_out.T
    return {name: (a[name], s[name]) for name in a}


def exact_kfac(problem):
    blocks = {}
    for name, (a, s) in exact_factors(problem).items():
        (a_values, q_in), (s_values, q_out) = torch.linalg.eigh(a), torch.linalg.eigh(s)
        blocks[name] = EigenBlock(q_out, q_in, torch.outer(s_values, a_values))
    return Curvature(blocks)


def exact_ekfac(problem):
    kfac = exact_kfac(problem)
    bases = {name: (block.q_out, block.q_in) for name, block in kfac.blocks.items()}
    grids = {}
    for k in range(zoo.VOCABULARY):
        found = _fit_eigenvalues(
            problem.model, [problem.batch], problem.targets, bases, column(k), 0
        )
        grids = {name: grids.get(name, 0) + grid for name, grid in found.items()}
    return Curvature({name: EigenBlock(*bases[name], grids[name]) for name in bases})


def random_matrices(problem):
    generator = torch.Generator().manual_seed(3)
    return {
        t.name: torch.randn(t.shape, generator=generator, dtype=torch.float64)
        for t in problem.targets
    }


def check_products(problem, ours, theirs, factor=1.0):
    """G x, (G + λI)⁻¹ x and xᵀGx of both, for a random x and λ from tiny to large."""
    x = random_matrices(problem)
    listed = list(x.values())
    for name, product in zip(x, theirs @ listed, strict=True):
        torch.testing.assert_close(ours.matvec(x)[name] * factor, product, **TOLERANCE)
    form = sum((a * b).sum() for a, b in zip(listed, theirs @ listed, strict=True))
    assert ours.quadratic(x) * factor == pytest.approx(form.item(), rel=1e-6)
    largest = max(block.eigenvalues.max().item() for block in ours.blocks.values())
    for damping in (1e-6 * largest, 1e-2 * largest, largest):
        inverse = curvlinops.KFACInverseLinearOperator(
            theirs, damping=damping * factor, use_exact_damping=True
        )
        solved = ours.solve(x, damping=damping, relative=False)
        for name, product in zip(x, inverse @ listed, strict=True):
            torch.testing.assert_close(solved[name] / factor, product, **TOLERANCE)


# --- the exact Fisher ------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_kronecker_factors(problem, reduction):
    theirs = problem.operator(
        curvlinops.KFACLinearOperator, reduction, fisher_type=curvlinops.FisherType.TYPE2
    )
    theirs.compute_kronecker_factors()
    factor = problem.loss_tokens if reduction == "sum" else 1
    ours = exact_factors(problem)
    for target in problem.targets:
        a, s = ours[target.name]
        their_a = theirs._input_covariances[problem.key(target)]
        their_s = theirs._gradient_covariances[problem.key(target)]
        torch.testing.assert_close(a, their_a, **TOLERANCE)
        torch.testing.assert_close(s * factor, their_s, **TOLERANCE)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_kfac_products(problem, reduction):
    theirs = problem.operator(
        curvlinops.KFACLinearOperator, reduction, fisher_type=curvlinops.FisherType.TYPE2
    )
    factor = problem.loss_tokens if reduction == "sum" else 1
    check_products(problem, exact_kfac(problem), theirs, factor)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ekfac_eigenvalues_and_products(problem, reduction):
    theirs = problem.operator(
        curvlinops.EKFACLinearOperator, reduction, fisher_type=curvlinops.FisherType.TYPE2
    )
    factor = problem.loss_tokens if reduction == "sum" else 1
    ours = exact_ekfac(problem)
    theirs.compute_eigenvalue_correction()
    for position, target in enumerate(problem.targets):
        # Bases agree up to signs, which squares do not show; eigenvalues ascend in both.
        their_grid = theirs._corrected_eigenvalues[problem.key(target)][position]
        our_grid = ours.blocks[target.name].eigenvalues
        torch.testing.assert_close(our_grid * factor, their_grid, **TOLERANCE)
    check_products(problem, ours, theirs, factor)


def test_the_correction_is_not_idle():
    # Negative control: K-FAC's and EK-FAC's eigenvalues differ by far more than the tolerance.
    with zoo.Double():
        problem = Problem(POSITIONS)
        kfac, ekfac = exact_kfac(problem), exact_ekfac(problem)
    for name, block in kfac.blocks.items():
        gap = (block.eigenvalues - ekfac.blocks[name].eigenvalues).norm()
        assert gap > 0.1 * block.eigenvalues.norm()


# --- sampled labels, end to end --------------------------------------------------------------


def drawn_labels(problem, stream):
    """The labels that our fit draws, [N] in the order of the loss tokens."""
    row_N, position_N = problem.batch.loss_BT.nonzero(as_tuple=True)
    key_N = token_keys(SEED, stream, problem.batch.id_B[row_N], position_N)
    p_NV = problem.probabilities()
    return (kfade.sampled_labels(p_NV, key_N) + p_NV).argmax(dim=1)


def handing_over(kind, streams):
    """``kind`` with labels taken from ``streams`` in turn instead of its own draws."""

    class WithOurLabels(kind):
        labels = iter(streams)

        def draw_label(self, output):
            return next(self.labels)

    return WithOurLabels


def test_kfac_with_our_labels(problem):
    kind = handing_over(curvlinops.KFACLinearOperator, [drawn_labels(problem, COVARIANCE_STREAM)])
    theirs = problem.operator(kind, fisher_type=curvlinops.FisherType.MC)
    ours = kfade.fit_kfac(
        problem.model, [problem.batch], problem.targets, draw=kfade.sampled_labels, seed=SEED
    )
    check_products(problem, ours, theirs)


def test_ekfac_with_our_labels(problem):
    # A fresh draw for the eigenvalues, as our fit makes one.
    streams = [drawn_labels(problem, s) for s in (COVARIANCE_STREAM, EIGENVALUE_STREAM)]
    assert not torch.equal(*streams)
    kind = handing_over(curvlinops.EKFACLinearOperator, streams)
    theirs = problem.operator(kind, fisher_type=curvlinops.FisherType.MC)
    ours = kfade.fit_ekfac(
        problem.model, [problem.batch], problem.targets, draw=kfade.sampled_labels, seed=SEED
    )
    check_products(problem, ours, theirs)


def test_joint_biases_agree_too():
    # GPT-NeoX, weights and biases as one matrix on both sides.
    with zoo.Double():
        problem = Problem(POSITIONS)
        problem.model = zoo.tiny("gpt_neox")
        problem.targets = kfade.find_targets(problem.model, joint_bias=True)
        problem.network = AtLossPositions(problem.model, POSITIONS)
        problem.parameters = [p for t in problem.targets for p in (t.module.weight, t.module.bias)]
        streams = [drawn_labels(problem, s) for s in (COVARIANCE_STREAM, EIGENVALUE_STREAM)]
        kind = handing_over(curvlinops.EKFACLinearOperator, streams)
        theirs = problem.operator(kind, fisher_type=curvlinops.FisherType.MC, joint=True)
        ours = kfade.fit_ekfac(
            problem.model, [problem.batch], problem.targets, draw=kfade.sampled_labels, seed=SEED
        )
        x = random_matrices(problem)
        split = [part for t in problem.targets for part in t.to_parameters(x[t.name]).values()]
        products = iter(theirs @ split)
        for target in problem.targets:
            expected = {target.name: next(products), target.bias: next(products)}
            torch.testing.assert_close(
                ours.matvec(x)[target.name], target.from_parameters(expected), **TOLERANCE
            )
