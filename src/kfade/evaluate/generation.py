"""Generation in batches padded at the left, greedy or at a temperature.

The continuation of a prompt does not depend on the other prompts, up to ties within rounding.
Prompts share a batch only if a trial on two of them shows that the model's outputs on one do not
depend on the padding or on the other. Where a model's rotary frequencies follow the length of its
input (:mod:`kfade.models.lengths`), the whole text is read again when they change.

Shapes: B prompts, T positions, V vocabulary.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessor

from kfade.errors import InputError
from kfade.evaluate.division import map_shared
from kfade.models.lengths import LengthClass, length_class, model_window
from kfade.models.load import frozen

Company = Literal["any", "equal", "none"]
"""Which prompts share batches: prompts of any lengths, of equal lengths, or none."""

PROBE_TOKENS = 16  # of the longer prompt that padding is tried with


@dataclass(frozen=True)
class Decoding:
    """How prompts are continued."""

    max_new_tokens: int
    batch_tokens: int = 4096
    """Positions that a batch holds at its end, at most."""
    temperature: float = 0.0
    """0 takes the likeliest token; otherwise the whole softmax is sampled at this temperature."""
    seed: int = 0
    """Of the sampling, which is keyed on it, on the prompt, and on how often the same prompt came
    before."""


def generate(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Sequence[int]], decoding: Decoding
) -> Iterator[tuple[int, list[int]]]:
    """Yield (number, new tokens) of each prompt, given as tokens, once its batch is done.

    A continuation ends with the first of the :func:`end_tokens`, which belongs to it, or after
    ``max_new_tokens``, or where the model's window is full. Penalties and temperatures in the
    model's own settings for generation are not used. The longest prompts come first. Batches are
    divided over the processes. With a sharded model all processes run each batch together.

    Raises:
        InputError: a prompt leaves no room in the model's window.
    """
    ends = end_tokens(model, tokenizer)
    with _plain_generation(model, ends):
        share = company(model, prompts)
    writer = _Writer(model, ends, length_class(model), share, decoding.temperature)
    keys = _keys(prompts, decoding.seed)
    groups = _groups(prompts, decoding, model_window(model), writer)

    def write(task: tuple[int, list[int]]) -> list[list[int]]:
        room, group = task
        with _plain_generation(model, ends):
            return writer.write([prompts[i] for i in group], room, [keys[i] for i in group])

    def positions(task: tuple[int, list[int]]) -> int:
        room, group = task
        return sum(len(prompts[i]) + room for i in group)

    written = map_shared(groups, write, "generation", cost=positions, model=model)
    for (_, group), rows in zip(groups, written, strict=True):
        yield from zip(group, rows, strict=True)


def generate_texts(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Sequence[int]], decoding: Decoding
) -> list[str]:
    """The continuations of :func:`generate` as texts, without the end token."""
    texts = [""] * len(prompts)
    ends = end_tokens(model, tokenizer)
    for number, tokens in generate(model, tokenizer, prompts, decoding):
        kept = tokens[:-1] if tokens[-1] in ends else tokens
        texts[number] = tokenizer.decode(kept, skip_special_tokens=True)
    return texts


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: the tokenizer's EOS and those of the model's own settings."""
    own = model.generation_config.eos_token_id
    ends = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return sorted({end for end in ends if end is not None})


def shares_batches(model: Any, tokenizer: Any) -> bool:
    """Whether any texts may share a padded batch."""
    texts = [[1], list(range(1, PROBE_TOKENS + 1))]
    with _plain_generation(model, end_tokens(model, tokenizer)):
        return not length_class(model).borders and company(model, texts) == "any"


def company(model: Any, prompts: Sequence[Sequence[int]]) -> Company:
    """Which prompts may share a batch so that each is continued as it is alone.

    A trial on the beginnings of two of ``prompts``, for a first pass and a pass from the cache. A
    model with a recurrent state may read padding as text; one with masked attention does not. Where
    rounding is large, the answer may be too strict.
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
    """Continues prompts, batch by batch."""

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
        """At most ``room`` new tokens of each prompt, up to and including an end token."""
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
        """New tokens of each text, including those after an end token."""
        inputs = _left_padded(self.model, texts, self.model.generation_config.pad_token_id)
        if self.temperature > 0:
            inputs["logits_processor"] = [_Draw(self.temperature, draws)]
        whole_BT = self.model.generate(**inputs, max_new_tokens=steps, do_sample=False)
        return whole_BT[:, inputs["input_ids"].shape[1] :].tolist()


class _Draw(LogitsProcessor):
    """Turns logits into scores whose argmax is a draw from softmax(logits / temperature).

    argmax_v (z_v / τ − log e_v) with e_v exponentially distributed. Each row has its own generator.
    """

    def __init__(self, temperature: float, generators: Sequence[torch.Generator]) -> None:
        self._temperature, self._generators = temperature, generators

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores [B, V] of the next token of each row."""
        e_BV = torch.empty_like(scores)
        for e_V, generator in zip(e_BV, self._generators, strict=True):
            e_V.exponential_(generator=generator)
        smallest = torch.finfo(scores.dtype).tiny  # 0 is drawn now and then
        return scores / self._temperature - e_BV.clamp_min(smallest).log()


def _keys(prompts: Sequence[Sequence[int]], seed: int) -> list[int]:
    """Seeds of the draws after each prompt, which do not depend on the other prompts."""
    seen: Counter[tuple[int, ...]] = Counter()
    keys = []
    for prompt in map(tuple, prompts):
        digest = hashlib.sha256(repr((seed, seen[prompt], *prompt)).encode()).digest()
        keys.append(int.from_bytes(digest[:7], "big"))
        seen[prompt] += 1
    return keys


def _groups(
    prompts: Sequence[Sequence[int]], decoding: Decoding, window: int | None, writer: _Writer
) -> list[tuple[int, list[int]]]:
    """(most new tokens, numbers of the prompts) of each batch.

    Near the window's end only prompts with the same room share a batch, so that none is cut short
    by another.
    """

    def room(index: int) -> int:
        most = decoding.max_new_tokens
        return min(most, window - len(prompts[index])) if window else most

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
        count = max(1, decoding.batch_tokens // (len(prompts[order[0]]) + new))
        count = 1 if writer.company == "none" else count
        group = [i for i in order[:count] if kind(i) == kind(order[0])]
        groups.append((new, group))
        order = order[len(group) :]
    return groups


def _is_alone(model: Any, text: Sequence[int], width: int) -> bool:
    """Whether the next two tokens of ``text`` are as likely in a batch of that width as alone.

    Compares the text alone with the text in a batch, which also shows the effect of padding as
    such, and two batches of one shape with different tokens around the text. Rounding differs less
    between the latter, so their limit is tighter.
    """
    vocabulary = model.get_input_embeddings().num_embeddings
    beside = [[(token + shift) % vocabulary for token in range(width)] for shift in (3, 5)]
    pads = [model.generation_config.pad_token_id, (text[0] + 1) % vocabulary]
    alone = _first_logits(model, [text], pads[0])
    one, other = (_first_logits(model, [text, b], p) for b, p in zip(beside, pads, strict=True))
    eps = torch.finfo(next(model.parameters()).dtype).eps
    return _close(alone, one, max(1e-4, 16 * eps)) and _close(one, other, max(1e-4, 4 * eps))


def _close(some: Sequence[Tensor], others: Sequence[Tensor], limit: float) -> bool:
    """Whether the first rows of logits [B, V] differ by no more than ``limit`` of their norm."""
    return all(
        bool((one_BV[0] - other_BV[0]).norm() <= limit * one_BV[0].norm())  # NaN differs
        for one_BV, other_BV in zip(some, others, strict=False)
    )


def _first_logits(model: Any, texts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, ...]:
    """Logits [B, V] of the next two tokens, the second from the cache where the model has one."""
    return model.generate(
        **_left_padded(model, texts, pad),
        max_new_tokens=2,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    ).logits


def _left_padded(model: Any, texts: Sequence[Sequence[int]], pad: int) -> dict[str, Any]:
    """Tokens [B, T] and, where the model takes one, the mask of the padding."""
    device = next(model.parameters()).device
    rows = [torch.tensor(text) for text in texts]
    pad_left = partial(pad_sequence, batch_first=True, padding_side="left")
    inputs = {"input_ids": pad_left(rows, padding_value=pad).to(device)}
    if _takes_mask(model):
        inputs["attention_mask"] = pad_left([torch.ones_like(row) for row in rows]).to(device)
    return inputs


def _takes_mask(model: Any) -> bool:
    return "attention_mask" in inspect.signature(model.forward).parameters


@contextlib.contextmanager
def _plain_generation(model: Any, ends: Sequence[int]) -> Iterator[None]:
    """The frozen model, without the checkpoint's own sampling and penalties."""
    own = model.generation_config
    model.generation_config = GenerationConfig(
        bos_token_id=own.bos_token_id,
        eos_token_id=list(ends) or None,
        pad_token_id=min(ends, default=0),  # masked, and cut off after the end: any token will do
    )
    try:
        with frozen(model):
            yield
    finally:
        model.generation_config = own
