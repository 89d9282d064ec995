"""RepSelect: ascent along one direction, without what the forget gradient is mostly made of.

    1. An adapter A, low-rank changes of the trained weights, learns the forget set in one pass:
       A ← A − η ∇CE_f of each step's batches, by plain gradient descent.
    2. G = ∇(−CE_f) of the trained weights with the adapter in place, summed over the steps of a
       second pass. Then the adapter is dropped.
    3. Of G = Σ σ_i u_i v_iᵀ of each weight, the top k components are collapsed on both sides:
       inputs are divided by σ_i/σ_k along v_i, and output gradients by σ_i/σ_k along u_i:
       G' = Σ_{i≤k} (σ_k²/σ_i) u_i v_iᵀ + Σ_{i>k} σ_i u_i v_iᵀ
    4. Each step is W ← W − lr G'. G' stays the same.

The top components are shared with other text, and are what fine-tuning recovers first; the rest
belongs to the forget set (Sondej et al. 2026, arXiv 2606.17168). There is no retain loss. The
steps, their constants and the factors σ_i/σ_k are those of the authors' released code
(RepSelectSimple in github.com/filyp/RepSelect: soft collapse on both sides, by the forget set's own
gradient). Of the paper we could read the abstract only.

Shapes: O outputs and I inputs of a weight, S its smaller side, L its larger side, K components.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.optim import SGD

from kfade.baselines.losses import likelihood
from kfade.baselines.settings import Selection, Settings
from kfade.baselines.training import Training
from kfade.baselines.weights import LowRank
from kfade.curvature.eigh import eigendecompose
from kfade.errors import InputError
from kfade.models.layers import choose_targets, find_targets
from kfade.runtime import distributed
from kfade.runtime.progress import track
from kfade.runtime.stages import stage

RANK = 8  # and α = 8, without dropout: the defaults of peft, which the reference code uses


def select(run: Training, selection: Selection) -> tuple[float, dict[str, Tensor]]:
    """(−CE_f with the adapter, G' of each trained weight), at the weights that the model has now.

    Args:
        run: the training run, within ``trainable.training()``. Its terms define G; they need no
            outputs of the base model.

    Raises:
        InputError: a trained weight is not a linear map or has too few components, the model is
            sharded, or a loss is not finite.
    """
    model, trained, settings = run.net.model, run.trainable, run.settings
    adapter = adapter_of(model, trained.names, settings.seed)
    components = {n: selection.components_of(n, p) for n, p in trained.parameters.items()}
    in_a_step = settings.batch * settings.accumulate
    steps = range(max(1, len(run.sets["forget"]) // in_a_step))  # of one pass
    relearning = replace(
        run,
        terms=[likelihood("forget", 1.0)],
        trainable=adapter,
        settings=_descent(run, selection.adapter_lr, len(steps)),
    )
    with adapter.training():
        for step in track(steps, "adapter"):
            relearning.step(step)
        # The adapter has frozen the model; now the model is differentiated, and not the adapter.
        for tensor in adapter.tensors.values():
            tensor.requires_grad_(False)
        for parameter in trained.parameters.values():
            parameter.requires_grad_(True)
        with stage("train"):
            loss = run.find_gradients(steps) / len(steps)
    found: dict[str, Tensor] = {}
    with stage("train"):
        for name, tensor in track(list(trained.tensors.items()), "components"):
            assert tensor.grad is not None, "each trained weight is in the graph"
            found[name] = collapsed(tensor.grad, components[name], name)
            tensor.grad = None
    return loss, found


def collapsed(gradient_OI: Tensor, components: int, name: str) -> Tensor:
    """G' of G, see above, as G − U diag(1 − λ_k/λ) Uᵀ G with the top eigenvectors of G Gᵀ.

    λ = σ². Both sides have the same σ, so one side's vectors are enough: those of the smaller one.
    Components beyond the rank of G are none: k is at most the rank.
    """
    outputs, inputs = gradient_OI.shape
    g_SL = (gradient_OI if outputs <= inputs else gradient_OI.T).double()
    # In float64: λ spans the square of what σ spans.
    values_S, vectors_SS = eigendecompose(g_SL @ g_SL.T, f"the gradient of {name}")
    smallest = values_S[-1] * len(values_S) * torch.finfo(torch.float64).eps
    kept = min(components, int((values_S > smallest).sum()))
    if kept:
        values_K, u_SK = values_S[-kept:], vectors_SS[:, -kept:]
        g_SL = g_SL - u_SK @ ((1 - values_K[0] / values_K)[:, None] * (u_SK.T @ g_SL))
    return (g_SL if outputs <= inputs else g_SL.T).to(gradient_OI).contiguous()


def trained_weights(model: nn.Module) -> list[str]:
    """Names of the feed-forward maps of all blocks.

    Raises:
        InputError: some of them are experts.
    """
    targets = find_targets(model)
    if any(target.is_routed for target in targets):
        raise InputError("repselect does not change the experts of a mixture: use another method")
    return [target.name for target in targets]


def adapter_of(model: nn.Module, names: Sequence[str], seed: int) -> LowRank:
    """Low-rank changes of the weights ``names``.

    Raises:
        InputError: one of them is not a linear map, or the model is sharded.
    """
    if distributed.is_sharded(model):
        raise InputError("repselect decomposes whole gradients: leave --shard out")
    targets = [t for t in choose_targets(model, attention=True).targets if t.name in names]
    missing = set(names) - {target.name for target in targets}
    if missing:
        raise InputError(f"repselect changes linear maps only: leave {min(missing)} out")
    return LowRank(model, targets, rank=RANK, alpha=float(RANK), dropout=0.0, seed=seed)


def _descent(run: Training, lr: float, steps: int) -> Settings:
    """The settings of the adapter's pass: plain gradient descent on the run's batches."""
    return replace(
        run.settings,
        lr=lr,
        steps=steps,
        warm_up=0,
        decay=False,
        weight_decay=0.0,
        clip=None,
        optimizer=SGD,
    )
