"""Fits of bfloat16 models: rows are multiplied as they are, sums are float32.

A bfloat16 has 8 significant bits, so rounding to it errs by at most u = 2⁻⁸ of the number. The
product of two is exact in float32, so what is lost is

- u of each batch's product, which is rounded once before it is added (at worst; most of a sum of
  many batches cancels),
- 2⁻²⁴ of the sum of absolute products for each addition within a product, and of the sum so far
  for each batch.

The reference is the same rows, taken out of the model, multiplied and summed in float64.
"""

from __future__ import annotations

import math

import pytest
import torch
from helpers import random_sequences, relative_error, tiny_llama

from kfade import EKFAC, KFAC, find_targets, make_batches, margin, square_root_draw
from kfade.curvature.factors import PANEL, CovarianceSum, sum_dtype
from kfade.curvature.fit import COVARIANCE_STREAM, EIGENVALUE_STREAM, pseudo_gradients
from kfade.curvature.passes import run_pass
from kfade.method.gradient import forget_gradient

U = 2.0**-8
FLOAT32 = 2.0**-24
BF16 = torch.bfloat16


def streamed(batches: int, rows: int, width: int, seed: int = 0) -> list[torch.Tensor]:
    """Correlated rows of uneven scale with a mean, as activations are, in bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) / math.sqrt(width)
    scale = torch.logspace(-2, 1, width)
    made = torch.randn(batches, rows, width, generator=generator) @ mix + 0.5
    return list((made * scale).to(BF16))


def in_float64(stream) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(Σ rowᵀ row, Σ over batches |product|, Σ |row|ᵀ |row|)."""
    products = [rows.double().T @ rows.double() for rows in stream]
    absolute = sum(rows.double().abs().T @ rows.double().abs() for rows in stream)
    return sum(products), sum(product.abs() for product in products), absolute


def summed(stream, dtype=torch.float32) -> torch.Tensor:
    total = CovarianceSum(stream[0].shape[1], dtype, stream[0].device)
    for rows in stream:
        total.add(rows)
    return total.mean(1).double()


# Widths below, at and above a panel; few and many batches; few and many rows.
SHAPES = [(1, 64, 16), (3, 40, PANEL), (300, 8, 40), (5, 500, PANEL + 30)]


@pytest.mark.parametrize(("batches", "rows", "width"), SHAPES)
def test_covariance_sums_err_by_one_rounding_of_each_product(batches, rows, width):
    assert sum_dtype(BF16) == torch.float32
    stream = streamed(batches, rows, width)
    exact, by_batch, absolute = in_float64(stream)
    ours = summed(stream)
    bound = U * by_batch + (rows + batches + 1) * FLOAT32 * absolute
    assert ((ours - exact).abs() <= bound).all()
    assert relative_error(ours, exact) <= U
    # The bound is not idle: a tenth of it is exceeded somewhere, so bfloat16 was multiplied.
    assert ((ours - exact).abs() > 0.1 * bound).any()
    # The same rows in float32 have nothing to round: only the second term is left.
    plain = summed([rows.float() for rows in stream])
    assert ((plain - exact).abs() <= (rows + batches + 1) * FLOAT32 * absolute).all()


def test_rounding_averages_out_over_batches():
    """A sum of many rounded products is better than one of them, by about √batches."""
    stream = streamed(256, 8, 40)
    one, many = (relative_error(summed(part), in_float64(part)[0]) for part in (stream[:1], stream))
    assert many < one / 4


def test_summing_in_bfloat16_would_be_worse_by_far():
    """Negative control. A sum of 8 bits stops growing when it is some 2⁸ times what is added."""
    errors = {}
    for batches in (16, 512):
        stream = streamed(batches, 8, 40)
        exact = in_float64(stream)[0]
        ours, low = (
            relative_error(summed(stream), exact),
            relative_error(summed(stream, BF16), exact),
        )
        assert ours <= U
        errors[batches] = (ours, low)
    assert errors[16][1] > 3 * errors[16][0]
    assert errors[512][1] > 100 * errors[512][0]
    assert errors[512][1] > 0.05  # and not because ours were better still
    assert errors[512][1] > 10 * errors[16][1]  # and worse, the more there are


# --- Whole fits ---------------------------------------------------------------------------------


class RowsOfAll:
    """Keeps the rows of every batch, in float64."""

    def __init__(self) -> None:
        self.inputs: dict[str, list] = {}
        self.gradients: dict[str, list] = {}
        self.lengths: list[list[int]] = []

    def begin(self, batch, together):
        self.lengths.append(batch.live_BT.sum(dim=1).tolist())

    def on_input(self, target, live):
        rows = live.rows_RD
        assert live.lengths == self.lengths[-1]
        assert rows.dtype == BF16
        self.inputs.setdefault(target.input_of, []).append(rows.double())

    def on_gradient(self, target, live):
        rows = live.rows_RD
        assert rows.dtype == BF16
        self.gradients.setdefault(target.name, []).append(rows.double())

    def tensors(self):
        return {}


@pytest.fixture
def setting():
    model = tiny_llama(BF16)
    batches = make_batches(random_sequences(40, shortest=12, longest=24), budget=96)
    return model, batches, find_targets(model)


def rows_of(setting, stream) -> RowsOfAll:
    model, batches, targets = setting
    rows = RowsOfAll()
    run_pass(model, batches, targets, rows, pseudo_gradients(square_root_draw, 0, stream), "rows")
    return rows


def test_kfac_of_a_bfloat16_model_is_that_of_its_rows(setting):
    model, batches, targets = setting
    rows = rows_of(setting, COVARIANCE_STREAM)
    tokens = sum(batch.loss_tokens for batch in batches)
    positions = sum(int(batch.live_BT.sum()) for batch in batches)
    blocks = KFAC().fit(model, batches, targets).blocks
    for target in targets:
        a = in_float64(rows.inputs[target.input_of])[0] / positions
        s = in_float64(rows.gradients[target.name])[0] / tokens
        block = blocks[target.name]
        assert block.eigenvalues.dtype == block.q_out.dtype == torch.float32
        # S ⊗ A by its action on every unit matrix would be long; its two factors say the same:
        # tr(S) A and tr(A) S are marginals of the grid in the bases.
        grid, q_out, q_in = (x.double() for x in (block.eigenvalues, block.q_out, block.q_in))
        ours_a, ours_s = q_in * grid.sum(0) @ q_in.T, q_out * grid.sum(1) @ q_out.T
        # One rounding in the factor and one in the other's trace.
        assert relative_error(ours_a, a * s.trace()) <= 2 * U
        assert relative_error(ours_s, s * a.trace()) <= 2 * U
        # Rounding batches' products is all that is lost: it averages to well below its bound.
        assert relative_error(ours_a, a * s.trace()) <= 0.5 * U


def test_ekfac_of_a_bfloat16_model_is_that_of_its_rows(setting):
    """Λ has more roundings: bases, rows in bases, products, each u of a number that is squared.
    Of a sum of squares they leave at most 2 · 4 u where they do not cancel."""
    model, batches, targets = setting
    rows = rows_of(setting, EIGENVALUE_STREAM)
    tokens = sum(batch.loss_tokens for batch in batches)
    blocks = EKFAC().fit(model, batches, targets).blocks
    low_bits = []
    for target in targets:
        block = blocks[target.name]
        q_out, q_in = block.q_out.double(), block.q_in.double()
        exact, low = torch.zeros(target.shape).double(), torch.zeros(target.shape, dtype=BF16)
        for a, g, lengths in zip(
            rows.inputs[target.input_of], rows.gradients[target.name], rows.lengths, strict=True
        ):
            for a_TI, g_TO in zip(a.split(lengths), g.split(lengths), strict=True):
                square = (q_out.T @ g_TO.T @ a_TI @ q_in).square()
                exact += square
                low += square.to(BF16)
        assert block.eigenvalues.dtype == torch.float32
        assert relative_error(block.eigenvalues.double() * tokens, exact) <= 8 * U
        assert (block.eigenvalues >= 0).all()
        low_bits.append(relative_error(low.double(), exact))
    assert min(low_bits) > U / 4  # even 40 terms in bfloat16 leave a mark that float32 does not


def test_the_forget_gradient_of_a_bfloat16_model_has_no_rounding_of_its_own(setting):
    """Its rows are turned into float32 first, since a gradient, unlike a curvature, is a
    difference of large numbers."""
    model, batches, targets = setting
    rows = RowsOfAll()
    gradient = forget_gradient(model, batches, targets, margin)
    tokens = sum(batch.loss_tokens for batch in batches)

    def of_margin(head, batch, hidden_ND):
        with torch.enable_grad():
            h = hidden_ND.requires_grad_()
            value = margin(head(h), batch.at_loss(batch.target_BT)).sum() / tokens
        return torch.autograd.grad(value, h)[0]

    run_pass(model, batches, targets, rows, of_margin, "rows")
    for target in targets:
        both = list(zip(rows.gradients[target.name], rows.inputs[target.input_of], strict=True))
        exact = sum(g.T @ a for g, a in both)
        assert gradient[target.name].dtype == torch.float32
        assert relative_error(gradient[target.name].double(), exact) < 1e-6
        low = sum((g.T @ a).to(BF16) for g, a in both)
        assert relative_error(low.double(), exact) > 1e-4
