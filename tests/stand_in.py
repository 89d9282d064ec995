"""A stand-in for an accelerator, and a pytest plugin that makes it the default device.

Its tensors have real numbers, which lie on the CPU, and claim another device. As on a GPU, an
operation on tensors of two devices fails, but for copies and CPU tensors without dimensions.

    python -m pytest -p stand_in tests/cli/test_cli.py

PyTorch wants to know its devices before the first backward pass of a process.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration

NAME = "standin"
CPU = torch.device("cpu")
COPIES = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)
# Zeros without memory: forward differentiation makes them, wrappers do not know them.
INSTEAD = {torch.ops.aten._efficientzerotensor.default: torch.ops.aten.zeros.default}
Generator = torch.Generator
# Absent in older versions of PyTorch.
AVAILABLE = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")


class StandIn(torch.Tensor):
    """A tensor of the device; ``raw`` holds its numbers."""

    raw: torch.Tensor

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> StandIn:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            raw.shape,
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=f"{NAME}:0",
        )
        made.raw = raw
        return made

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(op, *args, **(kwargs or {}))

    def __repr__(self) -> str:
        return f"StandIn({self.raw})"

    def tolist(self) -> Any:
        return self.raw.tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.raw.untyped_storage()


def _run(op: Any, *args: Any, **kwargs: Any) -> Any:
    """``op`` on the numbers; what comes out is on the device, unless asked for elsewhere."""
    op = INSTEAD.get(op, op)
    given: dict[int, StandIn] = {}  # what is changed in place comes out as it went in

    def unwrap(value: Any) -> Any:
        if isinstance(value, StandIn):
            given[id(value.raw)] = value
            return value.raw
        if isinstance(value, torch.device):
            return CPU if value.type == NAME else value
        if isinstance(value, torch.Tensor) and value.dim() and op not in COPIES:
            raise RuntimeError(f"{op}: a tensor on {value.device} among tensors on {NAME}")
        return value

    def wrap(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return given[id(value)] if id(value) in given else StandIn(value)

    raw_args, raw_kwargs = _map(unwrap, args), _map(unwrap, kwargs)
    made = op(*raw_args, **raw_kwargs)
    if op is torch.ops.aten.copy_.default:
        return args[0]
    asked = kwargs.get("device")
    if asked is not None and torch.device(asked).type != NAME:
        return made
    return _map(wrap, made)


def _map(function: Any, value: Any) -> Any:
    """``function`` of every leaf; many times as fast as torch's, which knows other containers."""
    if isinstance(value, tuple | list):
        return type(value)([_map(function, item) for item in value])
    if isinstance(value, dict):
        return {name: _map(function, item) for name, item in value.items()}
    return function(value)


class ByWayOfTheCPU(TorchFunctionMode):
    """Tensors made from Python's numbers: PyTorch's own way to a device is closed to wrappers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and kwargs.get("device") is not None:
            return func(*args, **{**kwargs, "device": CPU}).to(kwargs["device"])
        if func is torch.Tensor.__getitem__ and isinstance(args[0], StandIn):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            index = tuple(
                torch.tensor(i).to(args[0].device) if isinstance(i, list) else i for i in index
            )
            args = (args[0], index)
        return func(*args, **kwargs)


def generator(device: Any = CPU) -> torch.Generator:
    """Of the CPU, in place of one of the device."""
    return Generator(CPU if torch.device(device).type == NAME else device)


def load_file(path: Any, device: Any = CPU) -> dict[str, torch.Tensor]:
    """As safetensors does on a device that it knows."""
    from safetensors.torch import load_file

    return {name: tensor.to(device) for name, tensor in load_file(path).items()}


class SafeOpen:
    """As safetensors' ``safe_open`` on a device that it knows."""

    def __init__(self, path: Any, framework: str, device: Any = CPU) -> None:
        from safetensors import safe_open

        self._file, self._device = safe_open(path, framework), device

    def __enter__(self) -> SafeOpen:
        self._opened = self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._opened, name)

    def get_tensor(self, name: str) -> torch.Tensor:
        return self._opened.get_tensor(name).to(self._device)


def register() -> torch.device:
    """Make the device known to this process."""

    class Module(backend_registration._DummyBackendModule):
        def get_rng_state(self, device: Any) -> torch.Tensor:
            return torch.get_rng_state()

        def set_rng_state(self, state: torch.Tensor, device: Any) -> None: ...

        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.bfloat16]

    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=Module())
    global _library  # what is registered goes with it
    _library = torch.library.Library("_", "IMPL")
    _library.fallback(_run, "PrivateUse1")
    return torch.device(NAME, 0)


def load_onto(device: torch.device, patch: pytest.MonkeyPatch) -> None:
    """Whatever is loaded without a device, by kfade's functions or from files, goes there."""
    import kfade.curvature.store
    import kfade.evaluate.divergence
    import kfade.models.load
    import kfade.runs.session

    for module in (kfade.models.load, kfade.runs.session):
        patch.setattr(module, "default_device", lambda: str(device))
    patch.setattr(kfade.evaluate.divergence, "load_file", load_file)
    patch.setattr(kfade.curvature.store, "safe_open", SafeOpen)
    patch.setattr(torch, "Generator", generator)


if AVAILABLE:

    @pytest.fixture(scope="session")
    def stand_in() -> torch.device:
        return register()

    @pytest.fixture(scope="session", autouse=True)
    def by_default(stand_in):
        """Whatever a test loads, it loads onto the stand-in."""
        with pytest.MonkeyPatch.context() as patch, ByWayOfTheCPU():
            load_onto(stand_in, patch)
            yield
