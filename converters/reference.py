"""Loads a model's weights, whatever their layout, into the PyTorch reference."""

from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module

import torch
from torch import nn

from ..runtime.engines.torch import Loader, TorchEngine
from ..runtime.reference import load_reference
from ..schemas.config_json import to_json
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


def reference_engine(
    model: Model, stages: Sequence[Stage], *, dtype: str = "F32", compiled: bool = False
) -> TorchEngine:
    """The reference of each of `stages` in `dtype`; weights are read when a stage is loaded.

    Raises UsageError when the model lacks a stage, LayoutError when one is damaged."""
    loaders = {stage: _loader(model.component(stage), DTYPES[dtype]) for stage in stages}
    return TorchEngine(loaders, compiled=compiled)


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


def load_component(component: Component, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The component's network in PyTorch, holding its weights."""
    return load_reference(component.config, _Tensors(component), dtype)


def _loader(component: Component, dtype: torch.dtype) -> Loader:
    return lambda: (load_component(component, dtype), ports_of(component.config))


def diffusers_engine(component: Component, *, dtype: str = "F32") -> TorchEngine:
    """diffusers' own network for the prior or the decoder, to measure beside ours. Needs diffusers."""
    return TorchEngine({component.stage: lambda: (_Diffusers(component, DTYPES[dtype]), ports_of(component.config))})


class _Diffusers(nn.Module):
    """diffusers' StableCascadeUNet with the ports of ours."""

    def __init__(self, component: Component, dtype: torch.dtype) -> None:
        super().__init__()
        with torch.device("meta"):
            self.unet = import_module("diffusers").StableCascadeUNet.from_config(to_json(component.config))
        weights = {name: read_tensor(tensor).to(dtype) for name, tensor in component.tensors.items()}
        self.unet.load_state_dict(weights, assign=True)
        self.requires_grad_(False).eval()

    def forward(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"noise_pred": self.unet(**inputs).sample}
