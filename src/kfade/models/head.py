"""Final hidden states and the vocabulary head, applied to a few positions at a time.

A logits tensor of shape [B, T, V] is the largest thing in a language model's forward pass and is
never needed whole. Everything in kfade that looks at outputs takes the final hidden states of the
positions that carry loss and runs them through the head in chunks.

Logits are float32 or better, whatever the model's dtype. A bfloat16 logit has 8 significant bits:
at a value of 20 it errs by up to 0.06, which hides every small change of the outputs.

Shapes: B batch, T tokens, N loss tokens, D hidden width, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from kfade.errors import InputError, first_line

SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""What configurations call the soft cap of the logits."""
LEAST = 128  # positions of a chunk: 25 MB of float32 logits at a vocabulary of 49k
CHUNK_BYTES = {"cuda": 2**28}
"""Bytes of a chunk's logits, by type of device, where they are more than ``LEAST`` positions. A GPU
has the memory for more, and fewer and larger operations keep it busier. On a CPU 512 positions were
not faster than 128."""
WINDOWS = ("max_position_embeddings", "max_seq_len", "n_positions", "n_ctx", "block_size")
"""What configurations call the longest input."""
TRIAL = 64  # tokens that a model is tried on
FEW = 8  # tokens at the beginning that stay when most of them are changed
PIECE = 2**21  # numbers of a weight that are in float32 at a time: 8 MB, which fit into a cache


def hidden_states(model: Any, input_BT: Tensor) -> Tensor:
    """Final hidden states [B, T, D], after the last norm, of right-padded ``input_BT``.

    No attention mask is passed: attention is causal and padding lies at the right, so no live
    position can see it. ``kfade check`` proves this on the model at hand.
    """
    hidden_BTD: Tensor = body_of(model)(input_ids=input_BT, use_cache=False).last_hidden_state
    return hidden_BTD


def body_of(model: Any) -> Any:
    """The part of ``model`` before the vocabulary head."""
    body = model.base_model
    if body is model:  # some classes name a body that they do not have
        body = getattr(model, "model", model)
    return body


def run_on_tokens(model: Any, input_BT: Tensor) -> Tensor:
    """:func:`hidden_states`, for the first pass through a model.

    Raises:
        InputError: the model fails on tokens alone; quotes the library.
    """
    try:
        return hidden_states(model, input_BT)
    except InputError:
        raise
    except Exception as error:
        if isinstance(input_BT, FakeTensor) or any(
            isinstance(parameter, FakeTensor) for parameter in model.parameters()
        ):
            raise  # a plan explains it otherwise
        if isinstance(error, AttributeError) and "last_hidden_state" in str(error):
            raise InputError(
                f"{type(model).__name__} has no part that ends before the vocabulary head and "
                "gives hidden states (base_model_prefix names it, and it returns "
                "last_hidden_state): this model is not supported"
            ) from error
        raise InputError(
            f"{type(model).__name__} does not run on tokens alone "
            f"({type(error).__name__}: {first_line(error)}): this model is not supported"
        ) from error


def trial_tokens(model: Any, most: int) -> Tensor:
    """Token numbers [1, T] on the model's device; T is ``most``, or the window if it is shorter."""
    weight: Tensor = model.get_input_embeddings().weight
    config = model.config.get_text_config()
    length = min([most, *(getattr(config, name, None) or most for name in WINDOWS)])
    return torch.arange(3, 3 + length, device=weight.device)[None] % weight.shape[0]


def refuse_looking_ahead(model: Any) -> Tensor:
    """Check that hidden states depend on the tokens up to their position, and on nothing else.

    The last token, then all tokens but a few, are changed: no hidden state before them may change.

    Returns:
        Hidden states [T, D] of ``trial_tokens(model, TRIAL)``.

    Raises:
        InputError: one does, so that outputs would depend on padding. Or the same tokens give other
            hidden states in a second pass.
    """
    tokens_BT = trial_tokens(model, TRIAL)
    length, vocabulary = tokens_BT.shape[1], model.get_input_embeddings().weight.shape[0]
    with torch.no_grad():
        before_TD = run_on_tokens(model, tokens_BT)[0]
        moved = _moved(before_TD, run_on_tokens(model, tokens_BT)[0])
        if moved is not None:
            raise InputError(
                f"{type(model).__name__} gives other outputs for the same tokens when they come "
                f"again, by {moved:.1e} of their size: it draws random numbers (noise, dropout "
                "that is on in evaluation) or keeps a state between calls; kfade needs outputs "
                "that follow from the tokens alone"
            )
        for last in sorted({1, max(1, length - FEW)}, reverse=True):
            other_BT = tokens_BT.clone()
            other_BT[0, -last:] = (other_BT[0, -last:] + 1) % vocabulary
            after_TD = run_on_tokens(model, other_BT)[0]
            moved = _moved(before_TD[:-last], after_TD[:-last])
            if moved is not None:
                which, them = ("the last", "it") if last == 1 else (f"the last {last}", "them")
                raise InputError(
                    f"{type(model).__name__} looks ahead: changing {which} of {length} tokens "
                    f"moves the hidden states before {them} by {moved:.1e} of their size; kfade "
                    "needs causal attention (a configuration with bidirectional attention is not "
                    "supported)"
                )
    return before_TD


def _moved(before_TD: Tensor, after_TD: Tensor) -> float | None:
    """‖after − before‖ / ‖before‖ where it is more than rounding, else None."""
    moved = (after_TD.float() - before_TD.float()).norm().item()
    size = before_TD.float().norm().item()
    # Rounding grows with depth; attention to a later token changes far more than this.
    limit = min(1000 * torch.finfo(before_TD.dtype).eps, 0.05)
    return moved / size if moved > limit * size else None


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

    def tangent(self, hidden_ND: Tensor, logits_NV: Tensor, tangent_ND: Tensor) -> Tensor:
        """Derivative [N, V] of ``logits_NV``, those of ``hidden_ND``, along ``tangent_ND``."""
        if self._has_own_product or self.linear.bias is not None:  # more than a linear map
            with forward_ad.dual_level():
                dual = self._product(forward_ad.make_dual(hidden_ND, tangent_ND))
                dot_NV: Tensor = forward_ad.unpack_dual(dual).tangent
        else:
            dot_NV = self._product(tangent_ND)  # a third of the time
        dot_NV = dot_NV * self.scale
        if self.softcap is not None:
            dot_NV *= 1 - (logits_NV / self.softcap).square()
        return dot_NV

    @property
    def vocabulary(self) -> int:
        """V: the number of logits of a position."""
        return cast(Tensor, self.linear.weight).shape[0]

    @property
    def _has_own_product(self) -> bool:
        return type(self.linear).forward is not nn.Linear.forward

    def _product(self, hidden_ND: Tensor) -> Tensor:
        weight_VD = cast(Tensor, self.linear.weight)
        if self._has_own_product or weight_VD.dtype.itemsize >= 4:
            # In some models hidden states have another dtype than weights.
            logits_NV: Tensor = self.linear(hidden_ND.to(weight_VD.dtype))
            return logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
        bias_V = cast("Tensor | None", self.linear.bias)
        raised: Callable[[Tensor, Tensor], Tensor] = _RaisedProduct.apply
        logits_NV = raised(hidden_ND, weight_VD)
        return logits_NV if bias_V is None else logits_NV + bias_V

    def chunks(self, hidden_ND: Tensor, copies: int = 1) -> Iterator[slice]:
        """Slices of at most :func:`chunk_positions` positions, divided by the number of ``copies``
        of their logits that are held together."""
        weight_VD = cast(Tensor, self.linear.weight)
        size = torch.promote_types(weight_VD.dtype, torch.float32).itemsize
        count = chunk_positions(weight_VD.shape[0], size, weight_VD.device)
        count = max(1, count // copies)
        for start in range(0, hidden_ND.shape[0], count):
            yield slice(start, min(start + count, hidden_ND.shape[0]))


def chunk_positions(vocabulary: int, size: int, device: torch.device) -> int:
    """Number of positions whose logits, of ``size`` bytes each, take the device's ``CHUNK_BYTES``;
    at least ``LEAST``, and ``LEAST`` on other devices."""
    return max(LEAST, CHUNK_BYTES.get(device.type, 0) // (vocabulary * size))


class _RaisedProduct(torch.autograd.Function):
    """h Wᵀ in float32 for h [N, D] and W [V, D] of a lower precision.

    Products of such numbers are exact in float32, so that only sums are rounded. Without this
    function autograd would keep all of W in float32 until the backward pass. The backward product
    u W of a bfloat16 weight is in bfloat16, as those of the model's layers are: u is rounded to it,
    sums are in float32, and the result is rounded to the dtype of h.
    """

    @staticmethod
    def forward(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
        alike = hidden_ND.dtype == weight_VD.dtype
        if alike and hidden_ND.is_cuda:
            return torch.mm(hidden_ND, weight_VD.T, out_dtype=torch.float32)
        raised_ND = hidden_ND.float()
        logits_NV = raised_ND.new_empty(len(hidden_ND), len(weight_VD))
        with _bfloat16_factors(alike and hidden_ND.dtype == torch.bfloat16):
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
        if ctx.needs_input_grad[0] and weight_VD.dtype == torch.bfloat16:
            of_hidden = (u_NV.bfloat16() @ weight_VD).to(hidden_ND.dtype)
        elif ctx.needs_input_grad[0]:
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


@contextlib.contextmanager
def _bfloat16_factors(wanted: bool) -> Iterator[None]:
    """Within the ``with``, products in float32 on a CPU may round their factors to bfloat16.

    If all factors are bfloat16 numbers, this changes no product, and sums stay in float32. A
    processor with bfloat16 instructions needs about half of the time.
    """
    setting = getattr(torch.backends.mkldnn, "matmul", None)  # from PyTorch 2.9 on
    if setting is None or not wanted:
        yield
        return
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before


def _pieces(weight_VD: Tensor) -> Iterator[slice]:
    """Slices of the vocabulary, of ``PIECE`` numbers of the weight each."""
    count = max(1, PIECE // weight_VD.shape[1])
    for start in range(0, len(weight_VD), count):
        yield slice(start, start + count)


def read_head(model: Any) -> Head:
    """The head of ``model``, checked against the model's own logits on a few tokens.

    Raises:
        InputError: between hidden states and logits there is more than a linear map, a scale and a
            soft cap, so that all results would be wrong.
    """
    linear = model.get_output_embeddings()
    if linear is None:
        raise InputError(
            f"{type(model).__name__} has no output embeddings: kfade needs a causal language model"
        )
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0
    for name in ("logits_scaling", "logits_mup_width_multiplier"):
        scale /= getattr(config, name, None) or 1.0
    caps = [getattr(config, name, None) for name in SOFT_CAPS]
    head = Head(linear, float(scale), next((cap for cap in caps if cap), None))
    hidden_TD = refuse_looking_ahead(model)
    with torch.no_grad():
        ours = head(hidden_TD)
        theirs = model(input_ids=trial_tokens(model, TRIAL), use_cache=False).logits[0]
    # Logits that are not finite on both sides come from a broken weight. Another check names it.
    finite = torch.isfinite(theirs)
    same = torch.equal(finite, torch.isfinite(ours))
    if same and finite.any():
        # Each side rounds in its own dtypes, the model also what it does after the product.
        eps = max(torch.finfo(dtype).eps for dtype in (linear.weight.dtype, theirs.dtype))
        ours, theirs = ours[finite], theirs[finite].to(ours.dtype)
        same = bool((ours - theirs).abs().max() <= 8 * eps * theirs.abs().max())
    if not same:
        raise InputError(
            f"{type(model).__name__} turns hidden states into logits in a way that kfade does not "
            "know (not a linear map, scale or soft cap): this model is not supported"
        )
    return head
