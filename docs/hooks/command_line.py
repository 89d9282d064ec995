"""The page of the command line: what ``kfade COMMAND --help`` prints, for every command.

The site calls :func:`command_reference` and nothing else of this file.
"""

from __future__ import annotations

import io
import os
import re
import sys
from contextlib import redirect_stdout
from unittest import mock

WIDTH = "92"  # of the help texts, in characters
PLAIN = {"COLUMNS": WIDTH, "TERM": "dumb", "NO_COLOR": "1"}
HEAD = """# Command line

The help texts of all commands. This page is made from the commands when the site is built.

Exit codes: 0 done; 2 an error in the input, which one line on stderr explains; 130 interrupted;
1 any other error, or a check that failed. With `--json` a command prints one JSON object on
stdout. All other output goes to stderr.
"""


def command_reference() -> str:
    """The page in Markdown: a section for each command, with its help text."""
    names = [name for group in ([], ["eval"]) for name in commands(group)]
    sections = [f"\n## {' '.join(name)}\n\n```text\n{help_text(name)}\n```\n" for name in names]
    return HEAD + "".join(sections)


def commands(group: list[str]) -> list[list[str]]:
    """The commands that the help text of a group lists, without groups among them."""
    _, _, listed = help_text(group).partition("Commands\n")
    names = re.findall(r"^ ?([a-z][a-z-]+)  ", listed, flags=re.MULTILINE)
    if not names:
        raise ValueError(f"kfade {' '.join(group)} --help lists no commands")
    return [[*group, name] for name in names if name != "eval"]


def help_text(words: list[str]) -> str:
    """What ``kfade WORDS --help`` prints, without frames around its parts."""
    from kfade.cli import main

    printed = io.StringIO()
    named = mock.patch.object(sys, "argv", ["kfade"])
    with named, mock.patch.dict(os.environ, PLAIN), redirect_stdout(printed):
        main([*words, "--help"])
    lines = [line.strip() for line in printed.getvalue().splitlines()]
    lines = [re.sub(r"^╭─ (.*?) ─*╮$", r"\1", line) for line in lines]
    lines = [re.sub(r"^│(.*)│$", r"\1", line).rstrip() for line in lines]
    return "\n".join(line for line in lines if not line.startswith("╰")).strip()
