"""Means of KL over texts, and their intervals by resampling the texts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kfade.evaluate.uncertainty import bootstrap

Texts = Sequence[Sequence[float]]
"""(KL per token, tokens) of each text."""


def mean(texts: Texts) -> float:
    """KL per token."""
    return sum(kl * tokens for kl, tokens in texts) / sum(tokens for _, tokens in texts)


def interval(texts: Texts, against: Texts | None = None) -> dict[str, float]:
    """The mean per token, or its ratio to that of ``against`` on the same texts: ``value``,
    ``low``, ``high``."""
    kl, tokens = np.asarray(texts).T
    unit = tokens if against is None else np.asarray(against)[:, 0] * tokens

    def figure(chosen: NDArray[np.int64]) -> list[float]:
        return [(kl * tokens)[chosen].sum() / unit[chosen].sum()]

    [found] = bootstrap(figure, len(texts), seed=0)
    return found
