"""Tensors in safetensors files, as a run keeps them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from kfade.errors import InputError


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """One safetensors file, of the mode that new files have: the library itself may let nobody but
    the owner read it."""
    path.touch()
    mode = path.stat().st_mode
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, path, dict(metadata))
    path.chmod(mode)


@contextlib.contextmanager
def reading_kept(path: Path) -> Iterator[None]:
    """Reading what an unfinished run has kept, the safetensors file ``path``.

    Raises:
        InputError: it is broken; says what to do.
    """
    try:
        yield
    except (SafetensorError, InputError) as error:
        told = str(error)
        told = told if str(path) in told else f"{path}: not a whole safetensors file ({told})"
        raise InputError(
            f"{told}; remove it, so that what it held is computed anew, or the folder of the "
            "unfinished run"
        ) from None
