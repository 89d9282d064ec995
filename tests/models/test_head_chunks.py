"""The number of positions that go through the head at a time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kfade.models.head import CHUNK_BYTES, LEAST, Head, chunk_positions

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("vocabulary", "size", "device", "positions"),
    [
        (50, 4, CPU, 128),
        (262144, 8, CPU, 128),
        (49152, 4, CUDA, 1365),  # 256 MiB / 196608
        (131072, 4, CUDA, 512),
        (2**20, 4, CUDA, 128),  # 64 would fit
        (49152, 4, torch.device("xpu"), 128),  # a device of another type: as on a CPU
    ],
)
def test_positions_by_hand(vocabulary, size, device, positions):
    assert chunk_positions(vocabulary, size, device) == positions
    if positions > LEAST:  # one more would not fit
        limit = CHUNK_BYTES[device.type]
        assert positions * vocabulary * size <= limit < (positions + 1) * vocabulary * size


@pytest.mark.parametrize(
    ("dtype", "lengths"),
    [
        (torch.float32, [256, 44]),
        (torch.bfloat16, [256, 44]),  # its logits are in float32
        (torch.float64, [128, 128, 44]),
    ],
)
def test_chunks_cover_all_positions_in_order(dtype, lengths, monkeypatch):
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 256 * 49152 * 4)
    head = Head(nn.Linear(1, 49152, bias=False, dtype=dtype))
    position_N = torch.arange(300)
    parts = [position_N[part] for part in head.chunks(position_N[:, None])]
    assert [len(part) for part in parts] == lengths
    assert torch.equal(torch.cat(parts), position_N)


def test_logits_do_not_depend_on_the_chunks(monkeypatch):
    torch.manual_seed(0)
    head, hidden_ND = Head(nn.Linear(8, 17, dtype=torch.float64)), torch.randn(300, 8).double()

    def logits() -> torch.Tensor:
        return torch.cat([head(hidden_ND[part]) for part in head.chunks(hidden_ND)])

    whole = logits()
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 140 * 17 * 8)
    assert [part.stop for part in head.chunks(hidden_ND)] == [140, 280, 300]
    assert (logits() - whole).abs().max() < 1e-14 * whole.abs().max()
