"""Run an experiment piece by piece and keep each result when it is done."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

from kfade.cli.session import session
from kfade.demo.run import demo_model

from .records import Record, read, write

Results = dict[str, Record]
Piece = tuple[str, Callable[[], Record]]
"""A name and the function that computes its record."""
Sizes = TypeVar("Sizes")


def options_of(description: str | None, results: Path) -> argparse.ArgumentParser:
    """The options of every experiment.

    Args:
        results: default of ``--results``. Sizes of the experiment may stand in the file's name, as
            in ``topic_{subject}.jsonl``.
    """
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    options.add_argument("--model", default=demo_model(), help="[the demo's model]")
    options.add_argument("--cache", type=Path, default=Path("~/.cache/kfade").expanduser())
    options.add_argument("--results", type=Path, default=results)
    options.add_argument("--tuned", type=Path, help="results whose chosen settings are taken")
    options.add_argument("--only", nargs="*", default=["*"], help="run pieces that match a pattern")
    options.add_argument("--skip", nargs="*", default=[], help="skip pieces that match a pattern")
    options.add_argument("--list", action="store_true", help="list the pieces and stop")
    options.add_argument("--device", help="where models run [the GPU if there is one]")
    options.add_argument(
        "--minutes", type=float, default=math.inf, help="begin no piece after so many minutes"
    )
    options.add_argument(
        "--pace",
        type=float,
        default=1.0,
        help="speed of this machine, relative to the machine of the results so far [1]",
    )
    return options


def read_options(
    options: argparse.ArgumentParser, default: Sizes
) -> tuple[argparse.Namespace, Sizes, Results]:
    """The values given to ``options``, the experiment's sizes, and the results so far.

    Every field of ``default`` but ``model`` is an option.

    Raises:
        SystemExit: the results in the file have other settings.
    """
    fields = {name: value for name, value in asdict(default).items() if name != "model"}
    for name, value in fields.items():
        options.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    given = options.parse_args()
    own = {name: getattr(given, name) for name in fields}
    given.results = Path(str(given.results).format(**own))
    sizes = replace(default, model=Path(given.model).name, **own)
    results = read(given.results) or {"settings": asdict(sizes)}
    if results["settings"] != asdict(sizes):
        was = results["settings"]
        raise SystemExit(f"{given.results} has other settings ({was}): give --results FILE")
    for name, told in read(given.tuned).items() if given.tuned else ():
        if name.startswith("tune "):
            results.setdefault(name, {**told, "tuned_in": given.tuned.name})
    return given, sizes, results


def run(pieces: Iterable[Piece], results: Results, given: argparse.Namespace) -> None:
    """Compute the pieces that are wanted and missing, and show their progress on standard error.
    ``pieces`` may look at the results so far. No piece begins when ``given.minutes`` are over.
    """
    begun = time.perf_counter()

    def wanted(name: str) -> bool:
        def match(patterns: list[str]) -> bool:
            return any(fnmatchcase(name, pattern) for pattern in patterns)

        return match(given.only) and not match(given.skip)

    for name, compute in pieces:
        if given.list:
            print(f"{name:<32}{'done' if name in results else ''}")
        elif wanted(name) and name not in results:
            start = time.perf_counter()
            if start - begun > 60 * given.minutes:
                print(f"{given.minutes:g} minutes are over: call it again for the rest", flush=True)
                return
            print(f"{name} ...", file=sys.stderr, flush=True)
            with session():
                record = compute()
            results[name] = {**record, "piece_seconds": time.perf_counter() - start}
            if given.pace != 1:
                results[name]["pace"] = given.pace
            write(given.results, results)
            shown = {k: v for k, v in record.items() if isinstance(v, float | str)}
            print(f"{name}: {results[name]['piece_seconds']:.0f} s {shown}", flush=True)


def make_once(folder: Path, make: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """The record that ``make`` returned when it filled ``folder``, with its seconds.

    A folder that is there is whole, and is not made again.
    """
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
