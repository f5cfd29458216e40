"""Loads a model's weights, whatever their layout, into the PyTorch reference."""

from collections.abc import Iterator, Mapping, Sequence

import torch

from ..runtime.engines.torch import Loader, TorchEngine
from ..runtime.reference import load_reference
from ..schemas.errors import ExportError
from ..schemas.ports import ports_of
from ..schemas.stages import Stage
from .identify import Component
from .model import Model
from .safetensors_file import TensorRange

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
}


def reference_engine(model: Model, stages: Sequence[Stage]) -> TorchEngine:
    """The reference of each of `stages` in fp32; weights are read when a stage is loaded.

    Raises UsageError when the model lacks a stage, LayoutError when one is damaged."""
    return TorchEngine({stage: _loader(model.component(stage)) for stage in stages})


def read_tensor(tensor: TensorRange) -> torch.Tensor:
    """The tensor's values, copied out of the file in the file's dtype. Raises ExportError for a dtype torch lacks."""
    if tensor.dtype not in DTYPES:
        raise ExportError(f"{tensor.path}: the reference cannot read dtype {tensor.dtype}")
    if not tensor.nbytes:
        return torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype])
    with tensor.path.open("rb") as file:
        file.seek(tensor.offset)
        data = bytearray(tensor.nbytes)
        file.readinto(data)
    values = torch.frombuffer(data, dtype=DTYPES[tensor.dtype])
    return values.reshape(tensor.shape[::-1]).T.contiguous() if tensor.transposed else values.reshape(tensor.shape)


class _Tensors(Mapping[str, torch.Tensor]):
    """A component's tensors, each read from its file when asked for, so that no second copy of the weights waits."""

    def __init__(self, component: Component) -> None:
        self._ranges = component.tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        return read_tensor(self._ranges[name])

    def __contains__(self, name: object) -> bool:
        return name in self._ranges

    def __iter__(self) -> Iterator[str]:
        return iter(self._ranges)

    def __len__(self) -> int:
        return len(self._ranges)


def _loader(component: Component) -> Loader:
    config = component.config
    return lambda: (load_reference(config, _Tensors(component)), ports_of(config))
