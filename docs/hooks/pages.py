"""What the site adds to docs/: pages from other folders, their links, and the command line.

In the repository every link of a page leads to a file. A link to a file of ``SOURCES`` becomes a
link to its page.
"""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SOURCES = {  # file of the repository: page of the site
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "recipes/README.md": "recipes.md",
}
COMMANDS = "reference/commands.md"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages whose texts lie in other folders."""
    for source, page in SOURCES.items():
        text = with_links_of_the_site((ROOT / source).read_text(encoding="utf-8"), source, page)
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """A page of docs/ with links of the site; the page of the commands gets its sections."""
    name = page.file.src_uri
    if name in SOURCES.values():
        return markdown
    text = with_links_of_the_site(markdown, f"docs/{name}", name)
    if name == COMMANDS:
        text += f"\n{load('command_line').command_reference()}"
    return text


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
