"""Fixtures of the tests of baselines."""

from __future__ import annotations

import pytest

import kfade.models.head


@pytest.fixture
def short_chunks(monkeypatch):
    """So few positions at a time go through the head that several parts make up a batch."""
    monkeypatch.setattr(kfade.models.head, "chunk_positions", lambda *_: 4)
