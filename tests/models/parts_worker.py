"""Processes that each load their part of some models, for test_parts.py."""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

import kfade
from kfade.models.head import body_of
from kfade.models.layers import decoder_blocks
from kfade.models.weights import digest_weights
from kfade.runtime import distributed


def main(folder: Path, models: dict[str, str]) -> None:
    found = {}
    with distributed.processes():
        for name, path in models.items():
            empty = []

            def divide(model: nn.Module, empty: list[bool] = empty) -> None:
                empty.append(all(parameter.is_meta for parameter in model.parameters()))
                distributed.shard(body_of(model), decoder_blocks(model)[1])

            model, _ = kfade.load_model(path, device="cpu", needs_tokenizer=False, divide=divide)
            own = {n: distributed.own_part(p) for n, p in model.named_parameters()}
            found[name] = {
                "empty": empty,
                "bytes": {n: part.numel() * part.element_size() for n, part in own.items()},
                "kind": type(model).__name__,
                "digest": digest_weights(model),
            }
        (folder / f"{distributed.rank()}.json").write_text(json.dumps(found))
