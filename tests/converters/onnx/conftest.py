"""Fixtures of the graph tests: from a config through random weights and a written graph to numbers to compare."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file

from cascadekit.converters.onnx import Weight, write_graph
from cascadekit.converters.safetensors_file import read_header
from cascadekit.runtime.reference import load_reference
from cascadekit.schemas.ports import ports_of
from cascadekit.schemas.stages import NetworkConfig
from cascadekit.schemas.tensors import expected_tensors, is_counter

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Exported:
    """A graph on disk beside the file of its weights."""

    config: NetworkConfig
    path: Path
    tensors: dict[str, Any]  # torch tensors, in the dtype they are stored in

    @cached_property
    def session(self) -> Any:
        return open_session(self.path)

    @cached_property
    def reference(self) -> Any:
        """The PyTorch network of the same weights, in fp32."""
        return load_reference(self.config, self.tensors)

    def inputs(self, seed: int = 0, **sizes: int) -> dict[str, np.ndarray]:
        """Random values for float ports, their symbolic dims set to `sizes`; the timestep ratio lies in 0..1."""
        rng = np.random.default_rng(seed)
        inputs = {}
        for port in ports_of(self.config).inputs:
            dims = [sizes[dim] if isinstance(dim, str) else dim for dim in port.dims]
            values = rng.random(dims) if port.name == "timestep_ratio" else rng.standard_normal(dims)
            inputs[port.name] = values.astype(np.float32)
        return inputs

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        return run(self.session, inputs)

    def expected(self, inputs: Arrays) -> dict[str, np.ndarray]:
        with torch.no_grad():
            outputs = self.reference(**{name: torch.from_numpy(value) for name, value in inputs.items()})
        return {name: value.numpy() for name, value in outputs.items()}


def open_session(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run(session: Any, inputs: Arrays) -> dict[str, np.ndarray]:
    """Outputs by name."""
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, dict(inputs)), strict=True))


def random_tensors(config: NetworkConfig, seed: int) -> dict[str, Any]:
    """Every tensor of the network, random and nowhere 0: what is initialised to 0 or 1 would hide mistakes.

    Matrices keep the size of activations, all else gets values around 0.3."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in expected_tensors(config).items():
        matrix = sum(size > 1 for size in shape) > 1
        values = torch.randn(shape, generator=generator) * (np.prod(shape[1:]) ** -0.5 if matrix else 0.3)
        values[values == 0] = 0.1  # among millions there are some
        tensors[name] = torch.tensor(3) if is_counter(name) else values.abs() if "running_var" in name else values
        assert (tensors[name] != 0).all(), name
    return tensors


def shift_data(path: Path, remainder: int) -> None:
    """Lengthen a safetensors file's header until the data begin `remainder` bytes after a multiple of 8."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = content[8:end] + b" " * ((remainder - end) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[end:])


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
        weights = {
            name: Weight(tensor.dtype, tensor.shape, file.name, tensor.offset, tensor.nbytes)
            for name, tensor in read_header(file).tensors.items()
        }
        onnx.save(write_graph(config, weights), folder / "model.onnx")
        return Exported(config, folder / "model.onnx", tensors)

    return written


@pytest.fixture(scope="session")
def difference() -> Callable[[Arrays, Arrays], float]:
    """A function for the greatest relative L2 among outputs, which must agree in names, shapes and dtypes."""

    def measure(ours: Arrays, theirs: Arrays) -> float:
        described = [{name: (v.shape, v.dtype) for name, v in outputs.items()} for outputs in (ours, theirs)]
        assert described[0] == described[1]
        return max(float(np.linalg.norm(ours[name] - theirs[name]) / np.linalg.norm(theirs[name])) for name in theirs)

    return measure
