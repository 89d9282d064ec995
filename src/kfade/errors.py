"""The one exception that means: the input is at fault, not the program."""


class InputError(ValueError):
    """What is wrong, where, and what to do about it, in one line.

    Raised before long work begins wherever the fault can be seen beforehand. The command line
    prints the message and exits with 2; in a notebook it reads as an ordinary ``ValueError``.
    """
