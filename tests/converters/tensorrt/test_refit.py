"""Other weights for a loaded engine, up to the calls of TensorRT, which a stand-in takes the place of: it reads the
graph's weights with onnx's own code, as TensorRT's parser reads them from the file."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from cascadekit.converters.tensorrt import BuildOptions, build, refit
from cascadekit.converters.tensorrt.backend import InstalledTensorRT
from cascadekit.schemas.errors import EngineError, UsageError


class Logger:
    INTERNAL_ERROR, ERROR, WARNING = 0, 1, 2


class Engine:
    def __init__(self, graph: Path) -> None:
        self.weights = dict.fromkeys(read(graph), b"")
        self.works = True


def read(graph: Path) -> dict[str, bytes]:
    model = onnx.load(graph)
    return {tensor.name: numpy_helper.to_array(tensor).tobytes() for tensor in model.graph.initializer}


class Refitter:
    def __init__(self, engine: Engine, logger: Any) -> None:
        self.engine, self.logger = engine, logger
        self.given: dict[str, bytes] = {}

    def get_all_weights(self) -> list[str]:
        return list(self.engine.weights)

    def get_missing_weights(self) -> list[str]:
        return [name for name in self.engine.weights if name not in self.given]

    def refit_cuda_engine(self) -> bool:
        if self.engine.works:
            self.engine.weights = dict(self.given)
        else:
            self.logger.log(Logger.ERROR, "refit.cpp:3: out of memory")
        return self.engine.works


class OnnxParserRefitter:
    def __init__(self, refitter: Refitter, logger: Any) -> None:
        self.refitter = refitter

    def refit_from_file(self, path: str) -> bool:
        self.refitter.given = read(Path(path))
        return True


@pytest.fixture
def backend() -> InstalledTensorRT:
    module = SimpleNamespace(ILogger=Logger, Refitter=Refitter, OnnxParserRefitter=OnnxParserRefitter)
    return InstalledTensorRT("refit-stand-in", module)


def test_there_and_back(bundle: Path, backend: InstalledTensorRT) -> None:
    graph, weights = bundle / "vqgan/model.onnx", bundle / "vqgan/weights.safetensors"
    engine = Engine(graph)
    names = {tensor.name for tensor in onnx.load(graph, load_external_data=False).graph.initializer}
    assert refit(backend, engine, graph) == len(names)
    first, content = engine.weights, weights.read_bytes()
    changed = np.frombuffer(content, np.uint8).copy()
    changed[-5000:] ^= 1
    weights.write_bytes(changed.tobytes())
    refit(backend, engine, graph)
    assert engine.weights != first
    weights.write_bytes(content)
    refit(backend, engine, graph)
    assert engine.weights == first


def test_what_does_not_fit(bundle: Path, backend: InstalledTensorRT) -> None:
    graph = bundle / "vqgan/model.onnx"
    engine = Engine(bundle / "text_encoder/model.onnx")
    before = dict(engine.weights)
    with pytest.raises(
        EngineError, match=r"its engine is of another graph, with weights .* and \d+ more; build it again"
    ):
        refit(backend, engine, graph)
    assert engine.weights == before
    engine.weights = {}
    with pytest.raises(EngineError, match="cannot be given weights; build it with refittable=True"):
        refit(backend, engine, graph)
    engine = Engine(graph)
    engine.works = False
    with pytest.raises(EngineError, match="TensorRT refused its weights: out of memory"):
        refit(backend, engine, graph)


def test_rtx_builds_none(bundle: Path) -> None:
    with pytest.raises(UsageError, match="needs a GPU to build engines with refittable=True; build again"):
        build(bundle, BuildOptions(targets=("sm89",), refittable=True))
