"""Final hidden states and the vocabulary head, applied to a few positions at a time.

A logits tensor of shape [B, T, V] is the largest thing in a language model's forward pass and is
never needed whole. Everything in kfade that looks at outputs takes the final hidden states of the
positions that carry loss and runs them through the head in chunks.

Logits are float32 or better, whatever the model's dtype. A bfloat16 logit has 8 significant bits:
at a value of 20 it errs by up to 0.06, which hides every small change of the outputs.

Shapes: B batch, T tokens, N loss tokens, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from kfade.errors import InputError

CHUNK = 128  # positions at a time: 25 MB of float32 logits at a vocabulary of 49k
PIECE = 2**21  # numbers of a weight that are in float32 at a time: 8 MB, what a cache holds


def hidden_states(model: Any, input_BT: Tensor) -> Tensor:
    """Final hidden states [B, T, D], after the last norm, of right-padded ``input_BT``.

    No attention mask is passed: attention is causal and padding lies at the right, so no live
    position can see it. ``kfade check`` proves this on the model at hand.
    """
    return model.base_model(input_ids=input_BT, use_cache=False).last_hidden_state


@dataclass(frozen=True)
class Head:
    """The map from a final hidden state to logits: linear, then the model's scale and soft cap."""

    linear: nn.Module
    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, hidden_ND: Tensor) -> Tensor:
        """Logits [N, V] in float32 or better."""
        logits_NV = self._product(hidden_ND)
        if self.scale != 1.0:
            logits_NV = logits_NV * self.scale
        if self.softcap is not None:
            logits_NV = torch.tanh(logits_NV / self.softcap) * self.softcap
        return logits_NV

    def _product(self, hidden_ND: Tensor) -> Tensor:
        own = self.linear
        if not isinstance(own, nn.Linear) or type(own).forward is not nn.Linear.forward:
            logits_NV = own(hidden_ND)  # a product of its own making
            return logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
        weight_VD, bias_V = own.weight, own.bias
        if weight_VD.dtype.itemsize >= 4:
            return linear(hidden_ND, weight_VD, bias_V)
        logits_NV = _RaisedProduct.apply(hidden_ND, weight_VD)
        return logits_NV if bias_V is None else logits_NV + bias_V

    def chunks(self, hidden_ND: Tensor) -> Iterator[slice]:
        """Slices of at most ``CHUNK`` positions."""
        for start in range(0, hidden_ND.shape[0], CHUNK):
            yield slice(start, min(start + CHUNK, hidden_ND.shape[0]))


class _RaisedProduct(torch.autograd.Function):
    """h Wᵀ in float32 of h [N, D] and W [V, D] in a lower precision, W raised piece by piece.

    Products of such numbers are exact in float32, so only sums are rounded. Autograd by itself
    would hold all of W in float32 until the backward pass.
    """

    @staticmethod
    def forward(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
        raised_ND = hidden_ND.float()
        logits_NV = raised_ND.new_empty(len(hidden_ND), len(weight_VD))
        for rows in _pieces(weight_VD):
            torch.mm(raised_ND, weight_VD[rows].float().T, out=logits_NV[:, rows])
        return logits_NV

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, u_NV: Tensor) -> tuple[Tensor | None, Tensor | None]:
        hidden_ND, weight_VD = ctx.saved_tensors
        of_hidden = of_weight = None
        if ctx.needs_input_grad[0]:
            sum_ND = torch.zeros_like(hidden_ND, dtype=torch.float32)
            for rows in _pieces(weight_VD):
                sum_ND.addmm_(u_NV[:, rows], weight_VD[rows].float())
            of_hidden = sum_ND.to(hidden_ND.dtype)
        if ctx.needs_input_grad[1]:
            of_weight = (u_NV.T @ hidden_ND.float()).to(weight_VD.dtype)
        return of_hidden, of_weight

    @staticmethod
    def jvp(ctx: Any, tangent_ND: Tensor, of_weight: None) -> Tensor:
        return _RaisedProduct.forward(tangent_ND, ctx.saved_tensors[1])


def _pieces(weight_VD: Tensor) -> Iterator[slice]:
    """Slices of the vocabulary that are ``PIECE`` numbers of the weight each."""
    count = max(1, PIECE // weight_VD.shape[1])
    for start in range(0, len(weight_VD), count):
        yield slice(start, start + count)


def read_head(model: Any) -> Head:
    """The head of ``model``, checked against the model's own logits on a few tokens.

    Raises:
        InputError: the model does something between hidden states and logits that is not a
            linear map, a scale or a soft cap; every number after it would be wrong.
    """
    linear = model.get_output_embeddings()
    if linear is None:
        raise InputError(
            f"{type(model).__name__} has no output embeddings: kfade needs a causal language model"
        )
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    head = Head(linear, float(scale), getattr(config, "final_logit_softcapping", None))
    tokens_BT = torch.arange(1, 9, device=linear.weight.device)[None] % linear.weight.shape[0]
    with torch.no_grad():
        ours = head(hidden_states(model, tokens_BT)[0])
        theirs = model(input_ids=tokens_BT, use_cache=False).logits[0].to(ours.dtype)
    if not torch.isfinite(theirs).all():
        return head  # a broken weight: the layer that holds it is named where it is used
    # The soft cap runs in float32 here and in the model's own dtype there: allow its rounding.
    tolerance = 8 * torch.finfo(linear.weight.dtype).eps * theirs.abs().max()
    if (ours - theirs).abs().max() > tolerance:
        raise InputError(
            f"{type(model).__name__} turns hidden states into logits in a way that kfade does not "
            "know (not a linear map, scale or soft cap): this model is not supported"
        )
    return head
