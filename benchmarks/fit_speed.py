"""kfade's curvature fit beside other libraries', on one machine, in one run.

    python benchmarks/fit_speed.py --model FOLDER --text FILE --python peers/bin/python \
        --sequences 16 --rounds 3

Every measurement is a process of its own (``benchmarks/peers``), and the libraries take turns, so
that a slow minute of the machine falls on all. The interpreter has kfade and the peers installed
(``benchmarks/peers/requirements.txt``). Writes ``benchmarks/results/fit_speed.json``, adding to
what is there of the same sizes (``--only`` some, and later others), and prints the tables of
``docs/performance.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULT = HERE / "results" / "fit_speed.json"
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
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--model", type=Path, required=True, help="folder of SmolLM2-135M")
    options.add_argument("--text", type=Path, required=True, help="a text file")
    options.add_argument("--python", default=sys.executable)
    options.add_argument("--sequences", type=int, default=16)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--only", nargs="*", default=[name for name, _ in RUNS])
    given = options.parse_args()
    runs = [(name, arguments) for name, arguments in RUNS if name in given.only]
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder) / "tokens.safetensors"
        write_tokens(given.model, given.text, given.sequences, tokens)
        common = ["--model", str(given.model), "--tokens", str(tokens)]
        sizes = {"length": LENGTH, "sequences": given.sequences}
        result: dict[str, Any] = {**sizes, "runs": {}}
        if RESULT.exists():
            before = json.loads(RESULT.read_text(encoding="utf-8"))
            result = before if {name: before[name] for name in sizes} == sizes else result
        result["limit"] = {
            dtype: measured(given.python, "limit.py", [*common, "--dtype", dtype])
            for dtype in ("float32", "bfloat16")
            if dtype == "float32" or any(dtype in arguments for _, arguments in runs)
        }
        for number in range(given.rounds):
            for name, arguments in runs:
                print(f"round {number + 1} of {given.rounds}: {name}", file=sys.stderr)
                job = ["--job", "ekfac", "--sequences", str(given.sequences)]
                found = measured(given.python, "worker.py", [*common, *job, *arguments])
                result["runs"].setdefault(name, []).append(found)
                RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(tables(result))


def write_tokens(model: Path, text: Path, sequences: int, path: Path) -> None:
    """The first tokens of ``text``, packed."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    content = text.read_text(encoding="utf-8")[: 8 * LENGTH * sequences]
    ids = tokenizer(content).input_ids[: sequences * LENGTH]
    if len(ids) < sequences * LENGTH:
        raise SystemExit(f"{text}: too short for {sequences} sequences of {LENGTH} tokens")
    save_file({"tokens": torch.tensor(ids).view(sequences, LENGTH)}, path)


def measured(python: str, script: str, arguments: list[str]) -> dict[str, Any]:
    """What one process printed."""
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent / "src"), "HF_HUB_OFFLINE": "1"}
    command = [python, str(HERE / "peers" / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def tables(result: dict[str, Any]) -> str:
    """Milliseconds a token (median, and range over rounds), ratios and peaks, as Markdown."""
    rows = [
        "| library | covariances, ms/token | eigh, s | Λ, ms/token | whole EK-FAC, s | K-FAC, s "
        "| peak, GB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, runs in result["runs"].items():
        if "cannot" in runs[0]:
            rows.append(f"| {name} | {runs[0]['cannot']} | | | | | |")
            continue
        tokens = runs[0]["tokens"]
        cells = [
            spread([1e3 * r["seconds"]["covariance"] / tokens for r in runs], 2),
            spread([r["seconds"]["eigh"] for r in runs], 1),
            spread([1e3 * r["seconds"]["lambda"] / tokens for r in runs], 2),
            spread([r["seconds"]["total"] for r in runs], 0),
            spread([r["seconds"]["covariance"] + r["seconds"]["eigh"] for r in runs], 0),
            spread([r["peak_bytes"]["total"] / 1e9 for r in runs], 2),
        ]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    rows += ["", *ratios(result), "", *limits(result)]
    return "\n".join(rows)


def ratios(result: dict[str, Any]) -> list[str]:
    """kronfluence in float32 over kfade, round by round."""
    runs = result["runs"]
    lines = ["| kronfluence (float32) over | covariances | eigh | Λ | whole EK-FAC | peak |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for name in (name for name, _ in RUNS if name.startswith("kfade")):
        if name not in runs or "kronfluence" not in runs:
            continue
        pairs = list(zip(runs["kronfluence"], runs[name], strict=False))
        cells = [
            spread([peer["seconds"][stage] / own["seconds"][stage] for peer, own in pairs], 2)
            for stage in STAGES
        ]
        cells.append(
            spread(
                [peer["peak_bytes"]["total"] / own["peak_bytes"]["total"] for peer, own in pairs], 2
            )
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def limits(result: dict[str, Any]) -> list[str]:
    """The covariance pass over what its arithmetic costs."""
    lines = ["| | limit, ms/token | of it forward, backward, head, symmetric | pass / limit |"]
    lines.append("| --- | --- | --- | --- |")
    for name, dtype in (("kfade", "float32"), ("kfade bf16", "bfloat16")):
        if dtype not in result["limit"]:
            continue
        parts = result["limit"][dtype]["seconds_per_token"]
        limit = sum(parts.values())
        runs = result["runs"].get(name, [])
        over = [r["seconds"]["covariance"] / r["tokens"] / limit for r in runs]
        listed = ", ".join(f"{1e3 * seconds:.2f}" for seconds in parts.values())
        cell = spread(over, 2) if over else ""
        lines.append(f"| {name} | {1e3 * limit:.2f} | {listed} | {cell} |")
    return lines


def spread(values: list[float], digits: int) -> str:
    """Median, and the range where there are several."""
    middle = f"{statistics.median(values):.{digits}f}"
    if len(values) == 1:
        return middle
    return f"{middle} ({min(values):.{digits}f}–{max(values):.{digits}f})"


if __name__ == "__main__":
    main()
