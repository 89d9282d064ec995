"""Logits of low-precision heads: as exact as float32 makes them, and so are KL and gradients.

The reference is the same numbers in float64. A bfloat16 product rounds each logit to 8 bits, which
is the negative control.
"""

from __future__ import annotations

import pytest
import torch
from helpers import tiny_llama
from torch import nn

from kfade.method.measure import divergence
from kfade.models import head as head_module
from kfade.models.head import Head, read_head

LOW = (torch.bfloat16, torch.float16)
U = 2.0**-8  # what rounding to bfloat16 errs by at most, relative


@pytest.fixture(params=[7, 10**6], ids=["pieces", "one piece"])
def pieces(request, monkeypatch):
    """A weight raised in several pieces, the last one shorter, and at once."""
    monkeypatch.setattr(head_module, "PIECE", 8 * request.param)


def setting(dtype, bias=True):
    """A head with soft cap and scale; hidden states, tangents, gradients of logits."""
    torch.manual_seed(0)
    linear = nn.Linear(8, 17, bias=bias).to(dtype).requires_grad_(False)
    h, tangent = (4 * torch.randn(5, 8)).to(dtype), torch.randn(5, 8).to(dtype)
    return Head(linear, 2.0, 30.0), h, tangent, torch.randn(5, 17)


def exact(head):
    """The same map in float64."""
    linear = nn.Linear(8, 17, bias=head.linear.bias is not None).double().requires_grad_(False)
    linear.load_state_dict({k: v.double() for k, v in head.linear.state_dict().items()})
    return Head(linear, head.scale, head.softcap)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", LOW)
def test_logits_are_those_of_float64_to_float32_rounding(pieces, dtype, bias):
    head, h, _, _ = setting(dtype, bias)
    wanted = exact(head)(h.double())
    ours = head(h)
    assert ours.dtype == torch.float32
    assert (ours - wanted).abs().max() < 1e-6 * wanted.abs().max()
    low = torch.tanh(head.linear(h).float() * 2 / 30) * 30  # negative control
    assert (low - wanted).abs().max() > 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", LOW)
def test_the_tangent_of_logits_is_their_derivative(pieces, dtype, bias):
    head, h, tangent, _ = setting(dtype, bias)
    reference = exact(head)
    _, wanted = torch.func.jvp(reference, (h.double(),), (tangent.double(),))
    in_double = reference.tangent(h.double(), reference(h.double()), tangent.double())
    assert torch.allclose(in_double, wanted, rtol=1e-12, atol=1e-12)
    small = 2.0**-30 if dtype == torch.bfloat16 else 2.0**-4  # float16 has no such numbers
    for size in (1.0, small):  # a bias that is far larger leaves nothing of its rounding
        ours = head.tangent(h, head(h), size * tangent)
        assert ours.dtype == torch.float32
        assert (ours / size - wanted).abs().max() < 1e-6 * wanted.abs().max()


@pytest.mark.parametrize("size", [1.0, 1e-6])
def test_the_tangent_of_a_head_that_is_not_linear_is_its_derivative(size):
    class Normed(nn.Linear):
        def forward(self, x):
            return super().forward(5 * nn.functional.normalize(x, dim=-1))

    torch.manual_seed(0)
    head = Head(Normed(8, 17).double().requires_grad_(False), 2.0, 30.0)
    h, tangent = torch.randn(5, 8).double(), size * torch.randn(5, 8).double()
    _, wanted = torch.func.jvp(head, (h,), (tangent,))
    assert torch.allclose(head.tangent(h, head(h), tangent), wanted, rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", LOW)
def test_gradients_are_rounded_like_those_of_a_layer_of_that_dtype(pieces, dtype):
    head, h, _, u = setting(dtype)

    def of_hidden(head, h, u):
        h = h.clone().requires_grad_()
        return torch.autograd.grad(head(h), h, u)[0]

    wanted = of_hidden(exact(head), h.double(), u.double())
    ours = of_hidden(head, h, u)
    assert ours.dtype == dtype
    assert (ours - wanted).norm() <= U * wanted.norm()  # of u, of the result, each U/2 on average
    if dtype == torch.float16:  # its range is too small for u: rounded once
        assert ((ours - wanted).abs() <= U * wanted.abs() + 1e-6).all()


def test_factors_are_bfloat16_only_where_they_are_bfloat16_anyway(monkeypatch):
    """Hidden states in float32 keep their bits; the setting is put back."""
    head, h, _, _ = setting(torch.bfloat16)
    asked = []
    own = head_module._bfloat16_factors
    monkeypatch.setattr(
        head_module, "_bfloat16_factors", lambda wanted: asked.append(wanted) or own(wanted)
    )
    before = torch.get_float32_matmul_precision()
    head(h), head(h.float() * 1.0001)
    assert asked == [True, False]
    assert torch.get_float32_matmul_precision() == before


def test_a_head_that_is_trained_gets_its_gradient(pieces):
    head, h, _, u = setting(torch.bfloat16)
    reference = exact(head)
    for side, inputs, sent in ((head, h, u), (reference, h.double(), u.double())):
        side.linear.requires_grad_(True)
        side(inputs).backward(sent)
    for name in ("weight", "bias"):
        ours, wanted = (getattr(side.linear, name).grad for side in (head, reference))
        assert ours.dtype == torch.bfloat16
        assert ((ours - wanted).abs() <= U * wanted.abs() + 1e-6).all()


def test_a_head_that_multiplies_in_its_own_way_is_left_to_it():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    linear = Doubled(8, 17, bias=False).bfloat16().requires_grad_(False)
    h = torch.randn(5, 8).bfloat16()
    assert torch.equal(Head(linear)(h), linear(h).float())


def test_divergence_of_a_small_change_is_not_lost_in_the_head():
    """Hidden states that differ by a few of their last bits; rounded logits see another change."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 500, bias=False).bfloat16().requires_grad_(False)
    linear.weight.mul_(20)
    h = torch.randn(40, 64).bfloat16()
    moved = h.clone()
    moved[:, :4] *= 1 + 2**-7  # one or two units in the last place
    reference = nn.Linear(64, 500, bias=False).double().requires_grad_(False)
    reference.weight.copy_(linear.weight)
    wanted = divergence(reference(h.double()), reference(moved.double())).mean()
    ours = divergence(Head(linear)(h), Head(linear)(moved)).mean()
    rounded = divergence(linear(h).float(), linear(moved).float()).mean()
    assert 0 < wanted < 1e-2
    assert ours == pytest.approx(wanted.item(), rel=1e-3)
    assert abs(rounded - wanted) > 0.1 * wanted


@pytest.mark.parametrize("dtype", LOW)
def test_a_model_whose_own_logits_are_rounded_is_accepted(dtype):
    assert read_head(tiny_llama(dtype)).linear.weight.dtype == dtype
