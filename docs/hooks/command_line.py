"""The page of the command line, made from the commands themselves.

The site calls :func:`command_reference` and nothing else of this file.
"""

from __future__ import annotations

HEAD = """# Command line

All commands and their options. This page is made from the commands when the site is built.

Exit codes: 0 done; 2 an error in the input, which one line on stderr explains; 130 interrupted;
1 any other error, or a check that failed. With `--json` a command prints one JSON object on
stdout. All other output goes to stderr.

"""


def command_reference() -> str:
    """The page in Markdown: a section for each command, with its options."""
    from kfade.cli import app

    _, first, rest = app.generate_docs().partition("## kfade ")
    return HEAD + first + rest
