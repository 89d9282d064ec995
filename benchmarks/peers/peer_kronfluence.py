"""kronfluence as a peer: see ``peer.py`` for what is computed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peer
import torch
from peer import Factors, Peer, Settings
from torch import Tensor, nn

from kfade.runtime.stages import stage


class Kronfluence(Peer):
    """kronfluence's own passes over a loader, in memory: its ``Analyzer`` adds files to them.

    The task's loss is the user's to write. Here one log-softmax serves both loss and labels.
    """

    name = "kronfluence"

    def __init__(self, folder: Path, settings: Settings) -> None:
        super().__init__(folder, settings)
        from kronfluence.analyzer import prepare_model
        from kronfluence.arguments import FactorArguments
        from kronfluence.utils.state import State

        low = torch.bfloat16 if settings.low_precision else torch.float32
        self.arguments = FactorArguments(
            activation_covariance_dtype=low,
            gradient_covariance_dtype=low,
            per_sample_gradient_dtype=low,
            eigendecomposition_dtype=getattr(torch, settings.eigh),
            use_iterative_lambda_aggregation=settings.iterative,
            covariance_max_examples=None,
            lambda_max_examples=None,
        )
        self.task = _task(self.layers)
        self.model = prepare_model(self.model, self.task)
        self.state = State(cpu=settings.device == "cpu")

    def described(self) -> dict[str, Any]:
        return {**super().described(), **self.arguments.to_str_dict()}

    def _common(self, tokens_ST: Tensor) -> dict[str, Any]:
        return {
            "model": self.model,
            "state": self.state,
            "task": self.task,
            "loader": tokens_ST.split(self.settings.batch),
            "factor_args": self.arguments,
            "disable_tqdm": True,
        }

    def covariance(self, tokens_ST: Tensor) -> None:
        from kronfluence.factor.covariance import fit_covariance_matrices_with_loader

        self.result = None
        with stage("covariance"):
            _, self.result = fit_covariance_matrices_with_loader(**self._common(tokens_ST))

    def kfac(self, tokens_ST: Tensor) -> None:
        from kronfluence.factor.eigen import perform_eigendecomposition

        self.covariance(tokens_ST)
        with stage("eigh"):
            self.result = perform_eigendecomposition(
                self.result, self.model, self.state, self.arguments, disable_tqdm=True
            )

    def ekfac(self, tokens_ST: Tensor) -> None:
        from kronfluence.factor.eigen import fit_lambda_matrices_with_loader

        self.kfac(tokens_ST)
        with stage("lambda"):
            _, grids = fit_lambda_matrices_with_loader(
                **self._common(tokens_ST), eigen_factors=self.result
            )
        self.result = {**self.result, **grids}
        self.positions = tokens_ST[:, 1:].numel()

    def factors(self) -> Factors:
        sums = self.result
        return {
            name: (
                sums["activation_covariance"][name]
                / sums["num_activation_covariance_processed"][name],
                sums["gradient_covariance"][name] / sums["num_gradient_covariance_processed"][name],
            )
            for name in self.layers
        }

    def eigenvalues(self) -> dict[str, Tensor]:
        return {name: grid / self.positions for name, grid in self.result["lambda_matrix"].items()}


def _task(layers: Sequence[str]) -> Any:
    """kronfluence's description of a language model with labels drawn from itself."""
    from kronfluence.task import Task

    class SampledLabels(Task):
        def compute_train_loss(
            self, batch: Tensor, model: nn.Module, sample: bool = False
        ) -> Tensor:
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits.flatten(0, 1).float()
            log_p_NV = logits.log_softmax(dim=1)
            with torch.no_grad():
                labels_N = peer.sample_labels(log_p_NV.exp())
            return nn.functional.nll_loss(log_p_NV, labels_N, reduction="sum")

        def compute_measurement(self, batch: Tensor, model: nn.Module) -> Tensor:
            raise NotImplementedError  # of influence scores, which nobody asks for here

        def get_influence_tracked_modules(self) -> list[str]:
            return list(layers)

    return SampledLabels()
