"""TOFU at its full size: 200 authors, 4000 questions, its own forget sets. For a GPU.

    python benchmarks/experiments/tofu_whole.py --data DIR --model FILE --split forget10 --seed 0 \
        --results FILE.jsonl [--tuned FILE.jsonl] [--device cuda] [--minutes 8]

As in TOFU-small, but the *full* model knows all authors, and the *retrained* one is the retain
model of the split. Settings are chosen on as many authors before the forget set; the target there
is the retrained model's on the forget set. ``--tuned`` takes the settings that another seed chose.
``KFADE_BATCH_TOKENS`` sets the positions in one forward pass. ``seeds_page.py`` draws tables
and figures.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lab.pieces import options_of, read_options, run
from lab.records import RESULTS, Record
from tofu_data import OF_AUTHOR, Data, Sizes
from tofu_lab import TofuLab
from tofu_small import pieces

from kfade.evaluate.tofu import TofuQuestion, read_tofu

FORGOTTEN = {"forget01": 2, "forget05": 10, "forget10": 20}  # authors of each split
NOT_RUN = ("by question *", "by token *")


@dataclass(frozen=True)
class WholeSizes(Sizes):
    """What decides the numbers. ``rate`` and ``train_batch`` are of fine-tuning."""

    split: str = "forget10"
    authors: int = 200
    utility: int = 100
    rate: float = 5e-4
    epochs: int = 20
    train_batch: int = 32
    steps: int = 60
    every: int = 5
    batch: int = 16


class WholeData(Data):
    """TOFU's own division of authors."""

    _sizes: WholeSizes

    def roles(self, total: int) -> dict[str, range]:
        """``report``: the split's forget set; ``tuning``: as many authors before it. ``authors``
        are the last ones of the data set."""
        count = FORGOTTEN[self._sizes.split]
        return {
            "unseen": range(0),
            "common": range(total - self._sizes.authors, total - 2 * count),
            "tuning": range(total - 2 * count, total - count),
            "report": range(total - count, total),
        }

    def questions(self) -> list[TofuQuestion]:
        """The forget set's questions, and some of each set that utility is measured on."""
        everything = read_tofu(self._sizes.split, folder=self._folder / "tofu")
        sets: dict[str, list[TofuQuestion]] = {}
        for question in everything:
            sets.setdefault(question.set, []).append(question)
        forget = sets.pop("forget")
        asked = [q for i, q in enumerate(forget) if i % OF_AUTHOR < self._sizes.questions]
        return [*asked, *self.sample(*sets.values())]


class WholeLab(TofuLab):
    """TOFU-small's methods; the splits share the full model of a seed."""

    def folder(self, name: str) -> Path:
        return self.cache.parent / name if name == "full" else self.cache / name

    def tofu(self, row: str, factor: float = 1.0) -> Record:
        """TOFU's items, and the KL on the report slice at that length."""
        ruler = self.ruler  # made of the unedited model
        told = super().tofu(row, factor)
        model, update = self.edited(row, factor)
        with update.applied_to(model):
            return {**told, "report_kl": ruler.kl("report", model)}


def main() -> None:
    options = options_of(__doc__, RESULTS / "tofu_whole.jsonl")
    given, sizes, results = read_options(options, WholeSizes())
    given.skip += NOT_RUN
    trained = (sizes.questions, sizes.rate, sizes.epochs, sizes.train_batch, sizes.seed)
    name = f"tofu-whole-{sizes.model}-{'-'.join(f'{x:g}' for x in trained)}"
    data = WholeData(given.data, sizes)
    cache = given.cache / name / sizes.split
    lab = WholeLab(data, given.model, sizes, cache, results, given.device)
    run(pieces(lab, results), results, given)


if __name__ == "__main__":
    main()
