"""Batches of a run: of all sequences of a set, or of some that are drawn."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from kfade.data.batches import Batch, draw_without_replacement, make_batches
from kfade.data.noise import noisy
from kfade.data.sequences import TokenSequence
from kfade.models.lengths import length_class
from kfade.models.targets import Target


class Sampler:
    """Makes batches for the passes of one model.

    Args:
        batch_tokens: positions in one forward pass.
        seed: keys the draws.
    """

    def __init__(
        self, model: nn.Module, targets: Sequence[Target], *, batch_tokens: int, seed: int
    ) -> None:
        self._device, self._group = targets[0].device, length_class(model)
        self._budget, self._seed = batch_tokens, seed

    def all(self, sequences: Sequence[TokenSequence], prompts: bool = False) -> list[Batch]:
        """Batches of all sequences."""
        return make_batches(
            sequences,
            budget=self._budget,
            device=self._device,
            group=self._group,
            prompts=prompts,
        )

    def draw(
        self,
        sequences: Sequence[TokenSequence],
        count: int | None,
        step: int = 0,
        noise: float = 0.0,
        prompts: bool = False,
    ) -> list[Batch]:
        """Batches of ``count`` sequences (all when None) drawn for a step, counted from 0.

        Draws of consecutive steps are without replacement, see
        :func:`~kfade.data.batches.draw_without_replacement`.

        Args:
            noise: share of tokens that are replaced in copies of the sequences, which are added
                (:func:`~kfade.data.noise.noisy`); 0 for none. They are the same at every step:
                copies that no step has seen would take the place of the sequences in a late one.
            prompts: see :func:`~kfade.data.batches.make_batches`.
        """
        chosen = draw_without_replacement(len(sequences), count, step, self._seed)
        drawn = [sequences[i] for i in chosen]
        if noise:
            drawn += noisy(sequences, chosen, noise, self._seed)
        return self.all(drawn, prompts)
