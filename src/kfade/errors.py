"""The one exception that means: the input is at fault, not the program; and the words of others."""


class InputError(ValueError):
    """What is wrong, where, and what to do about it, in one line.

    Raised before long work begins wherever the fault can be seen beforehand. The command line
    prints the message and exits with 2; in a notebook it reads as an ordinary ``ValueError``.
    """


def first_line(error: Exception) -> str:
    """The first line of what an error says, or its kind."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next(filter(None, lines), type(error).__name__)
