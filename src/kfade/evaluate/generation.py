"""Generation in batches: padded at the left, greedy or at a temperature, nothing else.

What is said to a prompt does not depend on the prompts beside it, up to ties within rounding.
Prompts share a batch only if the model at hand, tried on two of them, does not see what is beside
them: the padding, or the other prompt. A model whose rotary frequencies follow the length of its
input (:mod:`kfade.models.lengths`) reads the whole text anew wherever they change.

Shapes: B prompts, T positions, V vocabulary.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor

from kfade.errors import InputError
from kfade.models.lengths import LengthClass, length_class, model_window
from kfade.models.load import frozen
from kfade.runtime.progress import track

Company = Literal["any", "equal", "none"]
"""Prompts of any or of equal lengths share batches, or none do."""

PROBE_TOKENS = 16  # of the longer prompt that padding is tried with


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    note: Callable[[int, list[int]], None],
    *,
    max_new_tokens: int,
    batch_tokens: int = 4096,
    temperature: float = 0.0,
    seed: int = 0,
) -> None:
    """Continue each prompt (its tokens); ``note(index, tokens)`` is called once its batch is whole.

    A continuation ends with the first of the :func:`end_tokens`, which belongs to it, or after
    ``max_new_tokens``, or where the model's window is full. A penalty or a temperature in the
    model's own settings for generation does not count.

    Args:
        batch_tokens: positions that a batch holds at its end, at most; longest prompts first.
        temperature: 0 takes the likeliest token; else the whole softmax is sampled at it.
        seed: of the sampling. What is drawn is keyed on it, on the prompt, and on how often the
            same prompt came before.

    Raises:
        InputError: a prompt leaves no room in the model's window.
    """
    ends = end_tokens(model, tokenizer)
    with frozen(model), _only_asked_for(model, ends):
        writer = _Writer(model, ends, length_class(model), company(model, prompts), temperature)
        groups = _groups(prompts, max_new_tokens, batch_tokens, model_window(model), writer)
        keys = _keys(prompts, seed)
        for room, group in track(groups, "generation", lambda numbered: len(numbered[1])):
            rows = writer.write([prompts[i] for i in group], room, [keys[i] for i in group])
            for index, row in zip(group, rows, strict=True):
                note(index, row)


def generate_texts(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_tokens: int = 4096,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[str]:
    """What :func:`generate` continues each prompt with, as text without the end token."""
    texts = [""] * len(prompts)
    ends = end_tokens(model, tokenizer)

    def note(index: int, tokens: list[int]) -> None:
        said = tokens[:-1] if tokens[-1] in ends else tokens
        texts[index] = tokenizer.decode(said, skip_special_tokens=True)

    generate(
        model,
        tokenizer,
        prompts,
        note,
        max_new_tokens=max_new_tokens,
        batch_tokens=batch_tokens,
        temperature=temperature,
        seed=seed,
    )
    return texts


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: the tokenizer's EOS and those of the model's own settings."""
    own = model.generation_config.eos_token_id
    ends = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return sorted({end for end in ends if end is not None})


def shares_batches(model: Any, tokenizer: Any) -> bool:
    """Whether texts of any lengths may share a padded batch, without regard to what they are."""
    texts = [[1], list(range(1, PROBE_TOKENS + 1))]
    with frozen(model), _only_asked_for(model, end_tokens(model, tokenizer)):
        return not length_class(model).borders and company(model, texts) == "any"


def company(model: Any, prompts: Sequence[Sequence[int]]) -> Company:
    """Which prompts may share a batch so that each is continued as it is alone.

    Tried with the beginnings of two of ``prompts``, on the first pass and on one from the cache. A
    model that reads text from left to right into a state may take padding for text; one whose
    attention is masked does not. Where rounding is large the answer may be too careful.
    """
    if len(prompts) < 2:
        return "any"
    shortest, *_, longest = sorted(prompts, key=len)
    window = model_window(model) or PROBE_TOKENS + 1
    longer = longest[: min(PROBE_TOKENS, window - 1)]
    shorter = shortest[: max(1, len(longer) // 4)]
    if not _is_alone(model, longer, len(longer)):
        return "none"
    if len(shortest) == len(longest):
        return "any"
    return "any" if _takes_mask(model) and _is_alone(model, shorter, len(longer)) else "equal"


@dataclass(frozen=True)
class _Writer:
    """Continues prompts."""

    model: Any
    ends: Sequence[int]
    length_class: LengthClass
    company: Company
    temperature: float

    def kind(self, text: Sequence[int]) -> tuple[int, int]:
        """What texts must have in common to share a batch."""
        return self.length_class(len(text)), 0 if self.company == "any" else len(text)

    def write(
        self, prompts: Sequence[Sequence[int]], room: int, keys: Sequence[int]
    ) -> list[list[int]]:
        """At most ``room`` new tokens of each prompt, up to and with an end token."""
        device = next(self.model.parameters()).device
        draws = [torch.Generator(device).manual_seed(key) for key in keys]
        texts = [list(prompt) for prompt in prompts]
        pending = list(range(len(texts)))
        while pending:
            pending.sort(key=lambda i: -len(texts[i]))
            for _, same in groupby(pending, key=lambda i: self.kind(texts[i])):
                own = list(same)
                steps = min(
                    self.length_class.steps(len(texts[i]), room - len(texts[i]) + len(prompts[i]))
                    for i in own
                )
                rows = self._continue([texts[i] for i in own], steps, [draws[i] for i in own])
                for i, row in zip(own, rows, strict=True):
                    stop = next((t for t, token in enumerate(row) if token in self.ends), len(row))
                    texts[i] += row[: stop + 1]
            pending = [
                i
                for i in pending
                if len(texts[i]) < len(prompts[i]) + room and texts[i][-1] not in self.ends
            ]
        return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]

    def _continue(
        self, texts: Sequence[Sequence[int]], steps: int, draws: Sequence[torch.Generator]
    ) -> list[list[int]]:
        """New tokens of each text, those after an end token included."""
        sampling = {"logits_processor": [_Draw(self.temperature, draws)]}
        inputs = _left_padded(self.model, texts, self.model.generation_config.pad_token_id)
        whole_BT = self.model.generate(
            **inputs,
            max_new_tokens=steps,
            do_sample=False,
            **(sampling if self.temperature > 0 else {}),
        )
        return whole_BT[:, inputs["input_ids"].shape[1] :].tolist()


class _Draw(LogitsProcessor):
    """Makes the largest entry a draw from softmax(logits / temperature), each row by its own.

    argmax_v (z_v / τ − log e_v) with e_v exponentially distributed.
    """

    def __init__(self, temperature: float, generators: Sequence[torch.Generator]) -> None:
        self._temperature, self._generators = temperature, generators

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits [B, V], of one more token of each row."""
        e_BV = torch.empty_like(scores)
        for e_V, generator in zip(e_BV, self._generators, strict=True):
            e_V.exponential_(generator=generator)
        smallest = torch.finfo(scores.dtype).tiny  # 0 is drawn now and then
        return scores / self._temperature - e_BV.clamp_min(smallest).log()


def _keys(prompts: Sequence[Sequence[int]], seed: int) -> list[int]:
    """Of the draws after each prompt; the same ones whatever else is asked for."""
    seen: Counter[tuple[int, ...]] = Counter()
    keys = []
    for prompt in map(tuple, prompts):
        digest = hashlib.sha256(repr((seed, seen[prompt], *prompt)).encode()).digest()
        keys.append(int.from_bytes(digest[:7], "big"))
        seen[prompt] += 1
    return keys


def _groups(
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_tokens: int,
    window: int | None,
    writer: _Writer,
) -> list[tuple[int, list[int]]]:
    """(new tokens at most, numbers of the prompts) of each batch.

    Near the window's end only prompts with the same room share a batch, so that none is cut short
    by its neighbour.
    """

    def room(index: int) -> int:
        return min(max_new_tokens, window - len(prompts[index])) if window else max_new_tokens

    def kind(index: int) -> tuple[int, tuple[int, int]]:
        return room(index), writer.kind(prompts[index])

    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    if order and room(order[0]) < 1:
        raise InputError(
            f"a prompt of {len(prompts[order[0]])} tokens leaves no room to generate in the "
            f"model's window of {window}; shorten it"
        )
    groups: list[tuple[int, list[int]]] = []
    while order:
        new = room(order[0])
        count = max(1, batch_tokens // (len(prompts[order[0]]) + new))
        count = 1 if writer.company == "none" else count
        group = [i for i in order[:count] if kind(i) == kind(order[0])]
        groups.append((new, group))
        order = order[len(group) :]
    return groups


def _is_alone(model: Any, text: Sequence[int], width: int) -> bool:
    """Whether the next two tokens of ``text`` are as likely in a batch of that width as alone.

    Two batches of the same shape, with other tokens in all other places, differ by less rounding
    than a text alone and in a batch: they show what leaks from those tokens, the first also what
    padding does whatever is in it.
    """
    vocabulary = model.get_input_embeddings().num_embeddings
    beside = [[(token + shift) % vocabulary for token in range(width)] for shift in (3, 5)]
    pads = [model.generation_config.pad_token_id, (text[0] + 1) % vocabulary]
    alone = _first_logits(model, [text], pads[0])
    one, other = (_first_logits(model, [text, b], p) for b, p in zip(beside, pads, strict=True))
    eps = torch.finfo(next(model.parameters()).dtype).eps
    return _close(alone, one, max(1e-4, 16 * eps)) and _close(one, other, max(1e-4, 4 * eps))


def _close(some: Sequence[Tensor], others: Sequence[Tensor], limit: float) -> bool:
    """Whether the first rows of logits [B, V] differ by no more than ``limit`` of their length."""
    return all(
        bool((one_BV[0] - other_BV[0]).norm() <= limit * one_BV[0].norm())  # NaN differs
        for one_BV, other_BV in zip(some, others, strict=False)
    )


def _first_logits(model: Any, texts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, ...]:
    """Logits [B, V] of the next two tokens, the second by the cache where the model has one."""
    return model.generate(
        **_left_padded(model, texts, pad),
        max_new_tokens=2,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    ).logits


def _left_padded(model: Any, texts: Sequence[Sequence[int]], pad: int) -> dict[str, Tensor]:
    """Tokens [B, T] and the mask of the padding, where the model takes one."""
    device = next(model.parameters()).device
    width = max(map(len, texts))
    tokens_BT = torch.full((len(texts), width), pad)
    mask_BT = torch.zeros_like(tokens_BT)
    for row, text in enumerate(texts):
        tokens_BT[row, width - len(text) :] = torch.tensor(text)
        mask_BT[row, width - len(text) :] = 1
    inputs = {"input_ids": tokens_BT, "attention_mask": mask_BT}
    if not _takes_mask(model):
        del inputs["attention_mask"]
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def _takes_mask(model: Any) -> bool:
    return "attention_mask" in inspect.signature(model.forward).parameters


@contextlib.contextmanager
def _only_asked_for(model: Any, ends: Sequence[int]) -> Iterator[None]:
    """Without the checkpoint's own sampling and penalties."""
    own = model.generation_config
    model.generation_config = GenerationConfig(
        bos_token_id=own.bos_token_id,
        eos_token_id=list(ends) or None,
        pad_token_id=min(ends, default=0),  # masked, and cut off after the end: any token will do
    )
    try:
        yield
    finally:
        model.generation_config = own
