"""ONNX files and their weights: the place of each initialiser's bytes, and onnx's own checks."""

import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import onnx

from ...schemas.dtypes import DTYPE_SIZES
from ...schemas.manifest import VERSION, PortEntry
from ..onnx.graph_builder import PORT_TYPES

INT4 = "INT4"
DTYPES: Mapping[int, str] = {
    onnx.TensorProto.FLOAT: "F32",
    onnx.TensorProto.FLOAT16: "F16",
    onnx.TensorProto.BFLOAT16: "BF16",
    onnx.TensorProto.DOUBLE: "F64",
    onnx.TensorProto.INT8: "I8",
    onnx.TensorProto.UINT8: "U8",
    onnx.TensorProto.FLOAT8E4M3FN: "F8_E4M3",
    onnx.TensorProto.INT4: INT4,
}
TOGETHER = re.compile(r"(.*)\.([^.+]+(?:\+[^.+]+)+)\.(weight|bias)")
PORT_DTYPES = {number: name for name, number in PORT_TYPES.items()} | {onnx.TensorProto.INT32: "int32"}


@dataclass(frozen=True)
class ExternalTensor:
    """The place of an initialiser's bytes: a file relative to the graph's folder, and a range of that file."""

    name: str
    dtype: str  # in safetensors' spelling, or INT4 for two values a byte; "" for a type that no export writes
    dims: tuple[int, ...]
    location: str
    offset: int
    length: int

    @property
    def needed(self) -> int:
        """The bytes that so many values of the dtype take."""
        values = math.prod(self.dims)
        return -(-values // 2) if self.dtype == INT4 else values * DTYPE_SIZES.get(self.dtype, 0)


def external_data(model: onnx.ModelProto) -> Iterator[ExternalTensor]:
    """Yield every externally stored tensor; a packed q+k+v tensor is yielded as its three parts.

    Raises ValueError if an offset or length is not an integer."""
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            place = {entry.key: entry.value for entry in tensor.external_data}
            whole = ExternalTensor(
                name=tensor.name,
                dtype=DTYPES.get(tensor.data_type, ""),
                dims=tuple(tensor.dims),
                location=place.get("location", ""),
                offset=int(place.get("offset", 0)),
                length=int(place.get("length", -1)),
            )
            yield from _apart(whole)


def _apart(whole: ExternalTensor) -> Iterator[ExternalTensor]:
    """The parts of a tensor ``prefix.a+b.weight``, which are adjacent and equally large; else the tensor itself."""
    found = TOGETHER.fullmatch(whole.name)
    if not found or not whole.dims:
        yield whole
        return
    parts = found[2].split("+")
    length, dims = whole.length // len(parts), (whole.dims[0] // len(parts), *whole.dims[1:])
    for number, part in enumerate(parts):
        name = f"{found[1]}.{part}.{found[3]}"
        yield replace(whole, name=name, dims=dims, offset=whole.offset + number * length, length=length)


def load_graph(path: Path) -> onnx.ModelProto:
    """Load the graph without its external weights."""
    return onnx.load(path, load_external_data=False)


def port_entries(values: Iterator[onnx.ValueInfoProto] | list[onnx.ValueInfoProto]) -> tuple[PortEntry, ...]:
    """The manifest's description of a graph's inputs or outputs."""
    return tuple(
        PortEntry(
            name=value.name,
            dtype=PORT_DTYPES.get(value.type.tensor_type.elem_type, "unknown"),
            dims=tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim),
        )
        for value in values
    )


def opset_of(model: onnx.ModelProto) -> int:
    """The version of ai.onnx that the graph is written in; 0 when the graph names none."""
    return next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)


def stamp(model: onnx.ModelProto, facts: Mapping[str, str], version: str) -> None:
    """Record in the graph the version of cascadekit that wrote it, and `facts` as metadata ``cascadekit.NAME``.

    No time is recorded: two exports of the same weights are the same bytes."""
    model.producer_version = version
    model.model_version = VERSION
    onnx.helper.set_model_props(model, {f"cascadekit.{key}": text for key, text in facts.items()})


@contextmanager
def beside_holes(folder: Path, sizes: Mapping[str, int]) -> Iterator[Path]:
    """Make `folder` with an empty file of the size of each weights file (a hole); the folder is removed at the end.

    onnx looks at a graph's weights files when it checks the graph, and refuses files with several hard links. It
    reads none of their bytes, so holes serve as well."""
    folder.mkdir()
    try:
        for name, size in sizes.items():
            (folder / name).touch()
            os.truncate(folder / name, size)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_graph(path: Path) -> None:
    """onnx's full check of a graph by its path, with shape inference. Raises onnx's own errors."""
    onnx.checker.check_model(path, full_check=True)


def infer_strictly(path: Path) -> None:
    """Infer the shape of every value of a graph by its path; writes the result beside it. Raises onnx's own errors."""
    output = path.with_suffix(".inferred")
    onnx.shape_inference.infer_shapes_path(path, output, check_type=True, strict_mode=True, data_prop=True)


def first_line(error: Exception) -> str:
    """The first line of the message of `error`; the name of its class when it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
