"""The house has floors: a module imports from its own floor or from those below, by relative imports alone."""

import ast
from functools import cache
from pathlib import Path

import cascadekit

ROOT = Path(cascadekit.__file__).parent
FLOORS = {"schemas": 1, "storage": 2, "runtime": 3, "converters": 4, "parity": 5}
TOP = 6  # cli/, __init__.py and __main__.py; bench/ lies beside the house, and nothing imports it
MODULES = [*ROOT.glob("*.py"), *(path for floor in (*FLOORS, "cli") for path in (ROOT / floor).rglob("*.py"))]
TORCH_ALLOWED = ("converters/aotinductor/", "parity/reference/", "runtime/engines/pytorch/", "storage/pickles.py")


@cache
def imported(path: Path) -> frozenset[str]:
    """Dotted paths below the package, or the top-level names of other packages."""
    names = set()
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            names.add("." + ".".join([*base, node.module or ""]))
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    return frozenset(names)


def test_no_import_leads_upwards() -> None:
    assert len(MODULES) > 30
    for path in MODULES:
        place = path.relative_to(ROOT)
        floor = FLOORS.get(place.parts[0], TOP)
        for name in imported(path):
            assert name != "cascadekit", f"{place} imports its own package by name"
            if name.startswith("."):
                target = FLOORS.get(name[1:].split(".")[0], TOP)
                assert target <= floor, f"{place} imports {name}"


def test_torch_stays_where_it_belongs() -> None:
    importers = {str(p.relative_to(ROOT)) for p in MODULES if "torch" in imported(p)}
    assert importers
    assert all(name.startswith(TORCH_ALLOWED) for name in importers), importers
    others = {"diffusers", "transformers"}
    assert not [p for p in MODULES if imported(p) & others]


def test_schemas_know_the_standard_library_and_pydantic_only() -> None:
    import sys

    for path in (ROOT / "schemas").rglob("*.py"):
        foreign = {n for n in imported(path) if not n.startswith(".") and n not in sys.stdlib_module_names}
        assert foreign <= {"pydantic", "pydantic_core"}, path
