"""The result of unlearning: a change of weights that can be applied, reverted, added and saved."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kfade.curvature.factors import sum_dtype
from kfade.curvature.vectors import (
    FileVector,
    OnDevice,
    Storage,
    Vector,
    keep,
    on_device,
    plus,
    read_through,
    scaled,
)
from kfade.errors import InputError
from kfade.models.weights import Weights, digest_names, digest_weights, is_copy
from kfade.runtime import distributed
from kfade.runtime.tensors import write_tensors

FORMAT = "kfade-update-1"
EDITED = "edited_weights_sha256"
SAME, EQUAL, ROUNDED, OTHER = "same", "equal", "rounded", "other"  # see Update.compare_base


@dataclass(frozen=True)
class Update:
    """ΔW for each changed parameter, in float32 or better, with its provenance.

    Nothing else in kfade changes a model. All methods need one parameter of ΔW at a time. Sums and
    differences of updates are computed when they are read, and so is a file.
    """

    deltas: Vector
    """Parameter name -> ΔW, in the layout of the parameter."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Base model, digests of weights and data, configuration, versions, per-step diagnostics."""

    def apply(self, model: nn.Module) -> None:
        """W ← W + ΔW, added in float32 or better and rounded once to the model's dtype.

        Raises:
            InputError: the model lacks a parameter or has it in another shape; nothing is changed.
        """
        parameters = self._parameters(model)
        for name, delta in self.deltas.items():
            _add(parameters[name], delta)

    def revert(self, model: nn.Module) -> None:
        """W ← W − ΔW: undoes :meth:`apply` up to one rounding of W; see :meth:`applied_to`."""
        (-self).apply(model)

    @contextlib.contextmanager
    def applied_to(self, model: nn.Module, storage: Storage = OnDevice()) -> Iterator[nn.Module]:
        """The edited model within the ``with``; its weights are restored bit for bit afterwards.

        Args:
            storage: keeps the weights that are replaced.

        Raises:
            InputError: the model lacks a parameter or has it in another shape.
        """
        parameters, before = Weights(model), storage.vector()
        try:
            for name, delta in self.deltas.items():
                _refuse_other(model, parameters, name, delta)
                before[name] = distributed.own_part(parameters[name].detach()).clone()
                _add(parameters[name], delta)
            yield model
        finally:
            with torch.no_grad():
                for name in reversed(list(before)):  # tied weights may have several names
                    distributed.own_part(parameters[name]).copy_(before[name])

    def to(self, device: torch.device | str) -> Update:
        """The same update on another device."""
        return Update(on_device(self.deltas, device), self.provenance)

    def kept(self, storage: Storage) -> Update:
        """The same update, computed or read now and kept in ``storage``."""
        return Update(keep(self.deltas, storage), self.provenance)

    def plus(self, deltas: Vector, scale: float = 1.0) -> Update:
        """This update plus ``scale`` times ``deltas``, with the same provenance."""
        return Update(plus(self.deltas, deltas, scale), self.provenance)

    def __add__(self, other: Update) -> Update:
        """The sum of both updates; the provenance holds that of both."""
        merged = {"merged": [self.provenance, other.provenance]}
        return Update(self.plus(other.deltas).deltas, merged)

    def __neg__(self) -> Update:
        return Update(scaled(self.deltas, -1.0), self.provenance)

    def fits_base(self, model: nn.Module) -> bool:
        """Whether ``model`` has the weights that this update was computed on, in any dtype.

        False means another model of the same shape, such as a fine-tuned descendant.
        """
        return self.compare_base(model) != OTHER

    def compare_base(self, model: nn.Module) -> str:
        """How ``model``'s weights relate to those that this update was computed on.

        ``same``: bit-identical. ``equal``: the same values in another dtype. ``rounded``: one is
        the other rounded to a dtype of fewer bits. ``other``: none of these can be shown. If the
        update has digests of the whole model, weights that it does not change are compared, too.

        Raises:
            InputError: the model lacks a parameter or has it in another shape.
        """
        found = self.compare_weights(model)
        digests = digest_names("model")
        needed = digests[:1] if found == SAME else digests  # the first is that of the own dtype
        if found == OTHER or any(key not in self.provenance for key in needed):
            return found
        return found if is_copy(self.provenance, model, "model") else OTHER

    def compare_weights(self, model: nn.Module) -> str:
        """Like :meth:`compare_base`, but only for the weights that this update changes.

        A sum of updates that change different weights has digests of the whole model alone; then
        all weights are compared.
        """
        parameters = self._parameters(model)
        names, kind = self.deltas.keys(), "weights"
        if digest_names(kind)[0] not in self.provenance:
            names, kind = parameters.keys(), "model"
        recorded = self.provenance.get(digest_names(kind)[0])
        if digest_weights(model, names) == recorded:
            return SAME
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            if digest_weights(model, names, dtype) == recorded:
                tensors = [parameters[name].detach() for name in names]
                exact = all(torch.equal(t.to(dtype).to(t.dtype), t) for t in tensors)
                return EQUAL if exact else ROUNDED
        return ROUNDED if is_copy(self.provenance, model, kind, names) else OTHER

    def edited_digest(self, model: nn.Module, storage: Storage = OnDevice()) -> dict[str, str]:
        """Digest of the changed weights after :meth:`apply`, for the provenance; ``storage`` as in
        :meth:`applied_to`."""
        with self.applied_to(model, storage) as edited:
            return {EDITED: digest_weights(edited, self.deltas)}

    def is_in(self, model: nn.Module) -> bool | None:
        """Whether ``model`` is the base with this update applied.

        True or False if digests show that its weights are bit-identical to those after or before.
        None otherwise, for example in another dtype or after other changes.
        """
        if digest_weights(model, self.deltas) == self.provenance.get(EDITED):
            return True
        return False if self.compare_weights(model) in (SAME, EQUAL) else None

    def lost_fraction(self, model: nn.Module) -> float:
        """‖round(W + ΔW) − (W + ΔW)‖ / ‖ΔW‖: the share of ΔW lost to the model's dtype."""
        parameters = self._parameters(model)
        lost = size = 0.0
        for name, delta in self.deltas.items():
            weight = distributed.gather_full(parameters[name].detach())
            exact = weight.double() + delta.to(weight.device).double()
            rounded = _sum(weight, delta).to(weight.dtype)
            lost += (rounded.double() - exact).square().sum().item()
            size += delta.double().square().sum().item()
        return (lost / size) ** 0.5 if size else 0.0

    def read(self) -> None:
        """What other processes do while one saves an update whose layers are divided over them."""
        read_through(self.deltas)

    def save(self, path: Path) -> None:
        """Write one safetensors file, keyed by parameter names.

        Raises:
            InputError: it cannot be written; no partial file is left.
        """
        metadata = {"format": FORMAT, "provenance": self.provenance}
        write_tensors(Path(path), self.deltas, {"kfade": json.dumps(metadata)})

    @classmethod
    def load(cls, path: Path | str) -> Update:
        """Open what :meth:`save` wrote: a file, or the folder of a run. ΔW stays in the file and is
        read when it is used.

        Raises:
            InputError: no such file, or not an update file of this format.
        """
        path = Path(path)
        path = path / "update.safetensors" if path.is_dir() else path
        if not path.is_file():
            raise InputError(f"{path}: no such update; give the folder of a kfade unlearn run")
        deltas = FileVector(path)
        metadata = json.loads(deltas.metadata.get("kfade", "{}"))
        if metadata.get("format") != FORMAT:
            raise InputError(f"{path}: not an update file of this version of kfade")
        return cls(deltas, metadata["provenance"])

    def _parameters(self, model: nn.Module) -> Weights:
        """The model's parameters, among them all that this update changes, in their shapes."""
        parameters = Weights(model)
        for name, delta in self.deltas.items():
            _refuse_other(model, parameters, name, delta)
        return parameters


def _refuse_other(
    model: nn.Module, parameters: Mapping[str, Tensor], name: str, delta: Tensor
) -> None:
    """Raises InputError where the model lacks a parameter or has it in another shape."""
    if name not in parameters:
        raise InputError(
            f"the update changes {name}, which {type(model).__name__} does not have: it was "
            "computed on another model"
        )
    if parameters[name].shape != delta.shape:
        raise InputError(
            f"the update changes {name} of shape {tuple(delta.shape)}, the model has "
            f"{tuple(parameters[name].shape)}: it was computed on another model"
        )


def _add(parameter: Tensor, delta: Tensor) -> None:
    """W ← W + ΔW in float32 or better, rounded once."""
    with torch.no_grad():
        weight = distributed.gather_full(parameter)
        distributed.scatter_into(parameter, _sum(weight, delta))


def _sum(weight: Tensor, delta: Tensor) -> Tensor:
    """W + ΔW in the better of their dtypes and float32, on the device of W."""
    dtype = torch.promote_types(sum_dtype(delta.dtype), weight.dtype)
    return weight.to(dtype) + delta.to(weight.device)
