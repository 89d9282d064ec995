"""Peak memory of fine-tuning, in bytes, predicted before the run: of baselines and of attacks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kfade.models.masters import master_dtype
from kfade.planning.memory import RUNTIME_BYTES, head_bytes, model_bytes, on_shapes
from kfade.planning.trace import training_pass_bytes

OPTIMIZER_COPIES = 3
"""AdamW's two moments (Sophia has as many), and what it holds while it makes a step."""


def training_bytes(
    model: Any,
    names: Sequence[str],
    shape: tuple[int, int],
    *,
    factors: int | None = None,
    shards: int = 1,
) -> int:
    """Peak bytes of training: model, activations, gradients, masters, and the optimiser's state.

    Args:
        model: its tensors may be fake; not sharded.
        names: parameters of the model that training changes.
        shape: (B, T) of a batch.
        factors: bytes of the low-rank factors that are trained; None: the parameters themselves.
        shards: number of processes over which the weights of the blocks will be sharded.

    Raises:
        InputError: the operations of a pass depend on values.
    """
    with on_shapes(model):
        passing = training_pass_bytes(model, names, shape)
    if factors is None:
        held = _dense_bytes(model, names, shards)
    else:
        held = factors * (2 + OPTIMIZER_COPIES)  # they, their gradients and the optimiser's state
    weight_VD = model.get_output_embeddings().weight
    head = head_bytes("gradient", shape[0] * shape[1], len(weight_VD), 4, weight_VD.device)
    return RUNTIME_BYTES + model_bytes(model, shards) + held + passing + head


def _dense_bytes(model: Any, names: Sequence[str], shards: int) -> int:
    """Bytes of masters, of both gradients (a parameter's is added to its master's) and of the
    optimiser's state. A whole parameter in float32 or better is its own master."""
    own = dict(model.named_parameters(remove_duplicate=False))
    total = 0
    for name in names:
        parameter = own[name]
        master = master_dtype(parameter).itemsize
        apart = shards > 1 or master != parameter.element_size()
        each = parameter.element_size() + master * (1 + apart + OPTIMIZER_COPIES)
        total += parameter.numel() * each // shards
    return total
