"""A saved curvature as an input of a run; digests of all inputs, which a resumed run checks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kfade.curvature.curvature import Curvature, curvature_files
from kfade.data.sequences import TokenSequence, digest_sequences
from kfade.errors import InputError
from kfade.models.load import DTYPES
from kfade.models.weights import digest_weights, is_copy, parameter_names
from kfade.runs.config import FitConfig, RunConfig
from kfade.runs.session import Loaded
from kfade.runtime import progress


def input_digests(
    model_digest: str, sets: Mapping[str, Sequence[TokenSequence]], saved: SavedFit | None = None
) -> dict[str, str]:
    """The inputs of a run by name, each with its digest, for :meth:`RunDir.reads`.

    Args:
        model_digest: digest of the model's weights.
        sets: token sequences of each data set, by name.
        saved: the curvature, if one is read.
    """
    data = {
        f"the {name.removesuffix(' set')} set": digest_sequences(tokens)
        for name, tokens in sets.items()
    }
    curvature = {"the curvature": saved.digest} if saved is not None else {}
    return {"the weights of MODEL": model_digest, **data, **curvature}


MADE_WITH = ("estimator", "labels", "expert_inputs", "joint_bias", "memory")
"""Settings of a fit that a run with a saved curvature must share."""


@dataclass(frozen=True)
class SavedFit:
    """A curvature that ``kfade fit`` wrote, and its settings. It can be read before the model."""

    path: Path
    curvature: Curvature
    settings: FitConfig
    """The settings of the fit."""

    @classmethod
    def read(cls, path: Path) -> SavedFit:
        """Read a curvature from a folder or a file.

        Raises:
            InputError: there is no such curvature, or its settings are missing.
        """
        curvature = Curvature.load(path)
        settings = curvature.provenance.get("settings")
        if settings is None:
            raise InputError(
                f"--curvature {path}: the record of its model and settings is missing; fit it "
                "again with kfade fit"
            )
        return cls(path, curvature, FitConfig(**settings))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the curvature's files."""
        digest = hashlib.sha256()
        for file in curvature_files(self.path):
            with file.open("rb") as content:
                while chunk := content.read(1 << 20):
                    digest.update(chunk)
        return digest.hexdigest()

    def check(self, run: RunConfig) -> None:
        """Check that a run has the settings of this fit that ``MADE_WITH`` names.

        A run may choose its weights among those that the fit covers. If it fits the curvature
        again in later steps, it may also choose the memory of these fits.

        Raises:
            InputError: a setting is different, for example the estimator.
        """
        for name in MADE_WITH:
            asked, fitted = getattr(run.fit, name), getattr(self.settings, name)
            if asked != fitted and not (name == "memory" and run.step.refits):
                raise InputError(
                    f"--curvature {self.path} was fitted {_as_option(name, fitted)}, this run is "
                    f"{_as_option(name, asked)}: use the setting of the fit, or fit again with "
                    "kfade fit"
                )

    def facts(self) -> dict[str, Any]:
        """The curvature's entries in a manifest."""
        return {
            "curvature_sha256": self.digest,
            "curvature_retain_sha256": self.curvature.provenance.get("retain_sha256"),
        }

    def note_other_texts(self, retain: Sequence[TokenSequence]) -> None:
        """Print a note if the fit's texts are not the run's ``retain`` texts."""
        if digest_sequences(retain) != self.curvature.provenance.get("retain_sha256"):
            progress.say(
                "note: the curvature was not fitted on the retain texts of this run (--retain "
                "without the held-out ones), so it may have seen the texts that KL is measured on"
            )

    def of(self, loaded: Loaded, model_digest: str) -> Curvature:
        """The curvature of the targets alone. Its blocks are read when they are used.

        Args:
            model_digest: digest of all the model's weights.

        Raises:
            InputError: the curvature was fitted on other weights, or does not cover every target.
        """
        recorded = self.curvature.provenance
        names = [target.name for target in loaded.targets]
        missing = [name for name in names if name not in self.curvature.blocks]
        if missing:
            raise InputError(
                f"--curvature does not cover {missing[0]}: fit it again with the same --layers and "
                "--target"
            )
        if recorded["model_sha256"] != model_digest:
            raise InputError(self._other_model(loaded))
        return self.curvature.only(names, loaded.targets[0].device)

    def _other_model(self, loaded: Loaded) -> str:
        """The error message for a model that differs from the fit's."""
        recorded = self.curvature.provenance
        if is_copy(recorded, loaded.model, "model"):
            dtype = recorded["dtype"]
            remedy = f"give --dtype {dtype}, or fit" if dtype in DTYPES else "fit"
            here = str(loaded.targets[0].dtype).removeprefix("torch.")
            return (
                f"--curvature was fitted on this model in {dtype}, here it is in {here}; {remedy} "
                "it again with kfade fit"
            )
        digests = recorded["weights_sha256"]
        differing = [
            target.name
            for target in loaded.targets
            if digests[target.name] != digest_weights(loaded.model, parameter_names([target]))
        ]
        which = f"{differing[0]} differs" if differing else "weights that are not targeted differ"
        return (
            f"--curvature was fitted on another model: {which}; fit it on this one with kfade fit"
        )


def _as_option(name: str, value: Any) -> str:
    """A setting of a fit as an option, for an error message."""
    flag = f"--{name.replace('_', '-')}"
    if value is None or value is False:
        return f"without {flag}"
    return f"with {flag}" if value is True else f"with {flag} {value}"
