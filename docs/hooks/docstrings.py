"""Roles in docstrings, as :class:`~kfade.method.size.StepSize`, become links of the site."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|attr|mod|data):`(~?)([\w.]+)`")


class Roles(griffe.Extension):
    """Rewrites each docstring when griffe has read it."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(as_code, obj.docstring.value)


def as_code(role: re.Match[str]) -> str:
    """The name as code: the last part alone after ``~``, as Sphinx has it."""
    short, name = role.groups()
    return f"``{name.rpartition('.')[2] if short else name}``"
