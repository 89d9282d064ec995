"""Turn examples into token sequences with loss masks, and sequences into batches.

Shapes: B batch, T positions. A sequence of n + 1 tokens has n positions: position t holds token t
and is scored on token t + 1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from kfade.errors import InputError
from kfade.examples import Example


@dataclass(frozen=True)
class Sequence:
    """Tokens and, for each, whether it is scored (the first never is)."""

    tokens: tuple[int, ...]
    scored: tuple[bool, ...]

    def __post_init__(self) -> None:
        assert len(self.tokens) == len(self.scored)
        assert any(self.scored)
        assert not self.scored[0]

    @property
    def live(self) -> int:
        """Live positions: up to the one whose next token is the last scored one."""
        return max(t for t, scored in enumerate(self.scored) if scored)

    @property
    def loss_tokens(self) -> int:
        """Number of scored tokens."""
        return sum(self.scored)


@dataclass(frozen=True)
class Batch:
    """Right-padded sequences, cut after their last loss position."""

    input_BT: Tensor
    target_BT: Tensor
    """The token that follows each position."""
    loss_BT: Tensor
    """True where the following token is scored."""
    live_BT: Tensor
    """True up to a sequence's last loss position: not padding, and able to reach the loss."""
    id_B: Tensor
    """Number of each sequence in its data set: keys the pseudo-labels."""

    @cached_property
    def loss_tokens(self) -> int:
        """Number of scored tokens."""
        return int(self.loss_BT.sum())

    @property
    def positions(self) -> int:
        """Positions computed, padding included."""
        return self.input_BT.numel()

    @cached_property
    def full(self) -> bool:
        """Whether every position is live."""
        return bool(self.live_BT.all())

    def silenced(self) -> Batch:
        """The same inputs, none of them live or scored: a pass over it adds nothing."""
        none_BT = torch.zeros_like(self.loss_BT)
        return Batch(self.input_BT, self.target_BT, none_BT, none_BT, self.id_B)

    def at_loss(self, x_BT: Tensor) -> Tensor:
        """The entries of ``x_BT`` [B, T, ...] at the N loss positions, [N, ...]."""
        return x_BT[self.loss_BT]


def encode(
    examples: SequenceOf[Example],
    tokenizer: Any,
    *,
    length: int = 512,
    window: int | None = None,
    chat: bool | None = None,
    pack: bool = True,
    truncate: bool = False,
) -> list[Sequence]:
    """Sequences of ``examples``, in their order, packed texts after the exchanges.

    Args:
        length: tokens of a packed sequence; texts are joined end to end, each closed by EOS
            unless its example says that it does not close.
        window: the model's longest input; longer exchanges are an error, or cut if ``truncate``.
        chat: use the tokenizer's chat template for exchanges; None: if it has one.
        pack: False keeps one text a sequence.

    Raises:
        InputError: a sequence is longer than the window; the chat template is missing or unusable.
    """
    chat = _uses_chat(chat, tokenizer)
    limit = min(length, window) if window else length
    if pack and window and length > window:
        raise InputError(
            f"--sequence-length {length} is over the model's window of {window} tokens: lower it"
        )
    sequences, stream = [], []
    for example in examples:
        if example.text is not None:
            close = _with_eos if example.closes else open_ended
            tokens = close(tokenizer(example.text).input_ids, tokenizer)
            if pack:
                stream.extend(tokens)
                continue
            scored = [False] + [True] * (len(tokens) - 1)
        elif chat:
            tokens, scored = _chat_tokens(example, tokenizer)
        else:
            tokens, scored = _plain_tokens(example, tokenizer)
        if window and len(tokens) > window:
            if not truncate:
                raise InputError(
                    f"{example.where}: {len(tokens)} tokens, over the model's window of {window}; "
                    "shorten it or pass --truncate"
                )
            tokens, scored = tokens[:window], scored[:window]
        if not any(scored[1:]):
            raise InputError(f"{example.where}: no token to score within the model's window")
        sequences.append(Sequence(tuple(tokens), (False, *scored[1:])))
    for start in range(0, len(stream), limit):
        tokens = stream[start : start + limit]
        if len(tokens) > 1:
            sequences.append(Sequence(tuple(tokens), (False,) + (True,) * (len(tokens) - 1)))
    return sequences


def encode_prompt(example: Example, tokenizer: Any, *, chat: bool | None = None) -> tuple[int, ...]:
    """Tokens of ``example``'s turns, all of them, up to where the next answer begins.

    Rendered as :func:`encode` renders the turns before an answer.

    Raises:
        InputError: the chat template is missing, or nothing is left of the turns.
    """
    if _uses_chat(chat, tokenizer):
        messages = [{"role": role, "content": content} for role, content in example.turns]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        tokens = tokenizer(text, add_special_tokens=False).input_ids
    else:
        tokens, _ = _plain_tokens(example, tokenizer)
    if not tokens:
        raise InputError(f"{example.where}: an empty prompt; remove the line or fill it")
    return tuple(tokens)


def make_batches(
    sequences: SequenceOf[Sequence],
    *,
    budget: int = 4096,
    device: torch.device | str = "cpu",
    group: Callable[[int], Hashable] = lambda positions: None,
) -> list[Batch]:
    """Batches of at most ``budget`` positions (but at least one sequence), longest first.

    Sorted by length, so there is little padding; longest first, so that a batch too large for the
    memory fails at once.

    Args:
        group: live positions of a sequence -> what sequences of one batch have in common; of a
            model, :func:`~kfade.lengths.length_class`.
    """
    order = sorted(range(len(sequences)), key=lambda i: -sequences[i].live)
    batches = []
    for _, own in groupby(order, key=lambda i: group(sequences[i].live)):
        left = list(own)
        while left:
            count = max(1, budget // sequences[left[0]].live)
            batches.append(_collate(sequences, left[:count], device))
            left = left[count:]
    return batches


def draw_without_replacement(count: int, size: int | None, step: int, seed: int) -> list[int]:
    """Numbers of the ``step``-th batch of ``size`` out of ``count``.

    Batches are cut from a permutation, and a new one begins where what is left of the old is less
    than a batch. None takes all at every step.
    """
    if size is None or size >= count:
        return list(range(count))
    per_pass = count // size
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step // per_pass)
    order = torch.randperm(count, generator=generator).tolist()
    start = (step % per_pass) * size
    return sorted(order[start : start + size])


def open_ended(tokens: list[int], tokenizer: Any) -> list[int]:
    """Without the EOS that some tokenizers put at the end, where more is to follow.

    A token alone is left: it may be a BOS that is the same as EOS.
    """
    return tokens[:-1] if len(tokens) > 1 and tokens[-1] == tokenizer.eos_token_id else tokens


def digest_sequences(sequences: SequenceOf[Sequence]) -> str:
    """SHA-256 over tokens and masks: says which data a fit or an update has seen."""
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(repr((sequence.tokens, sequence.scored)).encode())
    return digest.hexdigest()


def digest_batches(batches: SequenceOf[Batch]) -> str:
    """SHA-256 over tokens, masks and their division: says which batches a sum has seen."""
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(repr(tuple(batch.input_BT.shape)).encode())
        for tensor in (batch.input_BT, batch.loss_BT, batch.live_BT, batch.id_B):
            digest.update(tensor.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _uses_chat(chat: bool | None, tokenizer: Any) -> bool:
    if chat and tokenizer.chat_template is None:
        raise InputError("this tokenizer has no chat template: use --template plain")
    return tokenizer.chat_template is not None if chat is None else chat


def _collate(
    sequences: SequenceOf[Sequence], chosen: list[int], device: torch.device | str
) -> Batch:
    width = max(sequences[i].live for i in chosen)
    shape = (len(chosen), width)
    inputs, targets = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    loss, live = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    for row, i in enumerate(chosen):
        n, tokens = sequences[i].live, torch.tensor(sequences[i].tokens)
        inputs[row, :n], targets[row, :n] = tokens[:n], tokens[1 : n + 1]
        loss[row, :n], live[row, :n] = torch.tensor(sequences[i].scored[1 : n + 1]), True
    tensors = (inputs, targets, loss, live, torch.tensor(chosen))
    return Batch(*(tensor.to(device) for tensor in tensors))


def _with_eos(tokens: list[int], tokenizer: Any) -> list[int]:
    """Exactly one EOS at the end, where the tokenizer has one."""
    eos = tokenizer.eos_token_id
    return tokens if eos is None or tokens[-1:] == [eos] else [*tokens, eos]


def _plain_tokens(example: Example, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Prompt and completion end to end as they are written; EOS closes an answer.

    A bare completion gets no EOS: a cloze such as "The capital of France is" | " Paris" need not
    be the end of a text, and forgetting would then unlearn to stop.
    """
    user_prefix, assistant_prefix = example.plain_prefix
    tokens: list[int] = []
    scored: list[bool] = []
    for role, content in example.turns:
        if role != "assistant":
            text = user_prefix + content + assistant_prefix.rstrip(" ")
            piece = open_ended(tokenizer(text, add_special_tokens=not tokens).input_ids, tokenizer)
        else:
            space = assistant_prefix[len(assistant_prefix.rstrip(" ")) :]
            piece = tokenizer(space + content, add_special_tokens=False).input_ids
            if example.closes:
                piece = _with_eos(piece, tokenizer)
        tokens += piece
        scored += [role == "assistant"] * len(piece)
    return tokens, scored


def _close_turn(answer: list[int], tokenizer: Any) -> tuple[list[int], int]:
    """A rendered turn and where its scored part ends: with EOS, or with the template's own mark.

    Some templates close a turn by another special token than EOS; one that closes it by none gets
    an EOS.
    """
    marks = [i for i, token in enumerate(answer) if token in tokenizer.all_special_ids]
    if tokenizer.eos_token_id in answer:
        return answer, answer.index(tokenizer.eos_token_id) + 1
    if marks:
        return answer, marks[-1] + 1
    closed = _with_eos(answer, tokenizer)
    return closed, len(closed)


def _chat_tokens(example: Example, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Tokens of the rendered chat; each assistant turn is scored up to and with its end.

    The text before a turn and the turn itself are tokenised apart, as they are in generation.
    """
    messages = [{"role": role, "content": content} for role, content in example.turns]

    def render(count: int, prompt: bool) -> str:
        return tokenizer.apply_chat_template(
            messages[:count], tokenize=False, add_generation_prompt=prompt
        )

    tokens: list[int] = []
    scored: list[bool] = []
    done = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = render(index, True), render(index + 1, False)
        if not (before.startswith(done) and after.startswith(before)):
            raise InputError(
                f"{example.where}: the chat template rewrites earlier turns, so the answer cannot "
                "be told from the prompt; use --template plain or one exchange a line"
            )
        prompt = tokenizer(before[len(done) :], add_special_tokens=False).input_ids
        answer = tokenizer(after[len(before) :], add_special_tokens=False).input_ids
        answer, end = _close_turn(answer, tokenizer)
        tokens += prompt + answer
        scored += [False] * len(prompt) + [t < end for t in range(len(answer))]
        done = after
    return tokens, scored
