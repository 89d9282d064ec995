"""Peak memory of fine-tuning, in bytes, predicted before the run: of baselines and of attacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from kfade.models.head import chunk_positions
from kfade.models.targets import memory_of
from kfade.planning.memory import HEAD_COPIES, RUNTIME_BYTES, model_bytes, on_shapes
from kfade.planning.trace import training_pass_bytes

OPTIMIZER_COPIES = 3
"""AdamW's two moments (Sophia has as many), and what it holds while it makes a step."""


def training_bytes(
    model: Any, names: Sequence[str], tensors: Mapping[str, Tensor], shape: tuple[int, int]
) -> int:
    """Peak bytes of training: model, activations, gradients, masters, and the optimiser's state.

    Args:
        model: its tensors may be fake.
        names: parameters of the model that training changes.
        tensors: what the optimiser changes: masters of these parameters, or low-rank factors.
        shape: (B, T) of a batch.

    Raises:
        InputError: the operations of a pass depend on values.
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    with on_shapes(model):
        passing = training_pass_bytes(model, names, shape)
    known = {memory_of(parameter) for parameter in own.values()}
    optimised = sum(tensor.nbytes for tensor in tensors.values())
    masters = sum(tensor.nbytes for tensor in tensors.values() if memory_of(tensor) not in known)
    # A parameter's gradient is added to that of its master; low-rank factors have only their own.
    passed_on = sum(own[name].nbytes for name in tensors if name in own)
    weight_VD = model.get_output_embeddings().weight
    chunk = min(chunk_positions(len(weight_VD), 4, weight_VD.device), shape[0] * shape[1])
    head = HEAD_COPIES["gradient"] * chunk * len(weight_VD) * 4
    held = masters + passed_on + (1 + OPTIMIZER_COPIES) * optimised
    return RUNTIME_BYTES + model_bytes(model) + held + passing + head
