"""What a result was made with: versions and the commit."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version


def versions() -> dict[str, str]:
    """Versions of everything that the numbers depend on."""
    packages = ("kfade", "torch", "transformers", "safetensors")
    return {"python": platform.python_version(), **{name: version_of(name) for name in packages}}


def version_of(name: str) -> str:
    """The version of an installed package."""
    try:
        return version(name)
    except PackageNotFoundError:  # run from its source, without an installation
        return "not installed"


def git_sha() -> str | None:
    """The commit of the working directory, if it is one of git's."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() or None
