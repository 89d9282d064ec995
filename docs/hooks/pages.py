"""Pages that are made when the site is built: the command line, CONTRIBUTING and CHANGELOG."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FROM_ROOT = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    for page, source in FROM_ROOT.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=relative_to_docs(text)))
    reference = load("command_line").command_reference()
    files.append(File.generated(config, "reference/commands.md", content=reference))
    return files


def relative_to_docs(text: str) -> str:
    """Links to ``docs/PAGE``, as written in the root, become links to ``PAGE``."""
    return re.sub(r"\]\(docs/", "](", text)


def load(name: str) -> Any:
    """A module beside this file, which is no package."""
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
