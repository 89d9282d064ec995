"""Tables and figures of TOFU at its full size and of Topic-small, over several seeds.

    python benchmarks/experiments/seeds_page.py FOLDER

FOLDER has results of ``tofu_whole.py`` (``tofu_SPLIT_seedN.jsonl``) and of ``topic_small.py``
(``topic_SUBJECT_seedN.jsonl``). Prints, for each split, the paper's Table 2 (forget quality and
utility of each method) and draws its Figures 1 and 3 into FOLDER: forget quality against utility,
and against the KL on retained questions for each estimator. A cell is the median over seeds, with
the range.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import topic_page
from lab import figures
from lab.intervals import mean
from lab.pieces import Results
from lab.records import number, read_seeds, table
from lab.rows import ESTIMATORS, Row
from tofu_rows import figures_of, log_of_retrained, logs_of, rows_of
from topic_data import SUBJECTS

from kfade.evaluate.tofu_logs import aggregate, choose_row

SPLITS = ("forget01", "forget05", "forget10")
Cells = dict[str, list[float]]
"""Column -> value of each seed."""


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("folder", type=Path)
    folder = options.parse_args().folder
    for split in SPLITS:
        seeds = [*read_seeds(folder, f"tofu_{split}").values()]
        if seeds:
            print(f"TOFU, {split}, {len(seeds)} seeds\n\n{tofu_table(seeds)}\n")
            draw(seeds, folder, split)
    for subject in SUBJECTS:
        if seeds := [*read_seeds(folder, f"topic_{subject}").values()]:
            print(f"Topic-small, {subject}, {len(seeds)} seeds\n\n{topic_table(seeds)}\n")


def tofu_table(seeds: list[Results]) -> str:
    """Table 2: the length of the largest forget quality × utility, and the one that half of the
    forget questions choose, reported on the other half."""
    heads = ("forget quality", "utility", "forget quality, other half", "utility, other half")
    return over_seeds(seeds, tofu_rows, (*heads, "KL at the target", "seconds"))


def tofu_rows(results: Results) -> Iterator[tuple[str, dict[str, float]]]:
    """(method, its figures)."""
    retrained = log_of_retrained(results)
    if retrained is None:
        return
    whole = {"forget quality": 1.0, "utility": aggregate(retrained)["model_utility"]}
    yield "retrained", {**whole, "KL at the target": results["targets"]["retrained"]["report_kl"]}
    for row in rows_of(results):
        logs = logs_of(results, row)
        if not logs:
            continue
        best = choose_row(logs, retrained)
        told = {
            "forget quality": best.best_forget_quality,
            "utility": best.best_utility,
            "forget quality, other half": best.held_out_forget_quality,
            "utility, other half": best.held_out_utility,
        }
        if "report_kl" in row.told:
            told["KL at the target"] = row.told["report_kl"]
        fit, _, objective = row.method.partition(" ")
        title = f"{row.title}, {objective}" if fit in ESTIMATORS else row.title
        yield title, {**told, "seconds": row.told["piece_seconds"]}


def topic_table(seeds: list[Results]) -> str:
    """Accuracies in percent, and KLs at the target."""
    heads = ("subject", "other subjects", "general", "KL, other retain text")
    return over_seeds(seeds, topic_rows, (*heads, "KL, Alpaca", "seconds"))


def topic_rows(results: Results) -> Iterator[tuple[str, dict[str, float]]]:
    """(method, its figures)."""
    if "base" in results:
        yield "base model", accuracies(results["base"])
    for row in topic_page.rows_of(results):
        if topic_page.is_reported(row):
            kls = {f"KL, {title}": mean(row.told[n]) for n, title in topic_page.TEXTS.items()}
            yield row.title, accuracies(row.told) | kls | {"seconds": row.tuned["piece_seconds"]}


def accuracies(told: Mapping[str, Any]) -> dict[str, float]:
    """In percent."""
    names = {"topic": "subject", "sisters": "other subjects", "general": "general"}
    return {shown: 100 * told[name]["accuracy"] for name, shown in names.items()}


def over_seeds(
    seeds: list[Results],
    rows: Callable[[Results], Iterator[tuple[str, dict[str, float]]]],
    columns: tuple[str, ...],
) -> str:
    """A row for each method: median and range over the seeds that have it."""
    found: dict[str, Cells] = {}
    for results in seeds:
        for method, told in rows(results):
            cells = found.setdefault(method, {})
            for column, value in told.items():
                cells.setdefault(column, []).append(value)
    lines = [
        [method, *(spread(cells.get(column, [])) for column in columns)]
        for method, cells in found.items()
    ]
    return table(" | ".join(("method", *columns)), lines)


def spread(values: list[float]) -> str:
    """Median, and range of several values."""
    if len(values) < 2:
        return number(values[0]) if values else ""
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def draw(seeds: list[Results], folder: Path, split: str) -> None:
    """Figures 1 and 3 of the first seed."""
    results = seeds[0]
    retrained = log_of_retrained(results)
    if retrained is None:
        return
    rows = [row for row in rows_of(results) if logs_of(results, row)]
    qualities = {row.label: figures_of(results, row) for row in rows}
    utility = aggregate(retrained)["model_utility"]
    figures.draw_utility(qualities, utility, folder / f"tofu_{split}_figure1.svg")
    by_estimator = {
        row.method.split()[0]: points_of(results, row)
        for row in rows
        if row.method in {f"{fit} margin" for fit in ESTIMATORS}
    }
    figures.draw_estimators(by_estimator, folder / f"tofu_{split}_figure3.svg")


def points_of(results: Results, row: Row) -> list[tuple[float, float, float]]:
    """(KL on the report slice, forget quality, utility) at each length, by KL."""
    points = []
    for name, (quality, utility) in figures_of(results, row).items():
        kl = results[f"tofu {row.name} x{name.removeprefix('×')}"]["report_kl"]
        if quality is not None:
            points.append((kl, quality, utility))
    return sorted(points)


if __name__ == "__main__":
    main()
