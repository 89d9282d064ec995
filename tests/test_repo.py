"""The house rules that a machine can check: who imports whom, sizes, paths, docstrings, prints."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import kfade

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "kfade"
FILES = sorted(SOURCE.rglob("*.py"))
LONGEST = 400

# A room imports from rungs below its own: rooms on one rung do not know each other.
LADDER = [
    {"errors"},
    {"runtime"},
    {"data"},
    {"models"},
    {"curvature"},
    {"method", "planning"},
    {"export", "baselines", "evaluate"},
    {"report", "demo"},
    {"runs"},
    {"cli"},
    {"__init__", "__main__"},  # the public names, and the way in
]
ARROWS = 55  # pairs of rooms of which one imports from the other; 211 when files lay loose


def part(path: Path) -> str:
    """The ladder's name of a file: its folder within kfade, or its own."""
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def rung(name: str) -> int:
    found = [i for i, names in enumerate(LADDER) if name in names]
    assert found, f"kfade.{name} has no rung: add it to LADDER in tests/test_repo.py"
    return found[0]


def kfade_modules(path: Path) -> set[str]:
    """The parts of kfade that a file imports, anywhere in it; ``__init__`` for the package."""
    package = ["kfade", *path.relative_to(SOURCE).parts[:-1]]
    imported = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            if base == "kfade":  # "from kfade import update" names a module or a public name
                imported += [f"kfade.{alias.name}" for alias in node.names]
            else:
                imported.append(base)
    found = set()
    for name in imported:
        if name == "kfade":
            found.add("__init__")
        elif name.startswith("kfade."):
            first = name.split(".")[1]
            module = (SOURCE / first).is_dir() or (SOURCE / f"{first}.py").is_file()
            found.add(first if module else "__init__")
    return found


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_import_ladder(path):
    own = rung(part(path))
    others = kfade_modules(path) - {part(path)}
    too_high = {name for name in others if rung(name) >= own}
    assert not too_high, f"{relative(path)} imports from above its rung: {sorted(too_high)}"


def test_rooms_do_not_grow_together():
    inside = [path for path in FILES if path.parent != SOURCE]
    arrows = {(part(path), name) for path in inside for name in kfade_modules(path) - {part(path)}}
    assert len(arrows) <= ARROWS, sorted(arrows)


def test_the_ladder_test_sees_imports():
    # Negative control, and the one import cycle that matters: evaluation must not know how a
    # model was made.
    assert {"curvature", "models", "data"} <= kfade_modules(SOURCE / "method" / "unlearn.py")
    assert rung("curvature") > rung("models")
    assert len(FILES) > 25


def test_evaluation_knows_no_curvature():
    for path in SOURCE.glob("evaluate/**/*.py"):
        assert "curvature" not in kfade_modules(path), relative(path)


def test_tests_have_the_rooms_of_the_source():
    rooms = {path.name for path in SOURCE.iterdir() if path.is_dir() and path.name[0] != "_"}
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    assert folders <= rooms


def test_no_test_file_imports_a_test_file():
    for path in (ROOT / "tests").rglob("*.py"):
        found = re.search(r"^(from|import) test_\w+", path.read_text(encoding="utf-8"), re.M)
        assert not found, f"{path.relative_to(ROOT)}: {found and found.group()}"


def test_configuration_stops_at_runs():
    knowing = {part(path) for path in FILES if "runs" in kfade_modules(path)}
    assert knowing <= {"runs", "cli"}


def test_loaders_are_imported_in_one_file():
    loaders = re.compile(r"import .*\bAuto(Model|Tokenizer|Config)")
    found = [path.name for path in FILES if loaders.search(path.read_text(encoding="utf-8"))]
    assert found == ["load.py"]


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_no_file_is_too_long(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST


# Functions of the library (all but ``cli/``) that are longer than 60 lines without their docstring,
# or take more than 8 arguments, and why.
LONG = {
    "runs/unlearning.py:unlearn": "a run from its first check to its last file, in order",
}
MANY: dict[str, str] = {}


def functions() -> list[tuple[str, ast.FunctionDef]]:
    """The library's functions, by file and name."""
    found = []
    for path in FILES:
        if part(path) in ("cli", "__main__"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                found.append((f"{path.relative_to(SOURCE).as_posix()}:{node.name}", node))
    return found


def lines_of(node: ast.FunctionDef) -> int:
    """Lines without the docstring."""
    first = node.body[0]
    has_text = ast.get_docstring(node) is not None
    text = (first.end_lineno or 0) - first.lineno + 1 if has_text else 0
    return (node.end_lineno or 0) - node.lineno + 1 - text


def arguments_of(node: ast.FunctionDef) -> int:
    names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def test_functions_are_short():
    assert {name for name, node in functions() if lines_of(node) > 60} == set(LONG)


def test_signatures_are_short():
    assert {name for name, node in functions() if arguments_of(node) > 8} == set(MANY)


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_print_is_for_the_command_line(path):
    if part(path) in ("cli", "demo"):
        return
    calls = [
        node.lineno
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "print"
    ]
    assert not calls, f"{relative(path)} prints in lines {calls}"


def test_no_machine_paths():
    shipped = [*SOURCE.rglob("*"), *(ROOT / "docs").rglob("*"), ROOT / "README.md"]
    texts = {".py", ".md", ".yaml", ".yml", ".json", ".jsonl", ".toml", ".txt", ".html", ".svg"}
    for path in shipped:
        if path.is_file() and path.suffix in texts:
            text = path.read_text(encoding="utf-8")
            found = re.search(r"/(work|tmp|root|home/\w+)/", text)
            assert not found, f"{relative(path)} holds the path {found and found.group()}"


def test_links_of_the_pages_lead_to_files():
    """As they stand in the repository; `make docs` checks those of the site."""
    pages = [*(ROOT / "docs").rglob("*.md"), *(ROOT / "recipes").glob("*.md"), *ROOT.glob("*.md")]
    links = [
        (page, link)
        for page in pages
        for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text(encoding="utf-8"))
    ]
    assert len(links) > 100
    assert [(relative(p), link) for p, link in links if not (p.parent / link).exists()] == []


@pytest.mark.parametrize("name", kfade.__all__)
def test_public_names_are_documented(name):
    public = getattr(kfade, name)
    assert public.__doc__
    # A dataclass without a docstring of its own gets its signature for one.
    assert not public.__doc__.startswith(f"{name}(")


def test_public_names_are_few_and_listed_once():
    assert len(kfade.__all__) == len(set(kfade.__all__)) <= 24
