"""The roads of ARCHITECTURE.md hold: their files exist, and each is reached from one that comes before it."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
ROADS = ("convert", "export", "generate", "verify", "build")
MOST = 12  # files of a road
LEAST_TERMS = 20  # of the glossary


def section(title: str) -> str:
    """The text below a heading of any level, up to the next heading."""
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#|\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found, f"ARCHITECTURE.md has no section {title!r}"
    return found[1]


def road(name: str) -> list[str]:
    """The files of a road in their order: a numbered line begins with a path, and a sentence follows."""
    return re.findall(r"^\d+\. `([^`]+)`: \S", section(name), re.MULTILINE)


def table(title: str) -> list[list[str]]:
    """The rows of a section's table, without its head."""
    rows = [line for line in section(title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imported_by(path: Path) -> frozenset[Path]:
    """The modules that a module imports, at its top or inside a function, and not for its types alone.

    A name imported from a package counts as its home, where the package's own imports say so. A dotted name in a string
    counts too: a module that runs in a process of its own is started by its name."""
    found: set[Path] = set()
    for node in running_code(parsed(path)):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            for alias in node.names:
                found |= homes(folder, alias.name)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            for dotted in re.findall(r"cascadekit((?:\.\w+)+)", node.value):
                found.add(ROOT.joinpath(*dotted[1:].split(".")).with_suffix(".py"))
    return frozenset(found)


def running_code(node: ast.AST) -> Iterator[ast.AST]:
    """The node and all below it, without what only a type checker reads."""
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from running_code(child)


def homes(module: Path, name: str) -> set[Path]:
    """The files that `from module import name` reaches; `module` is a path without its suffix."""
    if module.with_suffix(".py").is_file():
        return {module.with_suffix(".py")}
    if (module / f"{name}.py").is_file():
        return {module / f"{name}.py"}
    package = module / "__init__.py"
    found = {package}
    for node in ast.walk(parsed(package)) if package.is_file() else ():
        if isinstance(node, ast.ImportFrom) and node.level == 1 and name in {alias.name for alias in node.names}:
            found |= homes(module.joinpath(*(node.module or "").split(".")), name)
    return found


@pytest.mark.parametrize("name", ROADS)
def test_a_road_begins_at_its_command_and_has_at_most_twelve_files(name: str) -> None:
    files = road(name)
    assert files, name
    assert files[0] == f"cli/{name}.py"
    assert 1 < len(files) <= MOST
    assert len(set(files)) == len(files), "a file is entered twice"
    assert len(files) == len(re.findall(r"^\d+\. ", section(name), re.MULTILINE)), "a line has no path and sentence"


@pytest.mark.parametrize("name", ROADS)
def test_every_file_of_a_road_is_imported_by_one_before_it(name: str) -> None:
    before: list[Path] = []
    for file in road(name):
        path = ROOT / file
        assert path.is_file(), file
        assert not before or any(path in imported_by(each) for each in before), f"nothing before {file} imports it"
        before.append(path)


def test_every_path_on_the_page_exists() -> None:
    paths = re.findall(r"`((?:[\w.-]+/)*[\w.-]+(?:/|\.(?:py|md|toml|json|txt|yml|html)))`", PAGE)
    assert len(paths) > 50
    others = {"cascade.json"}  # a file of a bundle
    assert not [path for path in paths if path not in others and not (ROOT / path).exists()]


def test_what_is_looked_for_is_found() -> None:
    """Each answer is a file and the names in it that one looks for."""
    answers = table("Where to find")
    assert len(answers) >= 5
    for question, file, names in answers:
        path = ROOT / file.strip("`")
        assert path.is_file(), question
        defined = {
            target.id if isinstance(target, ast.Name) else getattr(node, "name", "")
            for node in parsed(path).body
            for target in (node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", node)])
        }
        wanted = re.findall(r"`(\w+)`", names)
        assert wanted, question
        assert set(wanted) <= defined, f"{file}: {set(wanted) - defined}"


def test_the_glossary_has_its_words_once_each() -> None:
    words = [word for word, _ in table("Glossary")]
    assert len(words) >= LEAST_TERMS
    assert len(set(words)) == len(words)


def test_the_floors_are_those_that_imports_keep() -> None:
    floors = [folder.strip("`/") for _, folder, _ in table("Floors")]
    assert floors == ["cli", "parity", "converters", "runtime", "storage", "schemas"]
