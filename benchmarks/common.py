"""What the benchmarks share: their options and their text."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kfade.data.sequences import TokenSequence

CHARACTERS = 16  # of text for each token that is wanted: more than any tokenizer needs


def options_of(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options --model and --text."""
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--model", type=Path, required=True, help="folder of the model")
    options.add_argument("--text", type=Path, required=True, help="a text file")
    return options


def token_rows(tokenizer: Any, text: Path, count: int, length: int) -> list[list[int]]:
    """The first tokens of a text file, in ``count`` rows of ``length`` tokens.

    Raises:
        SystemExit: the text is too short.
    """
    content = text.read_text(encoding="utf-8")[: CHARACTERS * count * length]
    ids = tokenizer(content).input_ids[: count * length]
    if len(ids) < count * length:
        raise SystemExit(f"{text}: too short for {count} sequences of {length} tokens")
    return [ids[first : first + length] for first in range(0, len(ids), length)]


def sequences_of(rows: list[list[int]]) -> list[TokenSequence]:
    """Token sequences in which every token but the first is scored."""
    return [TokenSequence(tuple(row), (False,) + (True,) * (len(row) - 1)) for row in rows]
