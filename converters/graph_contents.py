"""Describes an ONNX graph by itself: what it computes, the metadata that its export recorded, and its passport."""

from pathlib import Path
from typing import Any

from ..schemas.errors import CheckpointError, MissingPackageError
from ..schemas.messages import reason
from ..schemas.passport_keys import KEY
from ..storage.install_hint import install_hint
from .passport_check import PassportState, check_passport

PREFIX = "cascadekit."  # of the metadata that our export records


def graph_facts(path: Path, *, hash: bool) -> tuple[dict[str, Any], PassportState]:
    """Return the facts of the graph at `path`, as plain values, and the state of its passport.

    Its weights may lie in other files, which are not read. Raises CheckpointError for a damaged file,
    MissingPackageError without onnx."""
    try:
        from .export.graph_files import load_graph, opset_of, port_entries
    except ImportError as error:
        raise MissingPackageError(
            f"{path}: reading a graph needs the onnx package: {install_hint('export')}"
        ) from error
    try:
        model = load_graph(path)
    except Exception as error:  # protobuf has errors of its own, and raises others by version
        raise CheckpointError(f"{path}: not a readable ONNX graph: {reason(error)}; export it again") from error
    found = {entry.key: entry.value for entry in model.metadata_props}
    facts = {
        "path": str(path),
        "component": "graph",
        "opset": opset_of(model),
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
        "inputs": [port.model_dump(mode="json") for port in port_entries(list(model.graph.input))],
        "outputs": [port.model_dump(mode="json") for port in port_entries(list(model.graph.output))],
        "metadata": {key.removeprefix(PREFIX): text for key, text in found.items() if key != KEY},
    }
    return facts, check_passport(path, found.get(KEY), hash=hash)
