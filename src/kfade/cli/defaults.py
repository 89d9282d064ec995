"""Default values of options from files: a configuration, or the settings of a saved curvature."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any

from cyclopts import App, Token
from cyclopts.argument import ArgumentCollection

from kfade.runs.config import FitConfig, RunConfig, settings_in
from kfade.runs.inputs import MADE_WITH, SavedFit

EXCLUSIVE = (
    {("step", "damping"), ("step", "relative_damping")},
    {("size", "alpha"), ("size", "kl"), ("size", "until")},
)
"""Groups of settings that exclude each other: one on the command line overrides those in a file."""


def fill_options(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Set each option that is not on the command line to its value in a file.

    The file of ``--config`` has the values. The settings of the fit come from the saved
    ``--curvature``; for a sweep without ``--config``, all settings come from the run that fitted
    it. Cyclopts calls this function before it converts values.

    Raises:
        InputError: a file cannot be read, or a sweep's configuration and curvature do not match.
    """
    config, curvature = (_path(arguments, name) for name in ("--config", "--curvature"))
    sweeps = curvature is not None and commands[-1:] == ("sweep",)
    if curvature is not None and sweeps:
        config = config or curvature / "config.yaml"
    found = settings_in(config) if config is not None else {}
    if curvature is not None:
        saved = SavedFit.read(curvature)
        found = {**{("fit", name): getattr(saved.settings, name) for name in MADE_WITH}, **found}
        if sweeps:
            made = {name: found["fit", name] for name in MADE_WITH}
            saved.check(RunConfig(fit=FitConfig(**made)))
    given = {argument.keys for argument in arguments if argument.tokens}
    for argument in arguments:
        keys = argument.keys
        excluded = any(keys in group and group & given for group in EXCLUSIVE)
        if keys in found and keys not in given and not excluded and found[keys] is not None:
            value = found[keys]
            if typing.get_origin(argument.hint) is list and not isinstance(value, list):
                value = [value]
            argument.append(Token(keyword=argument.name, source=str(config), implicit_value=value))


def shown_default(value: Any) -> str | None:
    """The default in the help; None for defaults that are unset, empty or false."""
    if value in (None, False, "", []):
        return None
    return "yes" if value is True else str(value)


def _path(arguments: ArgumentCollection, name: str) -> Path | None:
    values = [token.value for a in arguments if a.name == name for token in a.tokens]
    return Path(values[0]) if values else None
