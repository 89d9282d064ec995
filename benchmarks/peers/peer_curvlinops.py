"""curvlinops as a peer: see ``peer.py`` for what is computed."""

from __future__ import annotations

from pathlib import Path

from peer import Factors, Peer, Settings
from torch import Tensor, nn

from kfade.runtime.stages import stage


class Curvlinops(Peer):
    """curvlinops' (EK-FAC) operator, on logits [B·T, V] with a label for each row.

    Its EK-FAC refuses several loss tokens a datum, [B, V, T]; it cannot see them in two dimensions,
    and what it then computes for a sequence is Λ as above.
    """

    name = "curvlinops"

    def __init__(self, folder: Path, settings: Settings) -> None:
        super().__init__(folder, settings)
        self.model.requires_grad_(False)
        for target in self.targets:
            target.weight.requires_grad_(True)  # it asks autograd for the weights' gradients
        self.network = _Logits(self.model)

    def cannot(self, job: str) -> str | None:
        if self.settings.dtype == "float32":
            return None
        return (
            "its factors have the dtype of the activations: bfloat16 sums, not float32 ones "
            "(kfac.py, _accumulate_gradient_covariance), of which eigh has no version"
        )

    def covariance(self, tokens_ST: Tensor) -> None:
        from curvlinops import EKFACLinearOperator, FisherType

        self.result = None
        parts = tokens_ST.split(self.settings.batch)
        parts = (part.to(self.settings.device) for part in parts)
        data = [(part[:, :-1], part[:, 1:].flatten()) for part in parts]
        self.positions = tokens_ST[:, 1:].numel()
        with stage("covariance"):
            self.result = EKFACLinearOperator(
                self.network,
                nn.CrossEntropyLoss(reduction="sum"),
                [target.weight for target in self.targets],
                data,
                check_deterministic=False,
                fisher_type=FisherType.MC,
                num_data=len(tokens_ST),
                num_per_example_loss_terms=tokens_ST.shape[1] - 1,
            )
            self.result.compute_kronecker_factors()

    def kfac(self, tokens_ST: Tensor) -> None:
        self.covariance(tokens_ST)
        with stage("eigh"):
            self.result._compute_eigenvectors()

    def ekfac(self, tokens_ST: Tensor) -> None:
        self.kfac(tokens_ST)
        self.result._seed += 1  # a fresh draw: it would repeat the first one
        with stage("lambda"):
            self.result.compute_eigenvalue_correction()

    def factors(self) -> Factors:
        a, s = self.result._input_covariances, self.result._gradient_covariances
        keys = {name: f"model.{name}" for name in self.layers}
        return {name: (a[key], s[key] / self.positions) for name, key in keys.items()}

    def eigenvalues(self) -> dict[str, Tensor]:
        grids = self.result._corrected_eigenvalues
        places = enumerate(self.layers)
        return {name: grids[f"model.{name}"][i] / self.positions for i, name in places}


class _Logits(nn.Module):
    """Logits [B·T, V] of tokens [B, T]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_BT: Tensor) -> Tensor:
        return self.model(input_ids=input_BT, use_cache=False).logits.flatten(0, 1)
