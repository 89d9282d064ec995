"""Tiny random models of every family that kfade must handle, a tiny tokenizer, and tiny data.

``import zoo`` has what most tests need. Its other modules are for what few do: ``zoo.unusual`` and
``zoo.caches`` have models of other kinds, ``zoo.rotary`` models whose frequencies follow the length
of the input, ``zoo.rows`` rows of data files.
"""

from zoo.families import (
    BLOCKS,
    FAMILIES,
    GROUPED,
    INNER,
    SHAPE,
    SLIDING,
    VOCABULARY,
    WIDTH,
    WINDOW,
    Double,
    sequences,
    tiny,
)
from zoo.folders import save
from zoo.gguf_file import write_gguf
from zoo.words import CHAT_TEMPLATE, SPECIAL, WORDS, tokenizer

__all__ = [
    "BLOCKS",
    "CHAT_TEMPLATE",
    "FAMILIES",
    "GROUPED",
    "INNER",
    "SHAPE",
    "SLIDING",
    "SPECIAL",
    "VOCABULARY",
    "WIDTH",
    "WINDOW",
    "WORDS",
    "Double",
    "save",
    "sequences",
    "tiny",
    "tokenizer",
    "write_gguf",
]
