"""Everything the builder calls is there in the real bindings, unless it asks first."""

import ast
from pathlib import Path

import pytest

from cascadekit.converters.tensorrt import backend, refit, worker
from helpers.tensorrt_bindings_of import BINDINGS, look, missing

# The classes of what is kept in variables of these names.
CLASSES = {
    "trt": "",
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "config": "IBuilderConfig",
    "profile": "IOptimizationProfile",
    "refitter": "Refitter",
    "cache": "ITimingCache",
    "error": "ParserError",
}
# What is asked for with hasattr, by who has it alone.
OF_RTX = {"IBuilderConfig.num_compute_capabilities", "IBuilderConfig.set_compute_capability"}
MEMBERS = {
    "ILogger.ERROR",
    "ILogger.WARNING",
    "ILogger.log",
    "IStreamWriter.write",
    "IProgressMonitor.phase_start",
    "NetworkDefinitionCreationFlag.STRONGLY_TYPED",
    "BuilderFlag.TF32",
    "BuilderFlag.REFIT",
    "BuilderFlag.WEIGHT_STREAMING",
    "OnnxParserRefitter.refit_from_file",
}


def used() -> set[str]:
    """Dotted names of what the builder uses of TensorRT, read from its source."""
    names = set(MEMBERS)
    for module in (worker, backend, __import__("sys").modules[refit.__module__]):
        for node in ast.walk(ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in CLASSES:
                names.add(".".join(part for part in (CLASSES[node.value.id], node.attr) if part))
    return names


def test_names_are_found_in_the_source() -> None:
    names = used()
    assert {
        "OnnxParser.parse_from_file",
        "IOptimizationProfile.set_shape",
        "Refitter.refit_cuda_engine",
    } <= names
    assert names >= OF_RTX
    assert len(names) > 30


def test_tensorrt_rtx_has_it_all() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    assert missing(trt, used()) == set()


@pytest.mark.parametrize("version", BINDINGS)
def test_tensorrt_has_it_all(bindings: Path, version: str) -> None:
    """Every call of the builder exists; a plain TensorRT has no targets to be named."""
    assert look(bindings, version, used() - OF_RTX)["missing"] == []
