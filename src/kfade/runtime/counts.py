"""Counts in messages: ``1 step``, ``8 texts``, ``12.3 k``."""

from __future__ import annotations


def counted(count: int, noun: str) -> str:
    """The count with its noun, in the plural unless it is one: ``2 held-out tokens``."""
    ending = "es" if noun.endswith("s") else "s"
    return f"{count} {noun}" if count == 1 else f"{count} {noun}{ending}"


def rounded(count: int) -> str:
    """A large count in thousands or millions with one decimal: ``134.5 M``; a small one exactly."""
    if count >= 1e6:
        return f"{count / 1e6:,.1f} M"
    return f"{count / 1e3:.1f} k" if count >= 1e3 else str(count)
