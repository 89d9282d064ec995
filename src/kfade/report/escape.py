"""Text that others wrote, made harmless wherever the page puts it."""

from __future__ import annotations

import html
import json
import math
from typing import Any


def escape(text: str) -> str:
    """Text for HTML, and for plotly's labels, which are read as a little HTML."""
    return html.escape(text, quote=True)


def script_json(content: Any) -> str:
    """JSON that can stand within a ``<script>``: no ``<``, ``>`` or ``&`` in it as such.

    Numbers that are not finite, which JSON has not, become null.
    """
    text = json.dumps(_finite(content), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for sign in ("<", ">", "&", "\u2028", "\u2029"):
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _finite(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return content
