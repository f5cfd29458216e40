"""The calls of plain TensorRT, against the types that tensorrt-stubs has of 10.13: names, arguments, results.

Our own sources know no types of TensorRT, as it may be any of three. mypy is given copies in which `Any` is the class
that a name stands for, and the module is the one of the stubs.
"""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cascadekit.converters.tensorrt import backend, worker
from cascadekit.runtime.engines.tensorrt import execution
from cascadekit.runtime.engines.tensorrt import host as nvidia

STUBS = Path(sys.prefix) / "stubs"  # apart from the environment, where they would look like a TensorRT
SOURCES = [Path(str(module.__file__)) for module in (worker, backend, execution, nvidia)]
SOURCES.append(Path(str(worker.__file__)).with_name("refit.py"))
CLASSES = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "config": "IBuilderConfig",
    "engine": "ICudaEngine",
    "runtime": "Runtime",
    "_context": "IExecutionContext",
    "_config": "IRuntimeConfig",
}
MODULES = ("backend.module", "self.module", "host.trt", "self.host.trt")
SETTINGS = """
[mypy]
strict_optional = False
follow_imports = skip
ignore_missing_imports = True
disable_error_code = var-annotated
[mypy-tensorrt.*,tensorrt_bindings.*]
follow_imports = normal
ignore_errors = True
"""
WRONG = "\n\ndef wrong(builder: trt.Builder) -> None:\n    builder.create_netwerk(0)\n"
EXPECTED = {
    'wrong: "Builder" has no attribute "create_netwerk"; maybe "create_network"?',
    # TensorRT-RTX's own, asked for with hasattr or where there are targets.
    'worker: "IBuilderConfig" has no attribute "num_compute_capabilities"',
    'worker: "IBuilderConfig" has no attribute "set_compute_capability"',
    'worker: Module has no attribute "ComputeCapability"',
    'execution: "IRuntimeConfig" has no attribute "cuda_graph_strategy"',
    'execution: "IRuntimeConfig" has no attribute "set_runtime_cache"',
    # The bindings make Dims of tuples by themselves, and Dims have a length and items.
    'worker: Argument 2 to "set_shape" of "IOptimizationProfile" has incompatible type '
    '"*Generator[tuple[Any, ...], None, None]"; expected "Dims"',
    'execution: Argument 1 to "tuple" has incompatible type "Dims"; expected "Iterable[Never]"',
}

pytestmark = pytest.mark.skipif(not (STUBS / "tensorrt").is_dir(), reason="tensorrt-stubs is not installed")


class Typed(ast.NodeTransformer):
    """Puts types where names say them, and the module of the stubs in place of the one that is there."""

    def visit_arg(self, node: ast.arg) -> ast.arg:
        if node.arg == "trt":
            node.arg = "_trt"
        if node.arg in CLASSES and node.annotation and ast.unparse(node.annotation) == "Any":
            node.annotation = _class_of(node.arg)
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        self.generic_visit(node)
        return ast.Name("trt", node.ctx) if ast.unparse(node) in MODULES else node

    def visit_Assign(self, node: ast.Assign) -> ast.stmt | None:
        self.generic_visit(node)
        (target, *others) = node.targets
        if ast.unparse(node) == "trt = trt":
            return None
        if ast.unparse(target) == "self.engine" and not others:
            return ast.AnnAssign(target, _class_of("engine"), node.value, 0)
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AnnAssign:
        self.generic_visit(node)
        if isinstance(node.target, ast.Attribute) and node.target.attr in CLASSES:
            node.annotation = _class_of(node.target.attr)
        return node


def _class_of(name: str) -> ast.expr:
    return ast.parse(f"trt.{CLASSES[name]}", mode="eval").body


def typed(source: Path) -> str:
    tree = Typed().visit(ast.parse(source.read_text(encoding="utf-8")))
    tree.body.insert(1, ast.parse("import tensorrt as trt").body[0])  # after the docstring
    return ast.unparse(ast.fix_missing_locations(tree))


def mended(stubs: str) -> str:
    """Some signatures in 10.13's are not Python, with an argument called `in` or one without a default at the end."""
    lines = stubs.splitlines()
    while True:
        try:
            ast.parse("\n".join(lines))
        except SyntaxError as error:
            at = int(error.lineno or 0) - 1
            start = re.match(r"\s*def \w+", lines[at])
            assert start, lines[at]
            lines[at] = f"{start[0]}(self, *args: typing.Any, **named: typing.Any) -> typing.Any:"
        else:
            return "\n".join(lines)


def test_the_calls_have_the_types_of_tensorrt(tmp_path: Path) -> None:
    for path in STUBS.glob("tensorrt*/*.pyi"):
        copy = tmp_path / "stubs" / path.relative_to(STUBS)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(mended(path.read_text(encoding="utf-8")), encoding="utf-8")
    (tmp_path / "mypy.ini").write_text(SETTINGS, encoding="utf-8")
    sources = [*SOURCES, tmp_path / "wrong.py"]
    sources[-1].write_text(f'"""A mistake."""{WRONG}', encoding="utf-8")
    inside = tmp_path / "a/b/c"  # relative imports lead up to two folders
    inside.mkdir(parents=True)
    for folder in (inside, inside.parent, inside.parent.parent):
        (folder / "__init__.py").touch()
    for source in sources:
        (inside / source.name).write_text(typed(source), encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--config-file", str(tmp_path / "mypy.ini"), "--cache-dir", os.devnull]
    ended = subprocess.run(
        [*command, "-p", "a"],
        cwd=tmp_path,
        env={"MYPYPATH": f"{tmp_path / 'stubs'}:{tmp_path}", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in ended.stdout.splitlines() if ": error: " in line]
    found = {re.sub(r"^a/b/c/(\w+)\.py:\d+: error: (.*?)(?:  \[[\w-]+\])?$", r"\1: \2", line) for line in lines}
    assert found == EXPECTED, ended.stdout + ended.stderr
