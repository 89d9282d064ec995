"""The sections of the page of the command line, made from the commands themselves.

The site calls :func:`command_reference` and nothing else of this file.
"""

from __future__ import annotations


def command_reference() -> str:
    """A section in Markdown for each command, with its options."""
    from kfade.cli import app

    _, first, rest = app.generate_docs().partition("## kfade ")
    return first + rest
