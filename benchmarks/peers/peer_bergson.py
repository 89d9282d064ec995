"""bergson as a peer: see ``peer.py`` for what is computed."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from peer import Factors, Peer, Settings
from torch import Tensor

from kfade.runtime.stages import stage


class Bergson(Peer):
    """bergson's collectors, by the functions of which its ``hessian`` command is made.

    Its own loader starts the graph by asking for the gradient of the embedding, and where that is
    tied, of the head: a product [V, D] that is wasted. Here the embedding's output starts it.
    Its files are kept in memory.
    """

    name = "bergson"

    def __init__(self, folder: Path, settings: Settings) -> None:
        super().__init__(folder, settings)
        from bergson import IndexConfig
        from bergson.config.config import HessianConfig
        from bergson.hessians import eigenvectors, kfac

        self.model.requires_grad_(False)
        self.model.enable_input_require_grads()
        self.model.config.use_cache = False
        self.files: dict[str, dict[str, Tensor]] = {}
        eigenvectors.save_file = kfac.save_file = self._keep  # type: ignore[attr-defined]
        self.folder = tempfile.TemporaryDirectory()
        self.index = IndexConfig(
            run_path=os.path.join(self.folder.name, "run"),
            projection_dim=0,
            loss_reduction="sum",
        )
        self.index.partial_run_path.mkdir(parents=True)
        self.hessian = HessianConfig(method="kfac", ev_correction=True, hessian_dtype="fp32")

    def _keep(self, tensors: dict[str, Tensor], path: str) -> None:
        self.files[Path(path).parent.name] = tensors

    def _collect(self, tokens_ST: Tensor, **options: Any) -> Any:
        from bergson.hessians.hessian_approximations import collect_hessians
        from datasets import Dataset

        data = Dataset.from_dict({"input_ids": tokens_ST.tolist()})
        batch = self.settings.batch
        batches = [list(part) for part in torch.arange(len(data)).split(batch)]
        prefix = f"{self.model.base_model_prefix}."
        return collect_hessians(
            model=self.model,
            data=data,
            index_cfg=self.index,
            hessian_cfg=self.hessian,
            batches=[[int(i) for i in part] for part in batches],
            target_modules={name.removeprefix(prefix) for name in self.layers},
            **options,
        )

    def covariance(self, tokens_ST: Tensor) -> None:
        self.result = None
        self.files.clear()
        with stage("covariance"):
            self.result = self._collect(tokens_ST)
        self.files.clear()

    def kfac(self, tokens_ST: Tensor) -> None:
        from bergson.hessians.eigenvectors import eigendecompose_owned

        self.covariance(tokens_ST)
        found, eigen = self.result, []
        with stage("eigh"):
            for sums, shapes in (
                (found.A_cov_dict, found.A_shapes),
                (found.S_cov_dict, found.S_shapes),
            ):
                vectors, _ = eigendecompose_owned(
                    sums, shapes, None, 1, self.folder.name, found.dtype, found.num_positions
                )
                eigen.append(vectors)
        self.result = tuple(eigen)
        self.files.clear()

    def ekfac(self, tokens_ST: Tensor) -> None:
        self.kfac(tokens_ST)
        with stage("lambda"):
            self._collect(
                tokens_ST,
                ev_correction=True,
                num_documents=len(tokens_ST),
                eigenvectors=self.result,
            )
        self.positions = tokens_ST.shape[1] - 1

    def factors(self) -> Factors:
        found, prefix = self.result, f"{self.model.base_model_prefix}."
        keys = {name: name.removeprefix(prefix) for name in self.layers}
        return {
            name: (
                found.A_cov_dict[key] / found.num_positions[key],
                found.S_cov_dict[key] / found.num_positions[key],
            )
            for name, key in keys.items()
        }

    def eigenvalues(self) -> dict[str, Tensor]:
        grids, prefix = self.files["eigenvalue_correction_sharded"], self.model.base_model_prefix
        return {n: grids[n.removeprefix(f"{prefix}.")] / self.positions for n in self.layers}
