"""What a run reads besides examples: a saved curvature; and digests of all of it, to resume by."""

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
from kfade.models.layers import digest_weights, is_copy, parameter_names
from kfade.models.load import DTYPES
from kfade.runs.config import FitConfig, RunConfig
from kfade.runs.session import Loaded
from kfade.runtime import progress


def inputs(
    model_digest: str, sets: Mapping[str, Sequence[TokenSequence]], saved: SavedFit | None = None
) -> dict[str, str]:
    """What :meth:`RunDir.reads` is told of a run: the model's weights, sets of data by name, and
    the curvature, where one is read."""
    data = {
        f"the {name.removesuffix(' set')} set": digest_sequences(tokens)
        for name, tokens in sets.items()
    }
    curvature = {"the curvature": saved.digest} if saved is not None else {}
    return {"the weights of MODEL": model_digest, **data, **curvature}


MADE_WITH = ("estimator", "labels", "joint_bias", "memory")
"""Settings of a fit that a run with this curvature cannot choose."""


@dataclass(frozen=True)
class SavedFit:
    """What ``kfade fit`` wrote, before the model is there."""

    path: Path
    curvature: Curvature
    settings: FitConfig
    """What it was fitted with."""

    @classmethod
    def read(cls, path: Path) -> SavedFit:
        """The curvature in a folder, or in a file.

        Raises:
            InputError: no such curvature, or one that does not tell how it was made.
        """
        curvature = Curvature.load(path)
        settings = curvature.provenance.get("settings")
        if settings is None:
            raise InputError(
                f"--curvature {path}: does not tell of which model it is, nor with which settings "
                "it was made; fit it anew with kfade fit"
            )
        return cls(path, curvature, FitConfig(**settings))

    @cached_property
    def digest(self) -> str:
        """SHA-256 over its files."""
        digest = hashlib.sha256()
        for file in curvature_files(self.path):
            with file.open("rb") as content:
                while chunk := content.read(1 << 20):
                    digest.update(chunk)
        return digest.hexdigest()

    def check(self, run: RunConfig) -> None:
        """Compare the settings of a run with those of this fit.

        Blocks and weights are the run's own, some of those that the fit covers; so is the memory
        of later fits, where a run has any.

        Raises:
            InputError: another estimator, other labels and the like were asked for.
        """
        refits = run.step.refit and run.step.steps > 1
        for name in MADE_WITH:
            asked, fitted = getattr(run.fit, name), getattr(self.settings, name)
            if asked != fitted and not (name == "memory" and refits):
                raise InputError(
                    f"--curvature {self.path} was fitted {_words(name, fitted)}, asked for is "
                    f"{_words(name, asked)}: leave that out, or fit anew with kfade fit"
                )

    def facts(self) -> dict[str, Any]:
        """What a manifest tells of it."""
        return {
            "curvature_sha256": self.digest,
            "curvature_retain_sha256": self.curvature.provenance.get("retain_sha256"),
        }

    def note_other_texts(self, retain: Sequence[TokenSequence]) -> None:
        """Say so where it was fitted on other texts than the run's own ``retain``."""
        if digest_sequences(retain) != self.curvature.provenance.get("retain_sha256"):
            progress.say(
                "note: the curvature was not fitted on what is kept of --retain here, so it may "
                "have seen the texts that KL is measured on"
            )

    def of(self, loaded: Loaded, model_digest: str) -> Curvature:
        """The curvature, cut to the targets; its blocks are read when they are used.

        Args:
            model_digest: of all the model's weights.

        Raises:
            InputError: it was fitted on other weights, or does not cover every target.
        """
        recorded = self.curvature.provenance
        names = [target.name for target in loaded.targets]
        missing = [name for name in names if name not in self.curvature.blocks]
        if missing:
            raise InputError(
                f"--curvature does not cover {missing[0]}: fit it with the same --layers and "
                "--target"
            )
        if recorded["model_sha256"] != model_digest:
            raise InputError(self._other_model(loaded))
        return self.curvature.only(names, loaded.targets[0].weight.device)

    def _other_model(self, loaded: Loaded) -> str:
        """How the model differs from the fit's."""
        recorded = self.curvature.provenance
        if is_copy(recorded, loaded.model, "model"):
            dtype = recorded["dtype"]
            give = f"give --dtype {dtype}, or fit" if dtype in DTYPES else "fit"
            here = str(loaded.targets[0].weight.dtype).removeprefix("torch.")
            return (
                f"--curvature was fitted on this model in {dtype}, here it is in {here}; {give} it "
                "anew with kfade fit"
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


def _words(name: str, value: Any) -> str:
    """A setting of a fit as options say it."""
    flag = f"--{name.replace('_', '-')}"
    if value is None or value is False:
        return f"without {flag}"
    return f"with {flag}" if value is True else f"with {flag} {value}"
