"""Annotations for fields of settings classes: the option's group in the help, its kind and limits.

Each option of the command line is a field of a frozen dataclass in this folder. The field gives the
option's name, type and default, and its docstring is the help text. Cyclopts reads them. The
functions of :mod:`kfade.runs` and YAML files use the same classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cyclopts import Group, Parameter
from cyclopts.validators import Number

MODEL = Group("Arguments", sort_key=0)
SETS = Group("Forget and retain sets", sort_key=1)
DATA = Group("Data", sort_key=2)
EVALUATED = Group("Model under evaluation", sort_key=1)
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
    """Decorator of a settings class: its fields become options, in ``group`` of the help."""
    return Parameter(name="*", group=group)


def argument(name: str) -> Parameter:
    """A field that is also a positional argument."""
    return Parameter(name=f"--{name}", group=MODEL)


def at_least(smallest: float) -> Parameter:
    """A number with a lower limit."""
    return Parameter(validator=Number(gte=smallest))


def separated(kind: type, by: str = ",") -> Parameter:
    """A list of values in one argument, as in ``0.01,0.1,1``."""

    def convert(_: Any, tokens: Sequence[Any]) -> list[Any]:
        (token,) = tokens
        try:
            return [kind(word.strip()) for word in token.value.split(by) if word.strip()]
        except ValueError:
            what = "whole numbers" if kind is int else "numbers"
            raise ValueError(
                f"{token.keyword} {token.value}: give {what} separated by commas"
            ) from None

    return Parameter(
        converter=convert, negative=(), n_tokens=1, accepts_keys=False, allow_repeating=False
    )
