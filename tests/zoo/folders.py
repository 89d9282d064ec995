"""A model and its tokenizer in a folder, as ``from_pretrained`` loads them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from zoo.families import tiny
from zoo.words import tokenizer


def save(folder: str | Path, model: nn.Module | None = None, *, chat: bool = False) -> None:
    """Write ``model``, a tiny Llama if None, and the tiny tokenizer into ``folder``."""
    model = tiny("llama", dtype=torch.float32) if model is None else model
    model.save_pretrained(folder)
    tokenizer(chat=chat).save_pretrained(folder)
