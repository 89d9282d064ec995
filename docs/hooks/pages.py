"""Pages of the site that are no files of docs/: texts of other folders, and the command line."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SOURCES = {  # file of the repository: page of the site
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "recipes/README.md": "recipes.md",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages."""
    for source, page in SOURCES.items():
        text = with_links_of_the_site((ROOT / source).read_text(encoding="utf-8"), source, page)
        files.append(File.generated(config, page, content=text))
    reference = load("command_line").command_reference()
    files.append(File.generated(config, "reference/commands.md", content=reference))
    return files


def with_links_of_the_site(text: str, source: str, page: str) -> str:
    """The text with links relative to ``page`` in place of links relative to ``source``."""

    def link(found: re.Match[str]) -> str:
        target, anchor = found.group(1), found.group(2) or ""
        file = os.path.normpath(os.path.join(os.path.dirname(source), target))
        named = SOURCES.get(file, file.removeprefix("docs/"))
        return f"]({os.path.relpath(named, os.path.dirname(page) or '.')}{anchor})"

    return re.sub(r"\]\((?!https?:|#)([^)#]+)(#[^)]*)?\)", link, text)


def load(name: str) -> Any:
    """A module beside this file."""
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
