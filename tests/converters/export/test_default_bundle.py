"""The bundle that `export` makes unless told otherwise is one that other programs open: onnx itself, by path."""

import importlib.metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import pytest

from cascadekit import export
from cascadekit.runtime.engines.onnxruntime import OnnxRuntimeEngine
from cascadekit.schemas.manifest import PortEntry
from cascadekit.schemas.precision import Precision
from cascadekit.schemas.stages import Stage
from cascadekit.storage.bundle import Bundle, open_bundle

SIZES = {"batch": 1, "height": 8, "width": 8, "h": 8, "w": 8}


@pytest.fixture(scope="module")
def bundle(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    root = tmp_path_factory.mktemp("default") / "bundle"
    export(tiny / "model", root)
    return open_bundle(root)


def graphs(bundle: Bundle) -> list[tuple[Stage, str, Path]]:
    entries = bundle.manifest.stages.items()
    return [(stage, name, bundle.root / g.path) for stage, entry in entries for name, g in entry.graphs.items()]


def test_onnx_loads_and_checks_every_graph_by_its_path(bundle: Bundle) -> None:
    assert len(graphs(bundle)) == 9
    for _, _, path in graphs(bundle):
        onnx.checker.check_model(str(path), full_check=True)
        model = onnx.load(path)
        assert all(tensor.data_location == onnx.TensorProto.DEFAULT for tensor in model.graph.initializer)
        assert any(tensor.raw_data for tensor in model.graph.initializer)


def fed(port: PortEntry, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    shape = [dim if isinstance(dim, int) else SIZES.get(dim, 8) for dim in port.dims]
    if port.dtype == "int64":
        return rng.integers(1, 100, shape) if port.name == "input_ids" else np.ones(shape, np.int64)
    return rng.random(shape, np.float32)


@pytest.mark.parametrize("name", ["model", "encoder"])
def test_onnxs_own_evaluator_computes_what_the_bundle_does(bundle: Bundle, name: str) -> None:
    entry = bundle.entry(Stage.VQGAN).graphs[name]
    rng = np.random.default_rng(0)
    inputs = {port.name: fed(port, rng) for port in entry.inputs}
    expected = onnx.reference.ReferenceEvaluator(str(bundle.root / entry.path)).run(None, inputs)
    with OnnxRuntimeEngine(bundle).load(Stage.VQGAN, name) as stage:
        found = stage(inputs)
    for port, value in zip(entry.outputs, expected, strict=True):
        np.testing.assert_allclose(found[port.name], value, rtol=1e-3, atol=1e-4)


def test_graphs_say_where_they_come_from(bundle: Bundle) -> None:
    version = importlib.metadata.version("cascadekit")
    for stage, name, path in graphs(bundle):
        model = onnx.load(path, load_external_data=False)
        entry = bundle.entry(stage)
        assert (model.producer_name, model.producer_version, model.model_version) == ("cascadekit", version, 2)
        assert model.doc_string
        found = {prop.key.removeprefix("cascadekit."): prop.value for prop in model.metadata_props}
        assert "cascadekit-passport" in found.pop("passport")
        assert found == {
            "stage": stage,
            "graph": name,
            "variant": "tiny",
            "precision": "fp32",
            "target": "portable",
            "quantization": "none",
            "source_fingerprints": " ".join(source.fingerprint for source in entry.sources),
        }


def test_half_precision_is_said_and_opens_too(tiny: Path, tmp_path: Path) -> None:
    export(tiny / "model", tmp_path / "bundle", stages=[Stage.VQGAN], precision=Precision.BF16)
    model = onnx.load(tmp_path / "bundle/vqgan/model.onnx")
    assert {prop.key: prop.value for prop in model.metadata_props}["cascadekit.precision"] == "bf16"
