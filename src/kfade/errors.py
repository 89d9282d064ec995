"""``InputError``, the exception for faulty input, and the first line of any error's message."""


class InputError(ValueError):
    """The user's input is wrong. The message is one line: what is wrong, where, and what to do.

    It is raised before any long work if the fault can be detected by then. The command line prints
    the message and exits with code 2. In Python it is an ordinary ``ValueError``.
    """


def first_line(error: Exception) -> str:
    """The first line of an error's message that is not empty, or the name of the error's class."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next(filter(None, lines), type(error).__name__)
