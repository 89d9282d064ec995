"""Measure a model in training against the model that it was.

As :class:`kfade.method.gauge.Gauge` does, but here the vocabulary head may be trained too, as it is
where it is tied to trained embeddings. So the base model has a head of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kfade.baselines.losses import Net
from kfade.data.batches import Batch
from kfade.method.measure import TokenLosses, divergence, hidden_reference, mean_objectives
from kfade.method.objectives import cross_entropy
from kfade.runtime import distributed


class DriftGauge:
    """Measures drift from the base model: make it while the model is the base model."""

    def __init__(self, net: Net, forget: Sequence[Batch], held_out: Sequence[Batch]) -> None:
        self._net, self._forget = net, forget
        self._base = hidden_reference(net.model, held_out, "base reference")

    def measure(self) -> dict[str, float]:
        """Measure the model as it is now by forward passes, in nats per scored token.

        ``forget_loss``: cross-entropy on the forget set. ``forget_probability``: mean over its
        sequences of exp(−loss per token). ``retain_loss``, ``retain_kl``: cross-entropy and
        KL(base ‖ model) on held-out retain data.
        """
        head, base_head = self._net.head, self._net.base_head
        losses = TokenLosses()
        (forget_loss,) = mean_objectives(self._net.model, self._forget, [losses], head)
        probability = losses.mean_probability(self._forget)
        now = hidden_reference(self._net.model, self._base.batches, "held-out KL")
        loss: Tensor | float = 0.0  # on the device; reading it would wait for all work there
        kl: Tensor | float = 0.0
        own = distributed.share(now.batches, lambda batch: batch.positions)
        with torch.no_grad():
            hidden = (one.hidden.values() for one in (self._base, now))
            for batch, base_ND, hidden_ND in zip(own, *hidden, strict=True):
                target_N = batch.at_loss(batch.target_BT)
                for part in head.chunks(hidden_ND):
                    logits_NV = head(hidden_ND[part])
                    loss += cross_entropy(logits_NV, target_N[part]).double().sum()
                    kl_N = divergence(base_head(base_ND[part]), logits_NV)
                    kl += kl_N.double().sum()
        retain_loss, retain_kl = distributed.all_reduce_numbers([float(loss), float(kl)])
        return {
            "forget_loss": forget_loss,
            "forget_probability": probability,
            "retain_loss": retain_loss / now.loss_tokens,
            "retain_kl": retain_kl / now.loss_tokens,
        }
