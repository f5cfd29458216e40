"""From a config through random weights to a written graph on disk, and numbers out of it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx.reference.op_run import OpRun

from cascadekit.converters.export.bundle_weights import projections_together
from cascadekit.converters.onnx import GraphOptions, write_graph
from cascadekit.parity.reference import load_reference
from cascadekit.schemas.folded_biases import BIASES_NAME, folded_shapes
from cascadekit.schemas.ports import ports_of
from cascadekit.schemas.stages import NetworkConfig
from cascadekit.schemas.tensors import expected_tensors, is_counter
from cascadekit.storage.safetensors_reader import TensorRange

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Exported:
    """A graph on disk beside the file of its weights."""

    config: NetworkConfig
    path: Path
    tensors: dict[str, Any]  # torch tensors, in the dtype they are stored in
    weights: dict[str, TensorRange]

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

    def write(self, options: GraphOptions, name: str = "model") -> Path:
        """Another graph of the same weights, beside the first; it overwrites the last one of that name."""
        path = self.path.with_name(f"other_{name}.onnx")
        onnx.save(write_graph(self.config, self.weights, options, name), path)
        return path

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


class LayerNormalization(OpRun):  # type: ignore[misc]
    """With mean and variance in fp32, as stash_type says; onnx's own evaluator takes them in the input's type."""

    op_domain = ""

    def _run(
        self, x: Any, scale: Any, shift: Any = None, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
    ) -> Any:
        assert (axis, stash_type) == (-1, 1)
        wide = x.astype(np.float32)
        centred = wide - wide.mean(-1, keepdims=True)
        normed = (centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)).astype(x.dtype) * scale
        return (normed if shift is None else normed + shift,)


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


def places_of(config: NetworkConfig, dtype: str = "F32", *, biases: bool = False) -> dict[str, TensorRange]:
    """Places of the weights in a file that is not there, in the order of `export`; with `biases` also of those that
    `export` computes for ONNX Runtime."""
    shapes = expected_tensors(config)
    found, offset = {}, 0
    for name in projections_together(list(shapes)):
        nbytes = math.prod(shapes[name]) * (4 if dtype == "F32" else 2)
        found[name] = TensorRange(Path("weights.safetensors"), dtype, shapes[name], offset, nbytes)
        offset += nbytes
    for name, shape in folded_shapes(config).items() if biases else ():
        found[name] = TensorRange(Path(BIASES_NAME), "F32", shape, 0, 4 * math.prod(shape))
    return found


def shift_data(path: Path, remainder: int) -> None:
    """Lengthen a safetensors file's header until the data begin `remainder` bytes after a multiple of 8."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = content[8:end] + b" " * ((remainder - end) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[end:])
