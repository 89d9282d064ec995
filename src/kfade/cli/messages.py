"""Messages about a command line that cannot be read, in the words of the command's help."""

from __future__ import annotations

import re
from difflib import get_close_matches

from cyclopts import CycloptsError, MissingArgumentError, RepeatArgumentError
from cyclopts.argument import Argument
from cyclopts.exceptions import UnusedCliTokensError

from kfade.runs.options import MODEL


def message_of(error: CycloptsError) -> str:
    """One line for the user about ``error``."""
    if isinstance(error, MissingArgumentError) and error.argument is not None:
        return _missing(error, error.argument)
    if isinstance(error, RepeatArgumentError) and error.token.keyword is not None:
        return _repeated(error, error.token.keyword)
    if isinstance(error, UnusedCliTokensError):
        return f"too many arguments: {' '.join(error.unused_tokens or ())}"
    return str(error)


def _missing(error: MissingArgumentError, argument: Argument) -> str:
    """An option or argument that is required but not given, or an option without its value."""
    name, purpose = _shown_name(argument), _purpose(error, argument)
    if error.keyword is not None:
        return f"{error.keyword} needs a value: {purpose}"
    typed = [word.partition("=")[0] for word in error.unused_tokens or () if word.startswith("--")]
    for near in get_close_matches(argument.name, typed, n=1):
        return f"unknown option: {near}. Did you mean {argument.name}?"
    return f"{name} is missing: {purpose}"


def _repeated(error: RepeatArgumentError, keyword: str) -> str:
    """An option that is given twice, or in both of its forms, as --refit and --no-refit."""
    forms = next(
        {*option.names, *option.negatives}
        for option in _options(error)
        if keyword in (*option.names, *option.negatives)
    )
    typed = [word.partition("=")[0] for word in error.root_input_tokens or ()]
    given = [word for word in dict.fromkeys(typed) if word in forms]
    if len(given) > 1:
        return f"{' and '.join(given)} are given: give one of them"
    return f"{keyword} is given more than once: give it once"


def _shown_name(argument: Argument) -> str:
    """``--out`` for an option, ``UPDATE`` for a positional argument."""
    group = argument.parameter.group
    is_positional = isinstance(group, tuple) and MODEL in group
    return argument.name.lstrip("-").upper() if is_positional else argument.name


def _purpose(error: CycloptsError, argument: Argument) -> str:
    """The first sentence of the help, without a capital and a full stop."""
    [text] = [o.parameter.help or "" for o in _options(error) if o.name == argument.name]
    sentence = re.split(r"\.\s", " ".join(text.split()), maxsplit=1)[0].removesuffix(".")
    is_word = sentence[1:2].islower()  # not an acronym, as in KL
    return sentence[:1].lower() + sentence[1:] if is_word else sentence


def _options(error: CycloptsError) -> list[Argument]:
    """The command's options and arguments, with their help."""
    assert error.app is not None
    options = error.app.assemble_argument_collection(parse_docstring=True)
    return [option for option in options if option.parse]
