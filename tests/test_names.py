"""Names and calls of the product: one class for each name, and no call that only its order explains."""

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ("schemas", "storage", "runtime", "converters", "parity", "cli")
FILES = sorted([*ROOT.glob("*.py"), *(path for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))])
MOST_POSITIONALS = 5  # of a call
MOST_MEMBERS = 3  # of a tuple
MOST_COMMAND_LINES = 200

Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def place(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"


def classes(paths: Iterable[Path]) -> dict[str, list[str]]:
    """The places of classes by name."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ClassDef):
                found[node.name].append(place(path, node))
    return found


def test_no_class_is_defined_twice() -> None:
    assert len(FILES) > 150
    everywhere = [*FILES, *(ROOT / "bench").rglob("*.py")]
    assert not {name: places for name, places in classes(everywhere).items() if len(places) > 1}


def test_no_type_alias_has_the_name_of_a_class() -> None:
    known = classes(FILES)
    for path in FILES:
        for node in parsed(path).body:
            if isinstance(node, ast.Assign) and isinstance(target := node.targets[0], ast.Name):
                variable = isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "TypeVar"
                assert variable or target.id not in known, f"{place(path, node)}: {target.id}, as {known[target.id]}"


def test_folders_side_by_side_have_no_file_of_the_same_name() -> None:
    """A command's file is named after its command, and so is the library's file that it calls."""
    floors = {ROOT / floor for floor in (*FLOORS, "bench")}
    for parent in (ROOT, *(folder for floor in floors for folder in (floor, *floor.rglob("*")) if folder.is_dir())):
        found: dict[str, list[str]] = defaultdict(list)
        for folder in parent.iterdir():
            if folder.is_dir() and (parent != ROOT or folder in floors) and folder.name != "cli":
                for path in folder.glob("*.py"):
                    found[path.name].append(str(path.relative_to(ROOT)))
        assert not {name: paths for name, paths in found.items() if len(paths) > 1 and name != "__init__.py"}


def test_no_table_is_written_twice() -> None:
    """Tables here are mappings and tuples of texts at the top of modules."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in FILES:
        for node in parsed(path).body:
            value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
            words = isinstance(value, ast.Tuple) and all(isinstance(each, ast.Constant) for each in value.elts)
            if isinstance(value, ast.Dict) and len(value.keys) > 2:
                pairs = zip(value.keys, value.values, strict=True)
                found[str(sorted(f"{key and ast.unparse(key)}: {ast.unparse(each)}" for key, each in pairs))].append(
                    place(path, node)
                )
            elif isinstance(value, ast.Tuple) and words and len(value.elts) > 2:
                found[str(sorted(map(ast.unparse, value.elts)))].append(place(path, node))
    assert not [places for places in found.values() if len(places) > 1]


@dataclass(frozen=True)
class Signature:
    """How many positional parameters a function has; `rest` when it takes any number of further values."""

    named: int
    rest: bool


@cache
def signatures() -> dict[str, list[Signature]]:
    """The signatures of our functions, methods and classes, by name."""
    found: dict[str, list[Signature]] = defaultdict(list)
    for path in FILES:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ClassDef):
                makers = [each for each in node.body if isinstance(each, Function) and each.name == "__init__"]
                found[node.name] += [signature(maker, method=True) for maker in makers] or [Signature(0, False)]
                methods = (each for each in node.body if isinstance(each, Function))
                for method in methods:
                    found[method.name].append(signature(method, method=True))
            elif isinstance(node, Function):
                found[node.name].append(signature(node, method=False))
    return found


def signature(node: Function, *, method: bool) -> Signature:
    static = any(isinstance(each, ast.Name) and each.id == "staticmethod" for each in node.decorator_list)
    named = len(node.args.posonlyargs) + len(node.args.args)
    return Signature(named - (method and not static), node.args.vararg is not None)


def foreign_names(path: Path) -> set[str]:
    """The names that a file has from modules that are not ours."""
    names: set[str] = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and not node.level):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    return names


def root_of(node: ast.expr) -> ast.expr:
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node


def positionals(call: ast.Call, foreign: set[str]) -> int:
    """How many values of a call are told apart by their order alone.

    Values that a function takes in any number (`*values`) are not. Calls of libraries count as none: their names are
    imported from other modules, or are methods that no class of ours has."""
    given = sum(not isinstance(each, ast.Starred) for each in call.args)
    root = root_of(call.func)
    if isinstance(root, ast.Name) and root.id in foreign:
        return 0
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    known = signatures().get(name, [])
    if isinstance(call.func, ast.Attribute) and not known:
        return 0
    if known and all(each.rest for each in known):
        return min(given, max(each.named for each in known))
    return given


@pytest.mark.parametrize(
    ("text", "counted"),
    [
        ("ours(1, 2, 3, 4, 5, 6)", 6),
        ("np.ours(1, 2, 3, 4, 5, 6)", 0),
        ("TABLE[key](1, 2, 3, 4, 5, 6)", 6),
        ("network.add_of_a_library(1, 2, 3, 4, 5, 6)", 0),
        ("ours(*rows, 1, key=2)", 1),
    ],
)
def test_positionals_are_counted(text: str, counted: int) -> None:
    call = ast.parse(text, mode="eval").body
    assert isinstance(call, ast.Call)
    assert positionals(call, {"np"}) == counted


def test_no_call_of_ours_has_more_than_five_positional_arguments() -> None:
    found = [
        f"{place(path, node)} {ast.unparse(node.func)}: {count}"
        for path in FILES
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Call) and (count := positionals(node, foreign_names_of(path))) > MOST_POSITIONALS
    ]
    assert not found, "\n".join(found)


@cache
def foreign_names_of(path: Path) -> set[str]:
    return foreign_names(path)


def long_tuples(annotation: ast.expr) -> Iterator[str]:
    """The tuples in an annotation, quoted or not, with more members than a reader keeps apart."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        annotation = ast.parse(annotation.value, mode="eval").body
    for node in ast.walk(annotation):
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == "tuple":
            members = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            if len(members) > MOST_MEMBERS:
                yield ast.unparse(node)


def annotations(node: ast.AST) -> Iterator[ast.expr]:
    """The types of a function's parameters and result, and the type that an alias stands for."""
    if isinstance(node, Function):
        given = node.args
        yield from (each.annotation for each in (*given.posonlyargs, *given.args, *given.kwonlyargs) if each.annotation)
        yield from [node.returns] if node.returns is not None else []
    elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript):
        yield node.value


def test_no_tuple_of_more_than_three_goes_between_functions() -> None:
    found = [
        f"{place(path, node)}: {text}"
        for path in FILES
        for node in ast.walk(parsed(path))
        for annotation in annotations(node)
        for text in long_tuples(annotation)
    ]
    assert not found, "\n".join(found)


def is_command(node: ast.AST) -> bool:
    """Whether a function is decorated with `click.command`."""
    return isinstance(node, Function) and any(
        isinstance(each, ast.Call) and ast.unparse(each.func) == "click.command" for each in node.decorator_list
    )


def test_command_files_are_short() -> None:
    commands = [
        path for path in FILES if path.is_relative_to(ROOT / "cli") and any(map(is_command, ast.walk(parsed(path))))
    ]
    assert len(commands) > 10
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in commands}
    assert not {name: length for name, length in lengths.items() if length >= MOST_COMMAND_LINES}
