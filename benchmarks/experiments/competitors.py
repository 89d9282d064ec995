"""The baselines' losses as the experiments set them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from equal_forgetting import BUDGET

from kfade.baselines import rmu
from kfade.baselines.methods import Method
from kfade.data.batches import make_batches
from kfade.data.sequences import TokenSequence
from kfade.models.layers import decoder_blocks
from kfade.runs.baseline_words import builder_of
from kfade.runs.session import Loaded

RMU_LENGTH = 3.0  # of the control vector, times the median length of hidden states at its block
RMU_RETAIN_WEIGHT = 100.0


def method_of(
    name: str, model: Any, forget: Sequence[TokenSequence], tokenizer: Any = None, **given: Any
) -> Method:
    """The baseline that ``kfade baseline`` calls so, with the loss options ``given``."""
    loaded = Loaded(model, tokenizer, [])
    if name != "rmu":
        return builder_of(name, given)(loaded, 0)
    layer = len(decoder_blocks(model)[1]) // 3
    block = rmu.find_block(model, layer)
    with torch.no_grad():
        lengths = [
            rmu.live_output(model, block, batch).norm(dim=-1)
            for batch in make_batches(forget, budget=BUDGET)
        ]
    length = RMU_LENGTH * torch.cat(lengths).median().item()
    given = {"layer": layer, "coefficient": length, "retain_weight": RMU_RETAIN_WEIGHT}
    return builder_of(name, given)(loaded, 0)
