"""Specificity: how far an edited model's outputs are from the base model's on benign completions.

KL(base ‖ edited) = Σ_v p log(p/q) in nats over the whole vocabulary, at every token of completions
that the base model wrote, each token given those before it. (Paper §4, "Specificity".)

Outputs are kept as final hidden states, a group of batches at a time; each model's own head turns
them into logits. So the two models may be one model with and without an update, two models in
memory, or two models in memory one after the other, with the base model's hidden states on disk.

Shapes: N scored tokens, D hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from kfade.data.batches import Batch
from kfade.evaluate.division import attempt, in_order
from kfade.evaluate.tokens import by_sequence
from kfade.evaluate.uncertainty import RESAMPLES, bootstrap
from kfade.method.measure import Reference, divergence, hidden_reference
from kfade.models.head import Head, read_head
from kfade.models.load import frozen
from kfade.runtime import distributed
from kfade.runtime.files import reading_kept
from kfade.runtime.progress import track
from kfade.runtime.tensors import write_tensors

GROUP_TOKENS = 32768  # 270 MB of hidden states at a width of 4096 in bfloat16
PERCENTILES = (5, 25, 50, 75, 90, 95, 99)
WORST, WORST_TOKENS = 20, 5


@dataclass(frozen=True)
class Outputs:
    """A model's outputs at the scored tokens of a group of batches."""

    head: Head
    reference: Reference

    def save(self, path: Path) -> None:
        """Write the hidden states, without the head."""
        write_tensors(path, self.reference.hidden)

    @classmethod
    def load(cls, path: Path, head: Head, batches: Sequence[Batch]) -> Outputs:
        """Read what :meth:`save` wrote for the same batches."""
        with reading_kept(path):
            saved = load_file(path, str(batches[0].input_BT.device))
        return cls(head, Reference(batches, {str(i): saved[str(i)] for i in range(len(saved))}))


def outputs(model: nn.Module, batches: Sequence[Batch], name: str) -> Outputs:
    """The outputs of ``model`` as it is now; ``name`` is shown as the progress of the pass."""
    with frozen(model):
        head = read_head(model)
    return Outputs(head, hidden_reference(model, batches, name))


def grouped(batches: Sequence[Batch], tokens: int = GROUP_TOKENS) -> list[list[Batch]]:
    """Batches in groups of at most ``tokens`` scored tokens; a group has at least one batch."""
    groups: list[list[Batch]] = []
    held = tokens
    for batch in batches:
        if held + batch.loss_tokens > tokens:
            groups.append([])
            held = 0
        groups[-1].append(batch)
        held += batch.loss_tokens
    return groups


def divergences(
    groups: Sequence[Sequence[Batch]],
    base: Callable[[int], Outputs],
    edited: Callable[[], AbstractContextManager[nn.Module]],
    *,
    done: AbstractSet[int] = frozenset(),
) -> Iterator[tuple[int, Tensor]]:
    """Yield (number, KL of each scored token [n]) of every sequence.

    Args:
        base: returns the base model's outputs on the group of that number. It is called while the
            model is not edited.
        edited: makes the edited model within a ``with``; entered once a group.
        done: sequences to leave out. A group without any other is not computed.

    Raises:
        InputError: outputs that are not finite.
    """

    def positions(numbered: tuple[int, Sequence[Batch]]) -> float:
        return sum(batch.positions for batch in numbered[1])

    for number, batches in track(list(enumerate(groups)), "KL", positions):
        if all(index in done for batch in batches for index in batch.id_B.tolist()):
            continue
        before = base(number)
        with edited() as model:
            after = outputs(model, batches, "edited model")
            # The batches whose hidden states this process has.
            own = distributed.share(
                list(enumerate(batches)), lambda numbered: numbered[1].positions
            )
            references = (before.reference, after.reference)
            hidden = zip(*(one.hidden.values() for one in references), strict=True)
            found = {}
            for (i, batch), (p, q) in zip(own, hidden, strict=True):
                kl_N = _divergence(before.head, p, after.head, q)
                numbers = batch.id_B.tolist()
                found[i] = attempt(list, by_sequence(numbers, batch.loss_counts, kl_N))
        for part in in_order(found):
            yield from ((index, kl) for index, kl in part if index not in done)


def _divergence(base: Head, base_ND: Tensor, edited: Head, edited_ND: Tensor) -> Tensor:
    """KL [N] of two models, each through its own head, a few positions at a time."""
    with torch.no_grad():
        parts = [divergence(base(base_ND[p]), edited(edited_ND[p])) for p in base.chunks(base_ND)]
    return torch.cat(parts)


def summarise_divergence(
    items: Mapping[str, Mapping[str, Any]], *, seed: int = 0, resamples: int = RESAMPLES
) -> dict[str, Any]:
    """Figures over completions, each with ``kl`` (mean of its tokens), ``tokens``, ``token_kl``.

    ``kl_per_token``: mean over tokens, Σ kl·tokens / Σ tokens. ``kl_per_completion``: mean over
    completions. ``quantiles``: of the completions' means. Intervals are bootstrap intervals of 95 %
    over completions, since the tokens of one completion are not independent.
    """
    names = list(items)
    kl = np.array([items[name]["kl"] for name in names])
    tokens = np.array([items[name]["tokens"] for name in names])

    def figures(chosen: NDArray[np.int64]) -> NDArray[np.float64]:
        own, weight = kl[chosen], tokens[chosen]
        per_token = (own * weight).sum() / weight.sum()
        return np.array([per_token, own.mean(), *np.percentile(own, PERCENTILES)])

    per_token, per_completion, *quantiles = bootstrap(
        figures, len(names), seed=seed, resamples=resamples
    )
    return {
        "kl_per_token": per_token,
        "kl_per_completion": per_completion,
        "quantiles": {str(p): q for p, q in zip(PERCENTILES, quantiles, strict=True)},
        "completions": len(names),
        "tokens": int(tokens.sum()),
        "bootstrap": {"seed": seed, "resamples": resamples},
        "worst": [_worst(names[i], items[names[i]]) for i in np.argsort(-kl)[:WORST]],
    }


def _worst(name: str, item: Mapping[str, Any]) -> dict[str, Any]:
    """A completion and the positions of its tokens with the largest KL."""
    order = sorted(range(item["tokens"]), key=lambda t: -item["token_kl"][t])
    places = [{"position": t, "kl": item["token_kl"][t]} for t in order[:WORST_TOKENS]]
    return {"item": int(name), "kl": item["kl"], "tokens": places}


def token_strings(tokenizer: Any, before: int, tokens: Sequence[int]) -> list[str]:
    """Each token's text after the token before it, so that spaces between words are kept."""
    strings = []
    for previous, token in zip([before, *tokens[:-1]], tokens, strict=True):
        start = tokenizer.decode([previous], clean_up_tokenization_spaces=False)
        both = tokenizer.decode([previous, token], clean_up_tokenization_spaces=False)
        alone = tokenizer.decode([token], clean_up_tokenization_spaces=False)
        strings.append(both[len(start) :] if both.startswith(start) else alone)
    return strings


def rounded(values: Tensor) -> list[float]:
    """Values rounded to four significant digits, a third of the size in a log."""
    return [float(f"{value:.4g}") for value in values.tolist()]
