"""Safetensors files that are written one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kfade.runtime.files import write_file

_FORMAT_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file, whole or not at all; see :func:`write_file`.

    Tensors are read from the mapping one at a time, so it may be larger than memory. safetensors'
    own writer needs all of them. Its format: the length of the header, the header (JSON, padded by
    spaces), the bytes of the tensors.
    """

    def write(aside: Path) -> None:
        header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
        room = len(json.dumps(header)) + sum(len(json.dumps(name)) + 256 for name in tensors)
        room += -room % 8
        with aside.open("wb") as file:
            file.seek(8 + room)
            start = 0
            for name in tensors:
                tensor = tensors[name]
                data = tensor_bytes(tensor)
                file.write(data)
                header[name] = {
                    "dtype": _FORMAT_NAMES[tensor.dtype],
                    "shape": list(tensor.shape),
                    "data_offsets": [start, start + data.nbytes],
                }
                start += data.nbytes
            text = json.dumps(header).encode()
            assert len(text) <= room
            file.seek(0)
            file.write(room.to_bytes(8, "little") + text.ljust(room))

    write_file(path, write)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor; not a copy if it is on the CPU and contiguous."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
