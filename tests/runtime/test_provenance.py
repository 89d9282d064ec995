"""Versions of what a result was made with."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError

import torch

from kfade.runtime import provenance


def test_versions_are_those_of_the_packages():
    assert provenance.versions()["torch"] == torch.__version__


def test_a_package_that_runs_from_its_source_has_no_version(monkeypatch):
    def version(name):
        if name == "kfade":
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(provenance, "version", version)
    found = provenance.versions()
    assert (found["kfade"], found["torch"]) == ("not installed", "1.0")
