"""Draw all pages and figures anew from the committed results. Nothing is run.

    python benchmarks/experiments/results.py [--results DIR] [--docs DIR]

Writes ``docs/results.md``, the tables in ``docs/numerics.md``, and their figures in
``docs/images``. What was not measured is shown as *not run*.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import prediction
import skill_page
import tofu_page
import topic_page
import verbatim_page
from lab.records import DOCS, NOT_RUN, RESULTS, read
from topic_data import SUBJECTS

TEMPLATE = Path(__file__).parent / "results_template.md"


class NotRun(dict):
    """Records by name. A record that is missing, and every value in it, reads *not run*."""

    def __missing__(self, name: str) -> NotRun:
        return NotRun()

    def __format__(self, spec: str) -> str:
        return NOT_RUN


def write_results(results: Path, docs: Path) -> None:
    """``results.md`` and its figures."""
    names = ("tofu_small", "tofu_small_anew", "verbatim_small", "skill_small")
    tofu, anew, verbatim, skill = (read(results / f"{name}.jsonl") for name in names)
    told = {subject: read(results / f"topic_small_{subject}.jsonl") for subject in SUBJECTS}
    topic = {subject: own for subject, own in told.items() if own}
    text = TEMPLATE.read_text(encoding="utf-8").format(
        tofu=NotRun(tofu),
        anew=NotRun(anew),
        verbatim=NotRun(verbatim),
        skill=NotRun(skill),
        topic=NotRun(next(iter(topic.values()), {})),
        **tofu_page.slots(tofu, results),
        **topic_page.slots(topic),
        **verbatim_page.slots(verbatim),
        **skill_page.slots(skill),
    )
    (docs / "results.md").write_text(text, encoding="utf-8")
    tofu_page.draw(tofu, docs / "images")
    topic_page.draw(topic, docs / "images")


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    options.add_argument("--docs", type=Path, default=DOCS, help="folder of the pages")
    given = options.parse_args()
    write_results(given.results, given.docs)
    prediction.write_report(given.results, given.docs)


if __name__ == "__main__":
    main()
