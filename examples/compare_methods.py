"""kfade and a baseline on the same data, each measured by the same code.

python examples/compare_methods.py MODEL forget.jsonl retain.jsonl OUT
"""

import sys
from pathlib import Path

from kfade.cli import main as kfade


def main(name: str, forget: str, retain: str, out: str, *options: str) -> Path:
    """Two updates, their KL on prompts, and one page with both; returns the page."""
    folder = Path(out)
    data = ["--forget", forget, "--retain", retain, *options]
    run(["unlearn", name, *data, "--kl", "0.01", "--out", str(folder / "kfade")])
    run(["baseline", "npo", name, *data, "--lr", "1e-4", "--out", str(folder / "npo")])
    for method in ("kfade", "npo"):
        given = ["--update", str(folder / method), "--prompts", forget, "--max-new-tokens", "8"]
        run(["eval", "kl", name, *given, "--out", str(folder / f"{method}-kl")])
    page = folder / "report.html"
    run(["report", str(folder), "--out", str(page)])
    return page


def run(arguments: list[str]) -> None:
    """One command of kfade; stops where it fails."""
    code = kfade(arguments)
    if code != 0:
        raise SystemExit(code)


if __name__ == "__main__":
    main(*sys.argv[1:])
