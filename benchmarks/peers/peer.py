"""Other libraries' K-FAC and EK-FAC fits, each in its fastest setting that computes the same thing.

The same thing: the true Fisher with one sampled label a position, over every feed-forward weight,
from B sequences of T tokens at a time. A sequence of T tokens has T − 1 positions, each live and
scored on the token after it, so all counts agree (M = N) and

    A = (1/M) Σ a aᵀ,   S = (1/N) Σ g gᵀ   with g of the summed log-likelihood of sampled labels,
    Λ = (1/N) Σ_sequences (Q_Oᵀ ∇W_sequence Q_I)∘².

What each library has instead; ``factors`` and ``eigenvalues`` bring it to these:

- kronfluence: sums Σ a aᵀ and Σ g gᵀ, and the number of positions of each; it divides before its
  eigendecompositions. Its Λ is a sum over sequences, divided by their number later, in its scores:
  N / sequences times ours.
- curvlinops, ``reduction="sum"``: (1/M) Σ a aᵀ; Σ g gᵀ and Λ are not divided, N times ours.
- bergson, ``loss_reduction="sum"``: sums and counts like kronfluence's; Λ divided by sequences.

A job is a method that is timed from outside; its parts name themselves as kfade's stages do, in
``kfade.runtime.stages.stage``. No result is written to a disk.

Shapes: S sequences, B batch, T tokens, N positions, V vocabulary, O outputs, I inputs of a layer.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import kfade
from kfade.curvature.draws import sampled_labels
from kfade.data.sequences import TokenSequence
from kfade.models.load import DTYPES, load_model

Factors = dict[str, tuple[Tensor, Tensor]]
"""Layer name -> (A [I, I], S [O, O])."""


@dataclass(frozen=True)
class Settings:
    """What may change a peer's speed and is not the data."""

    dtype: str = "float32"
    """Of the model's weights and activations. Sums and eigenbases are float32 in all."""
    batch: int = 1
    """Sequences in a forward pass."""
    eigh: str = "float32"
    """Of kronfluence's eigendecompositions, whose default is float64. curvlinops and kfade use the
    dtype of the sums, bergson always float64."""
    iterative: bool = False
    """kronfluence's ``use_iterative_lambda_aggregation``: rotates one sequence at a time."""
    low_precision: bool = False
    """kronfluence's "smart low precision": factors, bases and per-sequence gradients are bfloat16,
    which makes it faster and what it computes another thing."""
    layers: str | None = None
    """Blocks whose feed-forward weights are fitted, as ``3-6``; None: all."""
    device: str = "cpu"
    recompute: bool = False
    """Of kfade's passes: run blocks again backward instead of keeping what they made."""


def sample_labels(p_NV: Tensor) -> Tensor:
    """ŷ ~ p [N] by inverse CDF: in a task that the user writes, so in its fastest form.

    ``torch.multinomial`` draws V exponential variates a position, and on a CPU is about 18 times
    slower than this.
    """
    cumulative_NV = p_NV.cumsum(dim=1)
    threshold_N1 = torch.rand_like(cumulative_NV[:, :1]) * cumulative_NV[:, -1:]
    drawn = torch.searchsorted(cumulative_NV, threshold_N1, right=True).squeeze(1)
    return drawn.clamp(max=p_NV.shape[1] - 1)


def load(folder: Path, settings: Settings) -> Any:
    """The model of a folder. A folder with a configuration alone gives random weights, which are
    the same for each library."""
    if any(folder.glob("*.safetensors")):
        return load_model(str(folder), dtype=settings.dtype, device=settings.device)[0]
    torch.manual_seed(0)
    with torch.device(settings.device):
        config = AutoConfig.from_pretrained(folder)
        made = AutoModelForCausalLM.from_config(config, dtype=DTYPES[settings.dtype])
    return made.eval()


class Peer:
    """One library on one model; a fit is kept in ``result`` until the next."""

    name = ""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.settings = settings
        self.model = load(folder, settings)
        self.targets = kfade.find_targets(self.model, layers=settings.layers)
        self.layers = [target.name.removesuffix(".weight") for target in self.targets]
        self.result: Any = None

    def cannot(self, job: str) -> str | None:
        """Why this library cannot do ``job`` in these settings, or None."""
        return None

    def described(self) -> dict[str, Any]:
        """The settings that the numbers belong to."""
        return asdict(self.settings)

    def covariance(self, tokens_ST: Tensor) -> None:
        """A and S of every layer."""
        raise NotImplementedError

    def kfac(self, tokens_ST: Tensor) -> None:
        """A and S and their eigendecompositions."""
        raise NotImplementedError

    def ekfac(self, tokens_ST: Tensor) -> None:
        """The same, and Λ from a second pass with fresh labels."""
        raise NotImplementedError

    def factors(self) -> Factors:
        """A and S, as defined above, after :meth:`covariance`."""
        raise NotImplementedError

    def eigenvalues(self) -> dict[str, Tensor]:
        """Λ [O, I], as defined above, after :meth:`ekfac`."""
        raise NotImplementedError


def with_unit_trace(factors: Factors) -> Factors:
    """(A / tr A, S tr A): S ⊗ A is the same, and kfade keeps nothing but that product."""
    return {name: (a / a.trace(), s * a.trace()) for name, (a, s) in factors.items()}


class Kfade(Peer):
    """Through the public functions; A and S come with their eigendecompositions (two stages)."""

    name = "kfade"

    def _fit(self, estimator: Any, tokens_ST: Tensor) -> None:
        scored = (False,) + (True,) * (tokens_ST.shape[1] - 1)
        sequences = [TokenSequence(tuple(row), scored) for row in tokens_ST.tolist()]
        budget = self.settings.batch * (tokens_ST.shape[1] - 1)
        batches = kfade.make_batches(sequences, budget=budget, device=self.settings.device)
        recompute = self.settings.recompute
        self.result = estimator.fit(self.model, batches, self.targets, recompute=recompute)

    def kfac(self, tokens_ST: Tensor) -> None:
        self._fit(kfade.KFAC(sampled_labels), tokens_ST)

    covariance = kfac

    def ekfac(self, tokens_ST: Tensor) -> None:
        self._fit(kfade.EKFAC(sampled_labels), tokens_ST)

    def factors(self) -> Factors:
        """With A of unit trace."""
        found = {}
        for name, block in zip(self.layers, self.result.blocks.values(), strict=True):
            grid = block.eigenvalues
            a = block.q_in * (grid.sum(0) / grid.sum()) @ block.q_in.T
            found[name] = (a, block.q_out * grid.sum(1) @ block.q_out.T)
        return found

    def eigenvalues(self) -> dict[str, Tensor]:
        grids = [block.eigenvalues for block in self.result.blocks.values()]
        return dict(zip(self.layers, grids, strict=True))
