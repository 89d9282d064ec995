"""What results were made with, and a note where those side by side do not share it.

A loss or a KL can be compared with another one if both are of one model and of the same texts, cut
into sequences in the same way. Manifests and headers of logs hold digests of all of these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kfade.report.data import Log, Measured, MeasuredModel, same_model

MODEL = ("model_sha256", "model_bfloat16_sha256", "model_float16_sha256")
DIGITS = 8  # of a digest, in a label


@dataclass(frozen=True)
class Trait:
    """One thing that a result was made with: a model or a set of sequences."""

    name: str
    """As the settings have it: a hub id or a path."""
    digests: Mapping[str, str]
    details: tuple[str, ...] = ()
    """What tells it from others of the same name, the plainest first."""

    def same(self, other: Trait) -> bool:
        """Whether a digest is the same, a copy in another dtype sharing one; else, the names."""
        common = self.digests.keys() & other.digests.keys()
        if common:
            return any(self.digests[key] == other.digests[key] for key in common)
        return same_model(self.name, other.name)

    def label(self, details: int) -> str:
        """The last part of the name, with some of the details."""
        return ", ".join((Path(self.name).name, *self.details[:details]))


Origin = Mapping[str, Trait]  # by what it is: "model", "forget set", ...


def origin_of(result: MeasuredModel | Log) -> Origin:
    """Model, forget set and held-out set of a run or a sweep, as far as they are recorded."""
    about = result.manifest
    if isinstance(result, Log):
        about = {**about, **result.log.header}
    config = about.get("config", {})
    data = config.get("data", {})
    packing = _packing(data)
    origin = model_of(about)
    for what, key, details in (
        ("forget set", "forget", [packing]),
        ("held-out set", "held_out", [packing, f"seed {about.get('seed')}"]),
    ):
        if digest := about.get(f"{key}_sha256"):
            name = str(data.get("forget" if key == "forget" else "retain") or digest[:DIGITS])
            origin[what] = Trait(name, {key: digest}, (*details, digest[:DIGITS]))
    return origin


def model_of(about: Mapping[str, Any]) -> dict[str, Trait]:
    """The model that a manifest or a header names."""
    if not about.get("model"):
        return {}
    digests = {key: about[key] for key in MODEL if about.get(key)}
    return {
        "model": Trait(str(about["model"]), digests, tuple(d[:DIGITS] for d in digests.values()))
    }


def evaluated_with(subject: MeasuredModel, measured: Measured, what: str, key: str) -> Origin:
    """Model and data of an evaluation: ``key`` is the data's digest in its header."""
    header = measured.log.header
    origin = model_of(subject.manifest)
    if digest := header.get(key):
        name = str(header.get("prompts") or header.get("split") or digest[:DIGITS])
        origin[what] = Trait(name, {key: digest}, (digest[:DIGITS],))
    return origin


def _packing(data: Mapping[str, Any]) -> str:
    return f"packed to {data.get('sequence_length')}" if data.get("pack") else "not packed"


@dataclass(frozen=True)
class Comparison:
    """Results side by side, grouped by what they were made with."""

    groups: Mapping[str, str]
    """By the result's name, the label of its group; empty texts where all share everything."""
    note: tuple[str, ...]
    """For the reader: what is not shared, then a line a group. Empty where all is shared."""


def compare(origins: Mapping[str, Origin]) -> Comparison:
    """Group results, by name, of which these are the origins.

    Traits that are not recorded everywhere are compared where they are.
    """
    labels = {what: _labels(origins, what) for what in ("model", *_others(origins))}
    labels = {what: own for what, own in labels.items() if len(set(own.values()) - {None}) > 1}
    if not labels:
        return Comparison(dict.fromkeys(origins, ""), ())
    groups = {
        name: ", ".join(f"{what} {own[name] or 'not recorded'}" for what, own in labels.items())
        for name in origins
    }
    members: dict[str, list[str]] = {}
    for name, group in groups.items():
        members.setdefault(group, []).append(name)
    first = (
        f"Not all of these results have the same {_listed([*labels])}. Compare only those that are "
        "listed on one line:"
    )
    return Comparison(groups, (first, *(f"{g}: {', '.join(n)}" for g, n in members.items())))


def compare_results(results: Sequence[MeasuredModel | Log]) -> Comparison:
    """:func:`compare` runs and sweeps."""
    return compare({result.name: origin_of(result) for result in results})


def _others(origins: Mapping[str, Origin]) -> list[str]:
    return [w for w in dict.fromkeys(w for o in origins.values() for w in o) if w != "model"]


def _labels(origins: Mapping[str, Origin], what: str) -> dict[str, str | None]:
    """By result, the label of its trait: the same for the same traits, else different ones."""
    kinds: list[Trait] = []
    number: dict[str, int] = {}
    for name, origin in origins.items():
        if what in origin:
            own = origin[what]
            same = (i for i, kind in enumerate(kinds) if kind.same(own))
            number[name] = next(same, len(kinds))
            if number[name] == len(kinds):
                kinds.append(own)
    most = max((len(kind.details) for kind in kinds), default=0)
    for details in range(most + 1):
        words = [kind.label(details) for kind in kinds]
        if len({*words}) == len(kinds):
            break
    else:
        words = [kind.name for kind in kinds]
    return {name: words[number[name]] if name in number else None for name in origins}


def _listed(words: Sequence[str]) -> str:
    """As in "a, b and c"."""
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))
