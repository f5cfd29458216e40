"""Fixtures of the graph tests: graphs made once, and measures of their results."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator
from safetensors.torch import save_file

from cascadekit.converters.onnx import write_graph
from cascadekit.schemas.stages import NetworkConfig
from cascadekit.schemas.tensors import is_counter
from cascadekit.storage.safetensors_reader import read_header
from helpers.graphs import Arrays, Exported, LayerNormalization, random_tensors, shift_data
from helpers.ort_operators import OPERATORS


@pytest.fixture(scope="session")
def evaluate() -> Callable[[Path, Arrays], dict[str, np.ndarray]]:
    """A function that runs a graph in onnx's reference evaluator, which rounds every value to its type. ONNX Runtime
    has no bf16 on CPUs, and computes fp16 graphs in fp32 wherever it can leave out two casts."""

    def outputs(path: Path, inputs: Arrays) -> dict[str, np.ndarray]:
        model = onnx.load(path)
        for node in model.graph.node:  # the evaluator would hand an output without a name to inputs without one
            node.output[:] = [name or f"{node.name}/unused{place}" for place, name in enumerate(node.output)]
        evaluator = ReferenceEvaluator(model, new_ops=[LayerNormalization, *OPERATORS])
        with np.errstate(all="ignore"):
            return dict(zip(evaluator.output_names, evaluator.run(None, dict(inputs)), strict=True))

    return outputs


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Exported]:
    """A function for a config's graph with random weights on disk, made once for the same arguments.

    `dtype` tells from a tensor's name the torch dtype it is stored in (default all fp32), `remainder` where in the
    file the weights begin."""

    @cache
    def written(
        config: NetworkConfig, dtype: Callable[[str], Any] | None = None, remainder: int = 0, seed: int = 0
    ) -> Exported:
        folder = tmp_path_factory.mktemp("graph")
        tensors = random_tensors(config, seed)
        if dtype is not None:
            tensors = {name: t if is_counter(name) else t.to(dtype(name)) for name, t in tensors.items()}
        file = folder / "weights.safetensors"
        save_file(tensors, file)
        shift_data(file, remainder)
        weights = read_header(file).tensors
        onnx.save(write_graph(config, weights), folder / "model.onnx")
        return Exported(config, folder / "model.onnx", tensors, weights)

    return written


@pytest.fixture(scope="session")
def difference() -> Callable[[Arrays, Arrays], float]:
    """A function for the greatest relative L2 among outputs, which must agree in names, shapes and dtypes."""

    def measure(ours: Arrays, theirs: Arrays) -> float:
        described = [{name: (v.shape, v.dtype) for name, v in outputs.items()} for outputs in (ours, theirs)]
        assert described[0] == described[1]
        return max(float(np.linalg.norm(ours[name] - theirs[name]) / np.linalg.norm(theirs[name])) for name in theirs)

    return measure
