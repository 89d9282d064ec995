"""kfade's curvature fit beside other libraries', on one machine, in one run.

    python benchmarks/fit_speed.py --model FOLDER --text FILE --python peers/bin/python \
        --sequences 16 --rounds 3

Every measurement is a process of its own (``benchmarks/peers``), and the libraries take turns, so
that a slow minute of the machine falls on all. The interpreter has kfade and the peers installed
(``benchmarks/peers/requirements.txt``). Writes ``benchmarks/results/fit_speed.jsonl``, adding to
what is there of the same sizes (``--only`` some, and later others), and prints the tables of
``docs/performance.md``. ``--tables`` prints them from the results and measures nothing.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import options_of, token_rows
from experiments.lab.records import BENCHMARKS, RESULTS, Record, median, read, table, timed, write

FILE = RESULTS / "fit_speed.jsonl"
LENGTH = 512
RUNS: list[tuple[str, list[str]]] = [
    ("kfade", ["--peer", "kfade", "--batch", "2"]),
    ("kronfluence", ["--peer", "kronfluence", "--batch", "1"]),
    ("kfade bf16", ["--peer", "kfade", "--batch", "4", "--dtype", "bfloat16"]),
    ("kfade, 1 a batch", ["--peer", "kfade", "--batch", "1"]),
    ("kfade --recompute, 1 a batch", ["--peer", "kfade", "--batch", "1", "--recompute"]),
    ("kronfluence, 2 a batch", ["--peer", "kronfluence", "--batch", "2"]),
    ("kronfluence bf16", ["--peer", "kronfluence", "--batch", "1", "--dtype", "bfloat16"]),
    (
        "kronfluence bf16, 4 a batch",
        ["--peer", "kronfluence", "--batch", "4", "--dtype", "bfloat16"],
    ),
    ("curvlinops", ["--peer", "curvlinops", "--batch", "1"]),
    ("bergson", ["--peer", "bergson", "--batch", "1"]),
]
STAGES = ("covariance", "eigh", "lambda", "total")


def main() -> None:
    if sys.argv[1:] == ["--tables"]:
        print(tables(read(FILE)))
        return
    options = options_of(__doc__)
    options.add_argument("--python", default=sys.executable, help="has the peers installed")
    options.add_argument("--sequences", type=int, default=16)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--only", nargs="*", default=[name for name, _ in RUNS])
    given = options.parse_args()
    runs = [(name, arguments) for name, arguments in RUNS if name in given.only]
    sizes = {"length": LENGTH, "sequences": given.sequences}
    results = read(FILE)
    if results.get("sizes") != sizes:
        results = {"sizes": sizes}
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder) / "tokens.safetensors"
        write_tokens(given.model, given.text, given.sequences, tokens)
        common = ["--model", str(given.model), "--tokens", str(tokens)]
        for dtype in ("float32", "bfloat16"):
            if dtype == "float32" or any(dtype in arguments for _, arguments in runs):
                options = [*common, "--dtype", dtype]
                results[f"limit {dtype}"] = measured(given.python, "limit.py", options)
        for number in range(given.rounds):
            for name, arguments in runs:
                print(f"round {number + 1} of {given.rounds}: {name}", file=sys.stderr)
                job = ["--job", "ekfac", "--sequences", str(given.sequences)]
                found = measured(given.python, "worker.py", [*common, *job, *arguments])
                results.setdefault(name, {"runs": []})["runs"].append(found)
                write(FILE, results)
    print(tables(results))


def write_tokens(model: Path, text: Path, sequences: int, path: Path) -> None:
    """The first tokens of the text, in sequences of ``LENGTH``."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    rows = token_rows(AutoTokenizer.from_pretrained(model), text, sequences, LENGTH)
    save_file({"tokens": torch.tensor(rows)}, path)


def measured(python: str, script: str, arguments: list[str]) -> dict[str, Any]:
    """What one process printed."""
    _, printed = timed([python, str(BENCHMARKS / "peers" / script), *arguments])
    return json.loads(printed.splitlines()[-1])


def tables(results: dict[str, Record]) -> str:
    """Milliseconds a token (median, and range over rounds), ratios and peaks, as Markdown."""
    runs = {name: record["runs"] for name, record in results.items() if "runs" in record}
    lines = []
    for name, own in runs.items():
        if "cannot" in own[0]:
            lines.append([name, own[0]["cannot"], "", "", "", "", ""])
            continue
        per_token = 1e3 / own[0]["tokens"]
        seconds = {stage: [run["seconds"][stage] for run in own] for stage in STAGES}
        kfac = [sum(pair) for pair in zip(seconds["covariance"], seconds["eigh"], strict=True)]
        cells = [
            median([per_token * s for s in seconds["covariance"]], 2),
            median(seconds["eigh"], 1),
            median([per_token * s for s in seconds["lambda"]], 2),
            median(seconds["total"], 0),
            median(kfac, 0),
            median([run["peak_bytes"]["total"] / 1e9 for run in own], 2),
        ]
        lines.append([name, *cells])
    speed = table(
        "library | covariances, ms/token | eigh, s | Λ, ms/token | whole EK-FAC, s | K-FAC, s | "
        "peak, GB",
        lines,
    )
    return "\n\n".join([speed, ratios(runs), limits(results, runs)])


def ratios(runs: dict[str, list[Record]]) -> str:
    """kronfluence in float32 over kfade, round by round."""
    lines = []
    for name in (name for name, _ in RUNS if name.startswith("kfade") and name in runs):
        pairs = list(zip(runs.get("kronfluence", ()), runs[name], strict=False))
        if pairs:
            cells = [
                median([peer["seconds"][s] / own["seconds"][s] for peer, own in pairs], 2)
                for s in STAGES
            ]
            peaks = [
                peer["peak_bytes"]["total"] / own["peak_bytes"]["total"] for peer, own in pairs
            ]
            lines.append([name, *cells, median(peaks, 2)])
    return table("kronfluence (float32) over | covariances | eigh | Λ | whole EK-FAC | peak", lines)


def limits(results: dict[str, Record], runs: dict[str, list[Record]]) -> str:
    """The covariance pass over what its arithmetic costs."""
    lines = []
    for name, dtype in (("kfade", "float32"), ("kfade bf16", "bfloat16")):
        if f"limit {dtype}" in results:
            parts = results[f"limit {dtype}"]["seconds_per_token"].values()
            limit = sum(parts)
            over = [r["seconds"]["covariance"] / r["tokens"] / limit for r in runs.get(name, ())]
            listed = ", ".join(f"{1e3 * seconds:.2f}" for seconds in parts)
            ratio = median(over, 2) if over else ""
            lines.append([name, f"{1e3 * limit:.2f}", listed, ratio])
    return table(
        "library | limit, ms/token | of it forward, backward, head, symmetric | pass / limit", lines
    )


if __name__ == "__main__":
    main()
