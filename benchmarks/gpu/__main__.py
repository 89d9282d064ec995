"""Measurements on one GPU, piece by piece.

    PYTHONPATH=src python -m benchmarks.gpu PIECE [--device cuda] [--tiny] [--out DIR] [--minutes 8]

PIECE is tests, fit, peers, eigh, batches, tofu or topic. Every finished measurement is a line of
``DIR/PIECE.jsonl`` and is not made again: call a piece until it says nothing is left. ``--tiny``
makes the same measurements at sizes that a CPU computes in seconds.
"""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path

PIECES = {
    "tests": "device_tests",
    "fit": "llama_fit",
    "peers": "peer_fits",
    "eigh": "decompositions",
    "batches": "decompositions",
    "tofu": "experiments",
    "topic": "experiments",
}
"""Piece -> its module, which has ``main(given) -> table``."""


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("piece", choices=PIECES)
    options.add_argument("--device", default="cuda")
    options.add_argument("--tiny", action="store_true", help="sizes for a rehearsal on a CPU")
    options.add_argument("--out", type=Path, default=Path("out/gpu"))
    options.add_argument(
        "--minutes", type=float, default=8.0, help="begin no measurement after so many minutes"
    )
    options.add_argument("--commit", help="of the code, where git cannot say")
    options.add_argument("--python", help="for peers: an interpreter that has them [this one]")
    options.add_argument("--data", type=Path, help="for tofu and topic: folder of the data sets")
    options.add_argument("--model", help="for tofu and topic: GGUF file or folder")
    given = options.parse_args()
    module = import_module(f"benchmarks.gpu.{PIECES[given.piece]}")
    print(module.main(given))


if __name__ == "__main__":
    main()
