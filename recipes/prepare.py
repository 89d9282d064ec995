"""Make the data files that the recipes name.

So many sequences of a text data set, as a model's tokenizer counts them, or a share of its lines:

    python recipes/prepare.py hf:Salesforce/wikitext:wikitext-103-raw-v1:train \
        --model HuggingFaceH4/zephyr-7b-beta --sequences 4000 --out data/wikitext-4000.jsonl
    python recipes/prepare.py hf:locuslab/TOFU:retain90 --share 0.25 \
        --out data/tofu-retain90-quarter.jsonl
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kfade.data.rows import read_rows
from kfade.errors import InputError
from kfade.models.load import load_tokenizer


def take_sequences(
    rows: Iterable[Any], tokenizer: Any, sequences: int, length: int
) -> list[dict[str, str]]:
    """The first texts that fill so many sequences when packed, each closed by EOS; empty ones out.

    Raises:
        InputError: there are not as many.
    """
    taken: list[dict[str, str]] = []
    wanted, tokens = sequences * length, 0
    for row in rows:
        if not row["text"].strip():
            continue
        taken.append({"text": row["text"]})
        tokens += len(tokenizer(row["text"]).input_ids) + 1
        if tokens >= wanted:
            return taken
    raise InputError(f"only {tokens // length} sequences of {length} tokens, not {sequences}")


def take_share(rows: Iterable[Any], share: float, seed: int) -> list[Any]:
    """A share of the lines, drawn without replacement, in their order."""
    every = list(rows)
    chosen = sorted(random.Random(seed).sample(range(len(every)), round(share * len(every))))
    return [every[i] for i in chosen]


def main(arguments: list[str] | None = None) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", help="JSONL file or hf:NAME[:CONFIG][:SPLIT]")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", help="whose tokenizer counts")
    parser.add_argument("--sequences", type=int)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--share", type=float)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    rows = (row for _, row in read_rows(given.source))
    if given.share is not None and 0 < given.share <= 1:
        taken = take_share(rows, given.share, given.seed)
    elif given.sequences and given.model:
        taken = take_sequences(rows, load_tokenizer(given.model), given.sequences, given.length)
    else:
        parser.error("give --share, over 0 and up to 1, or --sequences and --model")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in taken)
    given.out.write_text(lines, encoding="utf-8")
    print(f"{len(taken)} lines written to {given.out}", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"prepare: {error}")
