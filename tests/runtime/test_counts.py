"""Counts in messages are in the singular and the plural, and of a fitting magnitude."""

from __future__ import annotations

import pytest

from kfade.runtime.counts import counted, rounded


@pytest.mark.parametrize(
    ("count", "noun", "text"),
    [
        (1, "step", "1 step"),
        (0, "step", "0 steps"),
        (2, "held-out token", "2 held-out tokens"),
        (1, "pass", "1 pass"),
        (3, "pass", "3 passes"),
    ],
)
def test_a_noun_agrees_with_its_count(count, noun, text):
    assert counted(count, noun) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.0 k"),
        (12_345, "12.3 k"),
        (134_515_008, "134.5 M"),
        (7_241_732_096, "7,241.7 M"),
    ],
)
def test_large_counts_are_rounded(count, text):
    assert rounded(count) == text
