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

both put the sum over a sequence's positions inside the square. With reduction="sum" its gradient
covariance and eigenvalues are not divided: N = D·L times ours.

Its EK-FAC refuses more than one loss token a sequence, so it is compared as it is with one loss
token and all positions live (so weight sharing is in play: M = 7 N), and with several through a
subclass that lifts the refusal: one sequence's loss terms then go into one gradient, as in ours,
where labels drawn independently of one another make their cross terms vanish on average.

Labels. Its exact ("type-2") Fisher sends back the V columns √p_k (e_k − p) of a square root of
diag(p) − p pᵀ, each at all positions at once, and adds up the V results. Ours gets the same by V
draws, column k at every token, whose sums are compared. Its Monte-Carlo Fisher is compared with
our sampled labels, which are handed to it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache, cached_property

import pytest
import torch
import zoo
from torch import nn

import kfade
from kfade import Damping
from kfade.curvature.block import EigenBlock
from kfade.curvature.curvature import Curvature
from kfade.curvature.draws import token_keys
from kfade.curvature.fit import COVARIANCE_STREAM, EIGENVALUE_STREAM
from kfade.method.gauge import parameter_changes

curvlinops = pytest.importorskip("curvlinops")

POSITIONS = 7
LOSS_TOKENS = 30  # at least: more than any layer is wide, so no factor is singular, no basis free
SEED = 5
# Exact identities, evaluated in another order: rounding of float64, magnified by the closeness of
# eigenvalues where a basis enters.
TOLERANCE = {"rtol": 1e-6, "atol": 1e-12}


class Problem:
    """One data set and model, seen by both libraries.

    The last ``scored`` positions of each sequence carry loss.
    """

    def __init__(self, scored: int, family: str = "llama", joint_bias: bool = False):
        self.model = zoo.tiny(family)
        self.targets = kfade.find_targets(self.model, joint_bias=joint_bias)
        count, prompt = -(-LOSS_TOKENS // scored), POSITIONS + 1 - scored
        sequences = zoo.sequences((POSITIONS + 1,) * count, seed=9, prompt=prompt)
        (self.batch,) = kfade.make_batches(sequences)
        self.loss_tokens = count * scored
        assert self.batch.loss_tokens == self.loss_tokens
        assert self.batch.live_BT.all()
        self.network = AtLossPositions(self.model, scored)
        self.joint_bias = joint_bias
        names = [n for t in self.targets for n in (t.name, t.bias) if n is not None]
        self.parameters = [self.model.get_parameter(name) for name in names]
        target_BL = self.batch.target_BT[:, -scored:]
        self.data = [(self.batch.input_BT, target_BL[:, 0] if scored == 1 else target_BL)]

    def operator(self, kind, reduction="mean", **options):
        """curvlinops' operator on this problem."""
        return kind(
            self.network,
            nn.CrossEntropyLoss(reduction=reduction),
            self.parameters,
            self.data,
            check_deterministic=False,
            kfac_approx="expand",
            separate_weight_and_bias=not self.joint_bias,
            **options,
        )

    def fit(self, estimator, **options):
        """One of kfade's fits on this problem."""
        return estimator.fit(self.model, [self.batch], self.targets, **options)

    @cached_property
    def exact_factors(self):
        """(A / tr A, S tr A) of each target by name, S summed over the V columns.

        A block holds the product of the factors' eigenvalues; how a scale is shared between A and
        S cannot be told from it and makes no difference, so A is given trace 1 here.
        """
        a, s = {}, {}
        for k in range(zoo.VOCABULARY):
            for name, block in self.fit(kfade.KFAC(column(k))).blocks.items():
                grid, q_out, q_in = block.eigenvalues, block.q_out, block.q_in
                a[name] = q_in @ torch.diag(grid.sum(0) / grid.sum()) @ q_in.T
                s[name] = s.get(name, 0) + q_out @ torch.diag(grid.sum(1)) @ q_out.T
        return {name: (a[name], s[name]) for name in a}

    @cached_property
    def exact_kfac(self):
        blocks = {}
        for name, (a, s) in self.exact_factors.items():
            (a_values, q_in), (s_values, q_out) = torch.linalg.eigh(a), torch.linalg.eigh(s)
            blocks[name] = EigenBlock(q_out, q_in, torch.outer(s_values, a_values))
        return Curvature(blocks)

    @cached_property
    def exact_ekfac(self):
        grids = {}
        for k in range(zoo.VOCABULARY):
            found = kfade.EKFAC(column(k)).correct(
                self.exact_kfac, self.model, [self.batch], self.targets
            )
            for name, block in found.blocks.items():
                grids[name] = grids.get(name, 0) + block.eigenvalues
        blocks = self.exact_kfac.blocks
        return Curvature({n: replace(blocks[n], eigenvalues=grids[n]) for n in grids})

    def probabilities(self):
        with torch.no_grad():
            logits = self.model(self.batch.input_BT, use_cache=False).logits
        return logits[self.batch.loss_BT].softmax(dim=-1)

    def key(self, target):
        """curvlinops' name of a target's layer."""
        return f"model.{target.name.removesuffix('.weight')}"


class AtLossPositions(nn.Module):
    """Logits at the last ``scored`` positions as torch's losses ask: [D, V], or [D, V, L]."""

    def __init__(self, model, scored):
        super().__init__()
        self.model, self.scored = model, scored

    def forward(self, input_BT):
        logits_BTV = self.model(input_BT, use_cache=False).logits
        if self.scored == 1:
            return logits_BTV[:, -1]
        return logits_BTV[:, -self.scored :].transpose(1, 2)


one_problem = cache(Problem)


@pytest.fixture(params=[POSITIONS, 3, 1], ids=lambda scored: f"{scored} scored")
def problem(request):
    with zoo.Double():
        yield one_problem(request.param)


def column(k):
    """The draw √p_k (e_k − p) at every token."""

    def draw(p_NV, key_N):
        u_NV = -p_NV
        u_NV[:, k] += 1
        return u_NV * p_NV[:, k : k + 1].sqrt()

    return draw


def check_products(problem, ours, theirs, factor=1.0):
    """G x, (G + λI)⁻¹ x and xᵀGx of both, for a random x and λ from tiny to large."""
    generator = torch.Generator().manual_seed(3)
    x = {}
    for target in problem.targets:
        x[target.name] = torch.randn(target.shape, generator=generator, dtype=torch.float64)
    listed = list(parameter_changes(problem.targets, x).values())
    product = parameter_changes(problem.targets, ours.matvec(x))
    for mine, other in zip(product.values(), theirs @ listed, strict=True):
        torch.testing.assert_close(mine * factor, other, **TOLERANCE)
    form = sum((a * b).sum() for a, b in zip(listed, theirs @ listed, strict=True))
    assert ours.quadratic(x) * factor == pytest.approx(form.item(), rel=1e-6)
    largest = max(block.eigenvalues.max().item() for block in ours.blocks.values())
    for damping in (1e-6 * largest, 1e-2 * largest, largest):
        inverse = curvlinops.KFACInverseLinearOperator(
            theirs, damping=damping * factor, use_exact_damping=True
        )
        solved = parameter_changes(
            problem.targets, ours.solve(x, damping=Damping(damping, relative=False))
        )
        for mine, other in zip(solved.values(), inverse @ listed, strict=True):
            torch.testing.assert_close(mine / factor, other, **TOLERANCE)


# --- the exact Fisher ------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_kfac_factors_and_products(problem, reduction):
    theirs = problem.operator(
        curvlinops.KFACLinearOperator, reduction, fisher_type=curvlinops.FisherType.TYPE2
    )
    theirs.compute_kronecker_factors()
    factor = problem.loss_tokens if reduction == "sum" else 1
    for target in problem.targets:
        a, s = problem.exact_factors[target.name]
        their_a = theirs._input_covariances[problem.key(target)]
        their_s = theirs._gradient_covariances[problem.key(target)]
        torch.testing.assert_close(a, their_a / their_a.trace(), **TOLERANCE)
        torch.testing.assert_close(s * factor, their_s * their_a.trace(), **TOLERANCE)
    check_products(problem, problem.exact_kfac, theirs, factor)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ekfac_eigenvalues_and_products(reduction):
    with zoo.Double():
        problem = one_problem(1)
        theirs = problem.operator(
            curvlinops.EKFACLinearOperator, reduction, fisher_type=curvlinops.FisherType.TYPE2
        )
        theirs.compute_eigenvalue_correction()
        factor = problem.loss_tokens if reduction == "sum" else 1
        for position, target in enumerate(problem.targets):
            # Bases agree up to signs, which squares do not show; eigenvalues ascend in both.
            their_grid = theirs._corrected_eigenvalues[problem.key(target)][position]
            our_grid = problem.exact_ekfac.blocks[target.name].eigenvalues
            torch.testing.assert_close(our_grid * factor, their_grid, **TOLERANCE)
            # Negative control: the correction is far larger than the tolerance.
            kfac_grid = problem.exact_kfac.blocks[target.name].eigenvalues
            assert (our_grid - kfac_grid).norm() > 0.1 * kfac_grid.norm()
        check_products(problem, problem.exact_ekfac, theirs, factor)


# --- sampled labels, end to end --------------------------------------------------------------


def drawn_labels(problem, stream):
    """The labels that our fit draws, [N] in the order of the loss tokens."""
    row_N, position_N = problem.batch.loss_BT.nonzero(as_tuple=True)
    key_N = token_keys(SEED, stream, problem.batch.id_B[row_N], position_N)
    p_NV = problem.probabilities()
    return (kfade.sampled_labels(p_NV, key_N) + p_NV).argmax(dim=1)


def handing_over(operator, streams):
    """``operator`` with labels taken from ``streams`` in turn, and any number of loss tokens."""

    class WithOurLabels(operator):
        labels = iter(streams)

        def draw_label(self, output):
            return next(self.labels)

        def _rearrange_for_larger_than_2d_output(self, output, y):
            parent = curvlinops.KFACLinearOperator
            return parent._rearrange_for_larger_than_2d_output(self, output, y)

    return WithOurLabels


def check_sampled(problem, kind, operator, streams):
    streams = [drawn_labels(problem, stream) for stream in streams]
    theirs = problem.operator(handing_over(operator, streams), fisher_type=curvlinops.FisherType.MC)
    ours = problem.fit(kind(kfade.sampled_labels), seed=SEED)
    check_products(problem, ours, theirs)


def test_kfac_with_our_labels(problem):
    check_sampled(problem, kfade.KFAC, curvlinops.KFACLinearOperator, [COVARIANCE_STREAM])


def test_ekfac_with_our_labels(problem):
    # A fresh draw for the eigenvalues, as our fit makes one.
    streams = [COVARIANCE_STREAM, EIGENVALUE_STREAM]
    assert not torch.equal(*(drawn_labels(problem, stream) for stream in streams))
    check_sampled(problem, kfade.EKFAC, curvlinops.EKFACLinearOperator, streams)


@pytest.mark.parametrize("family", ["gpt_neox", "phi"])
def test_joint_weights_and_biases(family):
    with zoo.Double():
        problem = Problem(POSITIONS, family, joint_bias=True)
        streams = [COVARIANCE_STREAM, EIGENVALUE_STREAM]
        check_sampled(problem, kfade.EKFAC, curvlinops.EKFACLinearOperator, streams)
