"""A model's weights by name, and digests that say whether two models have the same weights."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kfade.models.targets import Target
from kfade.runtime import distributed

ROUNDINGS = (None, torch.bfloat16, torch.float16)  # digests are kept of weights rounded to these


class Weights(Mapping[str, Tensor]):
    """A model's parameters by name; ``name[e]`` is expert e of a fused one, a view.

    Reading that raises InputError where :func:`~kfade.runtime.distributed.entry` does.
    """

    def __init__(self, model: nn.Module) -> None:
        self._whole = dict(model.named_parameters(remove_duplicate=False))

    def __getitem__(self, name: str) -> Tensor:
        whole = parameter_of(name)
        if name in self._whole or whole == name:
            return self._whole[name]
        number = name.removeprefix(whole)[1:-1]
        parameter = self._whole[whole]
        if not number.isdecimal() or parameter.ndim < 2 or int(number) >= len(parameter):
            raise KeyError(name)
        return distributed.entry(parameter, int(number))

    def __iter__(self) -> Iterator[str]:
        return iter(self._whole)

    def __len__(self) -> int:
        return len(self._whole)


def parameter_of(name: str) -> str:
    """The parameter that a weight is part of: that of ``name[e]``, or ``name`` itself."""
    return name.rpartition("[")[0] if name.endswith("]") else name


def parameter_names(targets: Iterable[Target]) -> list[str]:
    """Names of the parameters that the targets stand for, biases included where joint."""
    return [name for target in targets for name in (target.name, target.bias) if name is not None]


def digest_weights(
    model: nn.Module, names: Iterable[str] | None = None, dtype: torch.dtype | None = None
) -> str:
    """SHA-256 over names, dtypes and bytes of parameters: says which model it is.

    Args:
        names: the parameters; all when None.
        dtype: values are rounded to it first, as if the model had been loaded so; None: they are
            not.
    """
    return _digests(model, names, [dtype])[0]


def weight_digests(
    model: nn.Module, kind: str, names: Collection[str] | None = None
) -> dict[str, str]:
    """:func:`digest_weights` of the values as they are, rounded to bfloat16 and to float16, by
    :func:`digest_names`. Copies of a model in different dtypes have one of these in common."""
    return dict(zip(digest_names(kind), _digests(model, names, ROUNDINGS), strict=True))


def digest_names(kind: str) -> list[str]:
    """What manifests call the digests of :func:`weight_digests`."""
    return [f"{kind}_sha256", f"{kind}_bfloat16_sha256", f"{kind}_float16_sha256"]


def is_copy(
    recorded: Mapping[str, Any], model: nn.Module, kind: str, names: Collection[str] | None = None
) -> bool:
    """Whether ``model`` has the weights of which ``recorded`` has digests, up to a rounding."""
    return any(
        name in recorded and recorded[name] == digest_weights(model, names, dtype)
        for name, dtype in zip(digest_names(kind), ROUNDINGS, strict=True)
    )


def _digests(
    model: nn.Module, names: Iterable[str] | None, dtypes: Sequence[torch.dtype | None]
) -> list[str]:
    """:func:`digest_weights` for each of ``dtypes``; every weight is gathered once."""
    parameters = Weights(model)
    digests = [hashlib.sha256() for _ in dtypes]
    for name in sorted(parameters if names is None else names):
        weight = distributed.gather_full(parameters[name].detach())
        for digest, dtype in zip(digests, dtypes, strict=True):
            tensor = weight.to(dtype=dtype).cpu().contiguous()
            digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
            digest.update(tensor.view(torch.uint8).numpy().data)
    return [digest.hexdigest() for digest in digests]
