"""ELM: on forget text the model learns to write as somebody without the knowledge would.

    loss = CE(p*, current) on forget text + KL(base ‖ current) on retain text
           + CE(continuation, current) after forget text

p* is the base model's distribution, steered away from the concept by classifier-free guidance and
cut to its k most probable tokens. With log-probabilities at a temperature τ,

    log p*_t ∝ log p(x_t) + η_t (log p(x_t | novice) − log p(x_t | expert)).

"Novice" and "expert" are texts put before the sequence; η_t rises along a sequence from 1 to η, as
in the reference code. The third term keeps the model fluent: the base model, steered less,
continues each forget text after a bridging phrase, and the trained model learns this continuation.
(Gandikota et al. 2024. The reference code's retain term is the cross-entropy to the base model's
most probable token; the paper's is that to its distribution, up to a constant the KL here.)

Shapes: N scored tokens, n of one sequence, K kept tokens of the vocabulary, D hidden width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kfade.baselines.losses import Net, Row, Rows, Term, at_loss_tokens, token_nll, tokens
from kfade.data.batches import Batch
from kfade.data.sequences import TokenSequence
from kfade.errors import InputError
from kfade.models.head import Head, hidden_states
from kfade.models.lengths import batches_for, length_class


@dataclass(frozen=True)
class Guidance:
    """How the base model is steered. Texts are tokens, with a BOS where the tokenizer adds one."""

    expert: tuple[int, ...]
    """States that an expert on the concept writes."""
    novice: tuple[int, ...]
    """States that somebody writes who knows nothing of the concept."""
    bridge: tuple[int, ...]
    """Turns to another subject, without a BOS."""
    bos: int | None
    eos: int | None
    window: int | None
    """The model's longest input."""
    eta: float = 1000.0
    kept: int = 50
    """K, the number of tokens that p* is cut to."""
    temperature: float = 1.2
    fluent_eta: float = 3.0
    """η of the continuations."""
    fluent_tokens: int = 100
    """Length of a continuation, at most."""
    seed: int = 0


def erasure(guidance: Guidance) -> Term:
    """Mean CE(p*, current) per scored forget token; its reference is p*, cut to K tokens."""

    def values(net: Net, batch: Batch, rows: Rows) -> Tensor:
        device = batch.input_BT.device
        p_NK, index_NK = (torch.cat(parts).to(device) for parts in zip(*rows, strict=True))
        return at_loss_tokens(net, batch, soft_cross_entropy, p_NK, index_NK)

    def reference(net: Net, sequence: TokenSequence) -> Row:
        return steered_target(net, _up_to_last_scored(sequence), guidance)

    return Term("forget", 1.0, values, tokens, reference)


def fluency(guidance: Guidance, weight: float) -> Term:
    """Mean cross-entropy per token of the bridge and continuation after forget text."""

    def values(net: Net, batch: Batch, rows: Rows) -> Tensor:
        continued = []
        for whole, scored in rows:
            flags = [t >= len(whole) - int(scored) for t in range(len(whole))]
            continued.append(TokenSequence(tuple(whole.tolist()), tuple(flags)))
        pieces = batches_for(net.model, continued, batch.positions)
        return torch.cat([token_nll(net, piece) for piece in pieces])

    def count(batch: Batch, rows: Rows) -> int:
        return sum(int(scored) for _, scored in rows)

    def reference(net: Net, sequence: TokenSequence) -> Row:
        prompt = fluent_prompt(_up_to_last_scored(sequence).tokens, guidance)
        written = steered_sample(net, prompt, guidance)
        scored = len(guidance.bridge) + len(written)
        return torch.tensor([*prompt, *written]), torch.tensor(scored)

    return Term("forget", weight, values, count, reference)


def soft_cross_entropy(logits_NV: Tensor, p_NK: Tensor, index_NK: Tensor) -> Tensor:
    """−Σ_k p_k log q_k, [N], over the kept tokens."""
    log_q_NK = logits_NV.log_softmax(dim=-1).gather(1, index_NK)
    return -(p_NK.to(log_q_NK) * log_q_NK).sum(dim=-1)


def steered_target(net: Net, sequence: TokenSequence, guidance: Guidance) -> tuple[Tensor, Tensor]:
    """p* at the scored tokens of ``sequence``: probabilities [n, K] and their tokens [n, K]."""
    contexts = [(), guidance.novice, guidance.expert]
    device = next(net.model.parameters()).device
    hidden = [_hidden_after(net, prefix, sequence, guidance, device) for prefix in contexts]
    eta_n = torch.linspace(1, guidance.eta, len(hidden[0]), dtype=torch.float64, device=device)
    parts = []
    for part in net.head.chunks(hidden[0]):
        # Differences of log-probabilities times 1000: in float64, as the reference code.
        base, novice, expert = (_log_p(net.head, h[part], guidance) for h in hidden)
        steered = base + eta_n[part, None] * (novice - expert)
        best = steered.topk(min(guidance.kept, steered.shape[1]), dim=-1)
        parts.append((best.values.softmax(dim=-1).float(), best.indices))
    p, index = zip(*parts, strict=True)
    return torch.cat(p), torch.cat(index)


def steered_sample(net: Net, prompt: Sequence[int], guidance: Guidance) -> list[int]:
    """Tokens drawn one by one from p(x | prompt) (p(x | novice) / p(x | expert))^η.

    Each token drawn is appended to all three texts. The draws are keyed on the prompt. Ends with
    EOS or after ``fluent_tokens``.
    """
    device = next(net.model.parameters()).device
    key = hashlib.sha256(repr((guidance.seed, *prompt)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))
    texts = [list(prompt), list(guidance.novice), list(guidance.expert)]
    caches: list[Any] = [None, None, None]
    group = length_class(net.model)
    drawn: list[int] = []
    while len(drawn) < guidance.fluent_tokens and (not drawn or drawn[-1] != guidance.eos):
        logs = []
        for i, text in enumerate(texts):
            text += drawn[-1:]
            if group(len(text)) != group(len(text) - 1):
                caches[i] = None  # it was computed with other rotary frequencies
            feed = text if caches[i] is None else text[-1:]
            output = net.model.base_model(
                input_ids=torch.tensor([feed], device=device),
                past_key_values=caches[i],
                use_cache=True,
            )
            caches[i] = output.past_key_values
            logs.append(net.head(output.last_hidden_state[0, -1:])[0].double().log_softmax(dim=-1))
        steered = logs[0] + guidance.fluent_eta * (logs[1] - logs[2])
        p_V = steered.softmax(dim=-1).cpu()
        drawn.append(int(torch.multinomial(p_V, 1, generator=generator)))
    return drawn


def fluent_prompt(tokens: Sequence[int], guidance: Guidance) -> list[int]:
    """A forget text without its EOS, cut so that a continuation fits the window, and the bridge."""
    prompt = [*tokens[:-1]] if tokens[-1] == guidance.eos else [*tokens]
    if guidance.window is not None:
        room = guidance.window - len(guidance.bridge) - guidance.fluent_tokens
        if room < 1:
            raise InputError(
                f"the model's window of {guidance.window} tokens is too short for ELM's "
                "continuations"
            )
        prompt = prompt[:room]
    return [*prompt, *guidance.bridge]


def _hidden_after(
    net: Net,
    prefix: Sequence[int],
    sequence: TokenSequence,
    guidance: Guidance,
    device: torch.device,
) -> Tensor:
    """Hidden states [n, D] that score ``sequence`` after ``prefix``, with one BOS at the start."""
    own = sequence.tokens
    if prefix and own[0] == guidance.bos:
        own = own[1:]
    whole = [*prefix, *own]
    if guidance.window is not None and len(whole) > guidance.window:
        raise InputError(
            f"a forget sequence and ELM's text before it make {len(whole)} tokens, over the "
            f"model's window of {guidance.window}: lower --sequence-length"
        )
    hidden_TD = hidden_states(net.model, torch.tensor([whole], device=device))[0]
    shift = len(whole) - len(sequence.tokens) - 1  # token t is scored one position before it
    scored = [t + shift for t, flag in enumerate(sequence.scored) if flag]
    return hidden_TD[torch.tensor(scored, device=device)]


def _log_p(head: Head, hidden_ND: Tensor, guidance: Guidance) -> Tensor:
    return (head(hidden_ND).double() / guidance.temperature).log_softmax(dim=-1)


def _up_to_last_scored(sequence: TokenSequence) -> TokenSequence:
    """The sequence without what follows its last scored token."""
    end = sequence.live + 1
    return TokenSequence(sequence.tokens[:end], sequence.scored[:end])
