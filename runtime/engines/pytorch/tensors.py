"""Reads weights from safetensors files, of a model or of a bundle, as tensors of PyTorch."""

import math
from collections import UserDict
from typing import Any

import torch

from ....schemas.block_types import BLOCK_TYPES
from ....schemas.config_json import from_json
from ....schemas.dtypes import DTYPES, FLOATS, FP8
from ....schemas.errors import ExportError
from ....schemas.key_prefixes import TensorGroup, group_by_prefix
from ....schemas.layouts import layout_of, stage_of
from ....schemas.stages import Stage
from ....schemas.tensors import expected_tensors
from ....storage.bundle import Bundle
from ....storage.read_scale import cast_scaled, read_scale
from ....storage.renamed_tensors import diffusers_tensors, shapes_of
from ....storage.safetensors_reader import Header, TensorRange, read_header

TORCH_DTYPES = {name: getattr(torch, DTYPES[name].torch) for name in (*FLOATS, "I64")}


def read_tensor(tensor: TensorRange) -> torch.Tensor:
    """The tensor's values, copied out of the file in its dtype; fp8, scaled and quantised values become float32.

    Raises ExportError for a dtype that torch lacks, ConversionError for a scale that is no number."""
    if tensor.dtype in (*FP8, *BLOCK_TYPES) or tensor.scale is not None:
        span, factors = range(math.prod(tensor.shape)), read_scale(tensor)
        values = cast_scaled(memoryview(_bytes(tensor)), tensor.dtype, "F32", factors, span).values
        return _shaped(torch.from_numpy(values), tensor)
    if tensor.dtype not in TORCH_DTYPES:
        raise ExportError(
            f'{tensor.path}: torch has no dtype {tensor.dtype}; convert the model with dtype="fp32" first'
        )
    if not tensor.nbytes:
        return torch.empty(tensor.shape, dtype=TORCH_DTYPES[tensor.dtype])
    return _shaped(torch.frombuffer(_bytes(tensor), dtype=TORCH_DTYPES[tensor.dtype]), tensor)


def _bytes(tensor: TensorRange) -> bytearray:
    data = bytearray(tensor.nbytes)
    with tensor.path.open("rb") as file:
        file.seek(tensor.offset)
        file.readinto(data)
    return data


def _shaped(values: torch.Tensor, tensor: TensorRange) -> torch.Tensor:
    return values.reshape(tensor.shape[::-1]).T.contiguous() if tensor.transposed else values.reshape(tensor.shape)


class LazyTensors(UserDict[str, Any]):
    """Tensors by name, each read from its file when it is needed, so that there is no second copy of the weights."""

    def __getitem__(self, name: str) -> torch.Tensor:
        return read_tensor(self.data[name])


def bundle_tensors(bundle: Bundle, stage: Stage) -> dict[str, TensorRange]:
    """The range of each tensor of a stage by its diffusers name, whatever layout the bundle's files have.

    Raises CheckpointError for a file that is missing or changed."""
    bundle.check(stage)
    entry = bundle.entry(stage)
    expected = expected_tensors(from_json(stage, entry.config))
    found: dict[str, TensorRange] = {}
    for file in [file for file in entry.files if file.path not in entry.graph_paths]:
        header = read_header(bundle.root / file.path)
        named = {name: tensor for name, tensor in header.tensors.items() if expected.get(name) == tensor.shape}
        if len(named) < len(expected):  # a shard, or another layout, which shares some names
            renamed = _renamed(header, stage)
            named = {**{name: tensor for name, tensor in renamed.items() if name in expected}, **named}
        found |= named
    return found


def _renamed(header: Header, stage: Stage) -> dict[str, TensorRange]:
    """The tensors of `stage` in a file of another layout; of two sets of weights, those that exports take."""
    groups = [group for group in group_by_prefix(header.tensors) if _is_of(group, header, stage)]
    if not groups:
        return {}
    group = min(groups, key=lambda group: group.rank)
    tensors = {inner: header.tensors[name] for inner, name in group.names.items()}
    return diffusers_tensors(tensors, stage, group.layout or layout_of(stage, shapes_of(tensors)))[0]


def _is_of(group: TensorGroup, header: Header, stage: Stage) -> bool:
    found = group.stage or stage_of({inner: header.tensors[name].shape for inner, name in group.names.items()})
    return found is stage
