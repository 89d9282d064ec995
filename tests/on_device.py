"""Tests on another device than the CPU, and which tests these are.

    KFADE_TEST_DEVICE=cuda python -m pytest -m "not cpu_only" tests/curvature tests/method

Everything that a test makes without naming a device is then made there. Numbers of Python and
random numbers of a generator of the CPU come from the CPU, so data are the same on all devices.
``standin`` is the device of ``stand_in.py``, which needs no hardware.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import stand_in
import torch
from torch.overrides import TorchFunctionMode

DEVICE = os.environ.get("KFADE_TEST_DEVICE", "cpu")
DRAWS = (torch.rand, torch.randn, torch.randint, torch.randperm)


class FromTheCPU(TorchFunctionMode):
    """Numbers of Python, and of a generator of the CPU, on the device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        is_drawn = func in DRAWS and "generator" in kwargs
        if (is_drawn or func is torch.tensor) and kwargs.get("device") is None:
            return func(*args, **{**kwargs, "device": "cpu"}).to(torch.get_default_device())
        return func(*args, **kwargs)


def use_device() -> None:
    """Make ``DEVICE`` the default device of this process, if it is not the CPU."""
    if DEVICE == "cpu":
        return
    if DEVICE == stand_in.NAME:
        device = stand_in.register()
        stand_in.load_onto(device, pytest.MonkeyPatch())
        stand_in.ByWayOfTheCPU().__enter__()
    else:
        device = torch.device(DEVICE)
    torch.set_default_device(device)
    FromTheCPU().__enter__()
