"""Does ``kfade plan`` foretell what a run on this machine needs?

    python benchmarks/plan_check.py --model FOLDER --text FILE

Plans one step of unlearning from the model's configuration, with this machine's measured speed,
then runs it: ``kfade unlearn`` on sequences of 512 tokens of FILE. Writes
``benchmarks/results/plan_check.jsonl`` and prints planned and measured bytes and seconds by stage.
The seconds of a step's size are left out: how many sequences and trials they take depends on data.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import options_of
from experiments.lab.records import RESULTS, table, timed, write

FILE = RESULTS / "plan_check.jsonl"
LENGTH, BATCH_TOKENS = 512, 511
RETAIN, FORGET, HELD_OUT = 4, 4, 2  # sequences
STAGES = ("covariance", "eigh", "lambda", "gradient")


def main() -> None:
    options = options_of(__doc__)
    options.add_argument("--batch-tokens", type=int, default=BATCH_TOKENS)
    given = options.parse_args()
    batch = ["--batch-tokens", str(given.batch_tokens)]
    tokens = ["--tokens", str(RETAIN * LENGTH), "--forget-tokens", str(FORGET * LENGTH)]
    one = ["--steps", "1", "--correct", "0"]
    planned = kfade("plan", str(given.model), "--measure", *tokens, *batch, *one)
    with tempfile.TemporaryDirectory() as folder:
        forget, retain = write_examples(given.model, given.text, Path(folder))
        run = kfade(
            *("unlearn", str(given.model), "--forget", str(forget), "--retain", str(retain)),
            *("--holdout", str(HELD_OUT), "--alpha", "1e-4", "--out", str(Path(folder) / "out")),
            *("--sequence-length", str(LENGTH), "--template", "plain", "--no-pack"),
            *batch,
            *one,
        )
    result = compared(planned, run)
    write(FILE, result)
    for what, stages in result.items():
        rows = [
            [stage, f"{plan:.4g}", f"{real:.4g}", f"{plan / real:.2f}"]
            for stage, (plan, real) in stages.items()
        ]
        print(table(f"{what} | planned | measured | planned / measured", rows))


def kfade(*arguments: str) -> dict[str, Any]:
    """What a command prints with ``--json``."""
    _, printed = timed([sys.executable, "-m", "kfade", *arguments, "--json"])
    return json.loads(printed)


def write_examples(model: Path, text: Path, folder: Path) -> list[Path]:
    """Forget and retain examples of ``LENGTH`` tokens each, with the EOS that closes them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids, texts, start = tokenizer(text.read_text(encoding="utf-8")).input_ids, [], 0
    while len(texts) < FORGET + RETAIN + HELD_OUT:
        piece = tokenizer.decode(ids[start : start + LENGTH - 1])
        start += LENGTH
        if len(tokenizer(piece).input_ids) == LENGTH - 1:  # the cut may have split a word
            texts.append(piece)
    paths = []
    for name, part in {"forget": texts[:FORGET], "retain": texts[FORGET:]}.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": t}) + "\n" for t in part), encoding="utf-8")
        paths.append(path)
    return paths


def compared(planned: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    """Planned and measured values side by side."""
    peaks, seconds = planned["peak_bytes"]["planned"], planned["seconds"]["1"]
    real_peaks = run["peak_bytes_by_stage"]
    real_seconds = {**run["seconds"], **run["fit_seconds"]}
    found = {
        "peak bytes": {stage: (peaks[stage], real_peaks[stage]) for stage in STAGES},
        "seconds": {stage: (seconds[stage], real_seconds[stage]) for stage in STAGES},
    }
    for rows, whole in zip(found.values(), (max, sum), strict=True):
        rows["all"] = (whole(plan for plan, _ in rows.values()), whole(r for _, r in rows.values()))
    return found


if __name__ == "__main__":
    main()
