"""What a run reads besides examples: a saved curvature; and digests of all of it, to resume by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from kfade.cli.session import Loaded
from kfade.curvature.curvature import Curvature
from kfade.data.sequences import TokenSequence, digest_sequences
from kfade.errors import InputError
from kfade.models.layers import digest_weights, parameter_names
from kfade.models.load import DTYPES


def inputs(model_digest: str, sets: Mapping[str, Sequence[TokenSequence]]) -> dict[str, str]:
    """What :meth:`RunDir.reads` is told of a run: the model's weights and sets of data by name."""
    data = {
        f"the {name.removesuffix(' set')} set": digest_sequences(tokens)
        for name, tokens in sets.items()
    }
    return {"the weights of MODEL": model_digest, **data}


def read_curvature(folder: Path, loaded: Loaded) -> Curvature:
    """A saved curvature, cut to the targets; its blocks are read when they are used.

    Raises:
        InputError: it was fitted on other weights, or does not cover every target.
    """
    curvature = Curvature.load(folder)
    missing = [t.name for t in loaded.targets if t.name not in curvature.blocks]
    if missing:
        raise InputError(
            f"--curvature does not cover {missing[0]}: fit it with the same --layers and --target"
        )
    digests = curvature.provenance.get("weights_sha256", {})
    for target in loaded.targets:
        names, recorded = parameter_names([target]), digests.get(target.name)
        if recorded == digest_weights(loaded.model, names):
            continue
        for word, dtype in DTYPES.items():
            if recorded == digest_weights(loaded.model, names, dtype):
                raise InputError(
                    f"--curvature was fitted on this model in {word}, here it is in "
                    f"{str(target.weight.dtype).removeprefix('torch.')}; give --dtype {word}, or "
                    "fit it anew with kfade fit"
                )
        raise InputError(
            f"--curvature was fitted on another model, or on this one in more bits: {target.name} "
            "differs; fit it on this one with kfade fit"
        )
    return curvature.only([t.name for t in loaded.targets], loaded.targets[0].weight.device)
