"""An experiment piece by piece: what is there is not computed again, each is written when done."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from kfade.demo.run import demo_model

Results = dict[str, Any]
Piece = tuple[str, Callable[[], dict[str, Any]]]


def options_of(description: str | None, results: Path) -> argparse.ArgumentParser:
    """The options that all experiments share."""
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    options.add_argument("--model", default=demo_model(), help="[the demo's model]")
    options.add_argument("--cache", type=Path, default=Path("~/.cache/kfade").expanduser())
    options.add_argument("--results", type=Path, default=results)
    options.add_argument("--only", nargs="*", default=["*"], help="patterns of pieces")
    options.add_argument("--skip", nargs="*", default=[], help="patterns of pieces")
    options.add_argument("--list", action="store_true", help="name the pieces and stop")
    options.add_argument(
        "--pace",
        type=float,
        default=1.0,
        help="how many times as fast as the machine of the results that are there this one is",
    )
    return options


def opened(path: Path, settings: Mapping[str, Any]) -> Results:
    """The results so far.

    Raises:
        SystemExit: they are of other settings.
    """
    results = json.loads(path.read_text()) if path.exists() else {"settings": dict(settings)}
    if results["settings"] != dict(settings):
        raise SystemExit(f"{path} is of other settings ({results['settings']}): give --results")
    return results


def run(pieces: Iterable[Piece], results: Results, arguments: argparse.Namespace) -> None:
    """Compute the pieces that are wanted and not there; ``pieces`` may look at the results."""
    path = arguments.results
    for name, compute in pieces:
        wanted = any(fnmatchcase(name, pattern) for pattern in arguments.only)
        wanted = wanted and not any(fnmatchcase(name, pattern) for pattern in arguments.skip)
        if arguments.list:
            print(f"{name:<32}{'done' if name in results else ''}")
        elif wanted and name not in results:
            start = time.perf_counter()
            row = compute()
            results[name] = {**row, "piece_seconds": time.perf_counter() - start}
            if arguments.pace != 1:
                results[name]["pace"] = arguments.pace
            aside = path.with_suffix(".writing")
            aside.write_text(json.dumps(results, indent=1) + "\n")
            os.replace(aside, path)
            shown = {k: v for k, v in row.items() if isinstance(v, float | str)}
            print(f"{name}: {results[name]['piece_seconds']:.0f} s {shown}", flush=True)


def made(folder: Path, make: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """What ``make`` told when it filled ``folder``, with its seconds; what is there is whole."""
    record = folder / "record.json"
    if not folder.exists():
        part = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        start = time.perf_counter()
        told = make(part)
        told["seconds"] = time.perf_counter() - start
        (part / record.name).write_text(json.dumps(told))
        os.replace(part, folder)
    return json.loads(record.read_text())
