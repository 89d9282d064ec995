"""How a field of a settings class appears as an option: its group in the help, kind and limits.

Every option of the command line is one field of a frozen dataclass in this room: its name, type and
default are the option's, its docstring is the help text. Cyclopts reads them. The same classes are
what :mod:`kfade.runs` takes from Python and what a YAML file of settings holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cyclopts import Group, Parameter
from cyclopts.validators import Number

MODEL = Group("Arguments", sort_key=0)
SETS = Group("Forget and retain sets", sort_key=1)
DATA = Group("Data", sort_key=2)
JUDGED = Group("Model under evaluation", sort_key=1)
FIT = Group("Curvature", sort_key=3)
STEP = Group("Step", sort_key=4)
SIZE = Group("Step size (give one)", sort_key=5)
LOSS = Group("Loss", sort_key=3)
TRAINING = Group("Training", sort_key=4)
WEIGHTS = Group("Weights", sort_key=5)
GRID = Group("Grid (several values, separated by commas)", sort_key=3)
JUDGE = Group("Judge", sort_key=3)
LOGS = Group("Saved logs", sort_key=3)
DEVICE = Group("Device", sort_key=6)
RUN = Group("Run", sort_key=7)

FLAG = Parameter(negative=())  # a switch that has no --no- form
HIDDEN = Parameter(parse=False)  # a field that kfade sets itself
REPEATED = Parameter(negative=())  # a list: the option may be given several times


def settings(group: Group | None = None) -> Parameter:
    """Decorate a settings class: its fields become options of the command itself."""
    return Parameter(name="*", group=group)


def argument(name: str) -> Parameter:
    """Let a field be a positional argument, too."""
    return Parameter(name=f"--{name}", group=MODEL)


def at_least(smallest: float) -> Parameter:
    """Limit a number from below."""
    return Parameter(validator=Number(gte=smallest))


def separated(kind: type, by: str = ",") -> Parameter:
    """Read a list of values from one word, as in ``0.01,0.1,1``."""

    def convert(_: Any, tokens: Sequence[Any]) -> list[Any]:
        last = tokens[-1]  # of an option given twice the last one counts
        try:
            return [kind(word.strip()) for word in last.value.split(by) if word.strip()]
        except ValueError:
            what = "whole numbers" if kind is int else "numbers"
            raise ValueError(
                f"{last.keyword} {last.value}: give {what} separated by commas"
            ) from None

    return Parameter(converter=convert, negative=(), n_tokens=1, accepts_keys=False)
