"""What a sweep of 60 points costs beside 60 runs.

    python benchmarks/experiments/sweep_time.py --data DIR [--model FOLDER]

``kfade fit`` once and ``kfade sweep`` over six dampings and ten lengths of the step, against one
``kfade unlearn`` of the same data and one of those points, times 60. Seconds are of whole commands,
with loading the model. TOFU's questions: one author's to forget, five authors' to retain. Writes
``benchmarks/results/sweep_time.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from lab.records import RESULTS, Record, timed, write
from tofu_data import OF_AUTHOR

from kfade.demo.run import demo_model

FILE = RESULTS / "sweep_time.jsonl"
DAMPINGS = (1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0)  # times the mean eigenvalue
ALPHAS = tuple(1e-4 * 1.6**power for power in range(10))
RETAIN_AUTHORS, HELD_OUT = 5, 8


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--data", type=Path, required=True, help="folder with tofu/")
    options.add_argument("--model", default=demo_model(), help="[the demo's model]")
    options.add_argument("--results", type=Path, default=FILE)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = (given.data / "tofu" / "full.json").read_text(encoding="utf-8").splitlines()
        first = len(lines) - OF_AUTHOR
        write_lines(folder / "forget.jsonl", lines[first:])
        write_lines(folder / "retain.jsonl", lines[first - RETAIN_AUTHORS * OF_AUTHOR : first])
        result = measured(str(given.model), folder)
    write(given.results, result)
    print(result)


def write_lines(path: Path, lines: list[str]) -> None:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def measured(model: str, folder: Path) -> dict[str, Record]:
    """Seconds of each command, and how many points the sweep measured."""
    fit, sweep, run = folder / "fit", folder / "sweep", folder / "run"
    retain = ("--retain", str(folder / "retain.jsonl"), "--holdout", str(HELD_OUT))
    forget = ("--forget", str(folder / "forget.jsonl"))
    dampings = ",".join(f"{damping:g}" for damping in DAMPINGS)
    alphas = ",".join(f"{alpha:.3g}" for alpha in ALPHAS)
    one = ("--relative-damping", "0.1", "--alpha", alphas.split(",")[len(ALPHAS) // 2])
    taken = {
        "fit": kfade("fit", model, *retain, "--out", str(fit)),
        "sweep": kfade(
            *("sweep", model, "--curvature", str(fit), *forget, "--out", str(sweep)),
            *("--relative-damping", dampings, "--alpha", alphas),
        ),
        "run": kfade("unlearn", model, *forget, *retain, *one, "--out", str(run)),
    }
    lines = (sweep / "points.jsonl").read_text(encoding="utf-8").splitlines()
    points = sum("alpha" in json.loads(line) for line in lines)
    ours, theirs = taken["fit"] + taken["sweep"], points * taken["run"]
    sweep_told = {"points": points, "fit and sweep": ours, "separate runs": theirs}
    return {"seconds": taken, "sweep": {**sweep_told, "ratio": theirs / ours}}


def kfade(*arguments: str) -> float:
    """Seconds of a command."""
    return timed([sys.executable, "-m", "kfade", *arguments])[0]


if __name__ == "__main__":
    main()
