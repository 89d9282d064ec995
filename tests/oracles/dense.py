"""The exact Gauss-Newton matrix of a tiny model.

Shapes: N loss tokens, V vocabulary, P targeted parameters in all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kfade.curvature.vectors import Vector
from kfade.data.batches import Batch
from kfade.models.load import frozen
from kfade.models.targets import Target
from kfade.models.weights import Weights, parameter_names


def flatten(matrices: Mapping[str, Tensor], targets: Sequence[Target]) -> Tensor:
    """One vector [P]: the targets' matrices in order, each row by row."""
    return torch.cat([matrices[target.name].reshape(-1) for target in targets])


def unflatten(vector_P: Tensor, targets: Sequence[Target]) -> Vector:
    """Inverse of :func:`flatten`."""
    sizes = [target.shape[0] * target.shape[1] for target in targets]
    parts = vector_P.split(sizes)
    return {t.name: part.view(t.shape) for t, part in zip(targets, parts, strict=True)}


def _whole(changed: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same changes of whole parameters, where some are of ``name[e]``."""
    found: dict[str, Tensor] = {}
    for name, tensor in changed.items():
        base, _, number = name.removesuffix("]").partition("[")
        if number:
            parts = list(found.get(base, weights[base].detach()).unbind(0))
            parts[int(number)] = tensor
            tensor = torch.stack(parts)
        found[base] = tensor
    return found


def gauss_newton_matrix(
    model: nn.Module, batches: Sequence[Batch], targets: Sequence[Target]
) -> Tensor:
    """G = (1/N) Σ_t J_tᵀ (diag p_t − p_t p_tᵀ) J_t, [P, P], J_t the Jacobian of token t's logits.

    Computed by reverse-mode Jacobians of the model's own logits; shares no code with the fits.
    """
    weights = Weights(model)
    parameters = {name: weights[name].detach() for name in parameter_names(targets)}
    start = {}
    for target in targets:
        start[target.name] = target.from_parameters(parameters)
    theta_P = flatten(start, targets)
    total_PP = torch.zeros(len(theta_P), len(theta_P), dtype=theta_P.dtype, device=theta_P.device)

    def logits_NV(vector_P: Tensor, batch: Batch) -> Tensor:
        changed = {}
        for target in targets:
            changed.update(target.to_parameters(unflatten(vector_P, targets)[target.name]))
        changed = _whole(changed, weights)
        arguments = {"input_ids": batch.input_BT, "use_cache": False}
        output = torch.func.functional_call(model, changed, (), arguments)
        logits_BTV: Tensor = output.logits
        return logits_BTV[batch.loss_BT]

    with frozen(model):
        for batch in batches:
            jacobian_NVP = torch.autograd.functional.jacobian(
                lambda v, batch=batch: logits_NV(v, batch), theta_P
            )
            p_NV = logits_NV(theta_P, batch).softmax(dim=-1)
            mean_NP = torch.einsum("nv,nvp->np", p_NV, jacobian_NVP)
            weighted = p_NV[..., None] * jacobian_NVP
            total_PP += torch.einsum("nvp,nvq->pq", weighted, jacobian_NVP) - mean_NP.T @ mean_NP
    return total_PP / sum(batch.loss_tokens for batch in batches)
