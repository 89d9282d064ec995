"""Generation in batches: padded at the left, greedy or at a temperature, nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
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
    *,
    max_new_tokens: int,
    batch: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[str]:
    """The model's continuation of each prompt (given as tokens), up to its first end token.

    A continuation ends sooner than ``max_new_tokens`` where the model's window does.

    Args:
        batch: prompts at a time, longest first.
        temperature: 0 takes the likeliest token; else the whole softmax is sampled at it.
        seed: of the sampling; what is drawn depends on the batch, too.

    Raises:
        InputError: a prompt leaves no room in the model's window.
    """
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    groups = [order[start : start + batch] for start in range(0, len(order), batch)]
    window = model_window(model)
    if window and order and len(prompts[order[0]]) >= window:
        raise InputError(
            f"a prompt of {len(prompts[order[0]])} tokens leaves no room to generate in the "
            f"model's window of {window}; shorten it"
        )
    texts = [""] * len(prompts)
    with frozen(model), _only_asked_for(model, tokenizer) as stops, _seeded(model, seed):
        for group in track(groups, "generation", len):
            width = len(prompts[group[0]])
            room = min(max_new_tokens, window - width) if window else max_new_tokens
            rows = _continue(model, [prompts[i] for i in group], room, temperature)
            for i, row in zip(group, rows, strict=True):
                end = next((t for t, token in enumerate(row) if token in stops), len(row))
                texts[i] = tokenizer.decode(row[:end], skip_special_tokens=True)
    return texts


def _continue(
    model: Any, prompts: Sequence[Sequence[int]], room: int, temperature: float
) -> list[list[int]]:
    """New tokens of each prompt, those after an end token included."""
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
def _only_asked_for(model: Any, tokenizer: Any) -> Iterator[frozenset[int]]:
    """Without the checkpoint's own sampling and penalties; yields the tokens that end a text."""
    own = model.generation_config
    ends = own.eos_token_id
    stops = {ends} if isinstance(ends, int) else set(ends or ())
    if tokenizer.eos_token_id is not None:
        stops.add(tokenizer.eos_token_id)
    model.generation_config = GenerationConfig(
        bos_token_id=own.bos_token_id,
        eos_token_id=sorted(stops) or None,
        pad_token_id=min(stops, default=0),  # masked, and cut off after the end: any token will do
    )
    try:
        yield frozenset(stops)
    finally:
        model.generation_config = own


@contextlib.contextmanager
def _seeded(model: nn.Module, seed: int) -> Iterator[None]:
    """Random numbers from ``seed``, the generators as before on leaving."""
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
