"""Memorisation of texts, and membership inference: was a model trained on a text?

With y the n scored tokens of a text, ŷ_t the argmax at t given y before it, and l_t = log p(y_t):

    exact memorisation     mean_t [ŷ_t = y_t]
    extraction strength    1 − k/n, k the fewest tokens after which every ŷ_t = y_t
    loss                   −mean_t l_t in nats; perplexity = e^loss over all tokens of a set

Membership inference: each score is larger for texts that look like training data. Its AUC is
P(member's > non-member's) + ½ P(equal): 0.5 for a score without information, 1 for a perfect one.

    loss                   mean_t l_t
    zlib                   mean_t l_t / bytes of the text compressed by zlib
    min_k                  mean of the k·n smallest l_t
    min_k_plus_plus        the same of (l_t − μ_t)/σ_t, μ and σ the mean and standard deviation of
                           log p(v), v ~ p, at t

(Carlini et al. 2021 for zlib, Shi et al. 2024 for Min-K %, Zhang et al. 2025 for Min-K %++.)
"""

from __future__ import annotations

import math
import statistics
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kfade.evaluate.uncertainty import standard_error

MIN_K = 0.2
MEMORISED = ("exact_memorisation", "extraction_strength")
SCORES = ("loss", "zlib", "min_k", "min_k_plus_plus")


def token_statistics(logits_NV: Tensor, target_N: Tensor) -> Tensor:
    """[N, 3]: l, whether the argmax is the target, (l − μ)/σ; a ``Measure`` for token_values."""
    log_p_NV = logits_NV.log_softmax(dim=-1)
    p_NV = log_p_NV.exp()
    mean_N1 = (p_NV * log_p_NV).sum(dim=-1, keepdim=True)
    # Not E[l²] − μ²: that cancels where p is nearly uniform.
    variance_N1 = (p_NV * (log_p_NV - mean_N1).square()).sum(dim=-1, keepdim=True)
    own_N1 = log_p_NV.gather(1, target_N[:, None])
    right_N1 = (logits_NV.argmax(dim=-1) == target_N)[:, None].to(own_N1.dtype)
    smallest = torch.finfo(variance_N1.dtype).tiny
    standard_N1 = (own_N1 - mean_N1) / variance_N1.clamp_min(smallest).sqrt()
    return torch.cat([own_N1, right_N1, standard_N1], dim=1)


def memorised(values: Tensor) -> dict[str, Any]:
    """``tokens``, ``loss`` and the figures of ``MEMORISED`` of one text, from its
    :func:`token_statistics` [n, 3]."""
    log_p, right, _ = values.unbind(dim=1)
    return {
        "tokens": len(log_p),
        "loss": -log_p.mean().item(),
        "exact_memorisation": right.mean().item(),
        "extraction_strength": extraction_strength([bool(r) for r in right.tolist()]),
    }


def text_statistics(values: Tensor, text: str, min_k: float = MIN_K) -> dict[str, Any]:
    """Figures of one text from its :func:`token_statistics` [n, 3]; ``text``: its scored part."""
    log_p, _, standard = values.unbind(dim=1)
    figures = memorised(values)
    mean = -figures["loss"]
    return {
        **figures,
        "scores": {
            "loss": mean,
            "zlib": mean / len(zlib.compress(text.encode())),
            "min_k": _mean_of_smallest(log_p, min_k),
            "min_k_plus_plus": _mean_of_smallest(standard, min_k),
        },
    }


def extraction_strength(right: Sequence[bool]) -> float:
    """1 − k/n, k the fewest given tokens after which the model predicts all others; 0 if none."""
    k = next((t + 1 for t in range(len(right) - 1, -1, -1) if not right[t]), 0)
    return 1 - k / len(right)


def area_under_curve(members: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """AUC and its standard error (Hanley and McNeil 1982)."""
    ranked = np.sort(np.asarray(others))
    below = np.searchsorted(ranked, members, side="left")
    up_to = np.searchsorted(ranked, members, side="right")
    m, n = len(members), len(others)
    area = float((below + up_to).mean() / (2 * n))
    one, two = area / (2 - area), 2 * area**2 / (1 + area)
    variance = area * (1 - area) + (m - 1) * (one - area**2) + (n - 1) * (two - area**2)
    return {"value": area, "standard_error": math.sqrt(max(variance, 0.0) / (m * n))}


def summarise_memorisation(
    members: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Figures of both sets, and the AUC of each score where there are non-members."""
    result: dict[str, Any] = {"members": _summarise_set(members)}
    if others:
        result["non_members"] = _summarise_set(others)
        result["auc"] = {}
        for score in SCORES:
            own, theirs = ([i["scores"][score] for i in items] for items in (members, others))
            result["auc"][score] = area_under_curve(own, theirs)
    return result


def _summarise_set(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    tokens = sum(item["tokens"] for item in items)
    total = sum(item["loss"] * item["tokens"] for item in items)
    return {
        "texts": len(items),
        "tokens": tokens,
        "perplexity": math.exp(min(total / tokens, 700.0)),  # e^700: the largest that is finite
        **{key: _mean([item[key] for item in items]) for key in MEMORISED},
    }


def _mean(values: Sequence[float]) -> dict[str, float]:
    """Mean over texts; with its standard error where there are several."""
    error = standard_error(values)
    figure = {"value": statistics.fmean(values)}
    return figure if error is None else {**figure, "standard_error": error}


def _mean_of_smallest(values: Tensor, share: float) -> float:
    count = max(1, int(share * len(values)))
    return values.topk(count, largest=False).values.mean().item()
