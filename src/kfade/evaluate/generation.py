"""Generation in batches: padded at the left, greedy or at a temperature, nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from kfade.errors import InputError
from kfade.models import frozen, model_window
from kfade.progress import track


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
        seed: of the sampling; what is drawn depends on the batches, too.

    Raises:
        InputError: a prompt leaves no room in the model's window.
    """
    ends = end_tokens(model, tokenizer)
    groups = _groups(prompts, max_new_tokens, batch_tokens, model_window(model))
    with frozen(model), _only_asked_for(model, ends), _seeded(model, seed):
        for room, group in track(groups, "generation", lambda numbered: len(numbered[1])):
            rows = _continue(model, [prompts[i] for i in group], room, temperature)
            for index, row in zip(group, rows, strict=True):
                stop = next((t for t, token in enumerate(row) if token in ends), len(row))
                note(index, row[: stop + 1])


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


def _groups(
    prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_tokens: int, window: int | None
) -> list[tuple[int, list[int]]]:
    """(new tokens at most, numbers of the prompts) of each batch.

    Near the window's end only prompts with the same room share a batch, so that none is cut short
    by its neighbour.
    """

    def room(index: int) -> int:
        return min(max_new_tokens, window - len(prompts[index])) if window else max_new_tokens

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
        group = [i for i in order[:count] if room(i) == new]
        groups.append((new, group))
        order = order[len(group) :]
    return groups


def _continue(
    model: Any, prompts: Sequence[Sequence[int]], room: int, temperature: float
) -> list[list[int]]:
    """New tokens of each prompt, those after an end token included; the first is the longest."""
    device = next(model.parameters()).device
    width = len(prompts[0])
    tokens_BT = torch.full((len(prompts), width), model.generation_config.pad_token_id)
    mask_BT = torch.zeros_like(tokens_BT)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, width - len(prompt) :] = torch.tensor(prompt)
        mask_BT[row, width - len(prompt) :] = 1
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    whole_BT = model.generate(
        input_ids=tokens_BT.to(device),
        attention_mask=mask_BT.to(device),
        max_new_tokens=room,
        **(sampling if temperature > 0 else {"do_sample": False}),
    )
    return whole_BT[:, width:].tolist()


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


@contextlib.contextmanager
def _seeded(model: nn.Module, seed: int) -> Iterator[None]:
    """Random numbers from ``seed``, the generators as before on leaving."""
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
