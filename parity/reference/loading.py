"""Loads a model's weights, whatever their layout, into the PyTorch reference."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import nn

from ...converters.checkpoints.component import Component
from ...converters.checkpoints.open_model import Model
from ...schemas.block_types import BLOCK_TYPES
from ...schemas.config_json import to_json
from ...schemas.dtypes import DTYPES, FLOATS, FP8
from ...schemas.errors import ExportError, LayoutError, UsageError, reraise_interrupt
from ...schemas.ports import StagePorts, ports_of
from ...schemas.stages import ImageEncoderConfig, Stage, TextEncoderConfig, UNetConfig, VQGANConfig
from ...storage.cast import cast_counted
from ...storage.read_scale import read_scale
from ...storage.safetensors_reader import TensorRange
from . import load_reference
from .torch_engine import Loader, TorchEngine

TORCH_DTYPES = {name: getattr(torch, DTYPES[name].torch) for name in (*FLOATS, "I64")}


def reference_engine(
    model: Model,
    stages: Sequence[Stage],
    *,
    dtype: str = "F32",
    compiled: bool = False,
    compute: str | None = None,
) -> TorchEngine:
    """The reference of each of `stages` with weights in `dtype`, computing in that dtype or in `compute`.

    Weights are read when a stage is loaded. Raises UsageError when the model lacks a stage, LayoutError when one is
    damaged."""
    loaders = {stage: _loader(model.component(stage), TORCH_DTYPES[dtype]) for stage in stages}
    return TorchEngine(loaders, compiled=compiled, compute=compute)


def read_tensor(tensor: TensorRange) -> torch.Tensor:
    """The tensor's values, copied out of the file in its dtype; fp8, scaled and quantised values become float32.

    Raises ExportError for a dtype that torch lacks, ConversionError for a scale that is no number."""
    if tensor.dtype in (*FP8, *BLOCK_TYPES) or tensor.scale is not None:
        factors = read_scale(tensor)
        scale = factors and factors.of(range(math.prod(tensor.shape)))
        values = cast_counted(memoryview(_bytes(tensor)), tensor.dtype, "F32", scale).values
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


class _Tensors(Mapping[str, torch.Tensor]):
    """A component's tensors, each read from its file when it is needed, so there is no second copy of the weights."""

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
    """The component's network in PyTorch with its weights."""
    return load_reference(component.config, _Tensors(component), dtype)


def _loader(component: Component, dtype: torch.dtype) -> Loader:
    return lambda: (load_component(component, dtype), ports_of(component.config))


def independent_engine(
    model: Model, stages: Sequence[Stage], *, dtype: str = "F32", compute: str | None = None
) -> TorchEngine:
    """The networks of diffusers and transformers with the model's weights: code that is not ours.

    Raises UsageError when the model lacks a stage, diffusers has no network for one, or a library is not installed."""
    strange = [stage for stage in stages if stage not in INDEPENDENT]
    if strange:
        raise UsageError(
            f'diffusers and transformers have no {strange[0]}; compare it with reference="cascadekit", '
            f"or choose other stages with stages={[str(stage) for stage in INDEPENDENT]}"
        )
    try:
        for library in ("diffusers", "transformers"):
            import_module(library)
    except ImportError as error:
        reraise_interrupt(error)
        raise UsageError(f"{library} is not installed: pip install diffusers transformers") from error
    components = {stage: model.component(stage) for stage in stages}
    loaders = {stage: _independent_loader(component, TORCH_DTYPES[dtype]) for stage, component in components.items()}
    return TorchEngine(loaders, compute=compute, name="diffusers")


def _independent_loader(component: Component, dtype: torch.dtype) -> Loader:
    def load() -> tuple[nn.Module, StagePorts]:
        with torch.device("meta"):
            network = INDEPENDENT[component.stage](component.config)
        _take_weights(network.inner, component, dtype)
        return network.requires_grad_(False).eval(), ports_of(component.config)

    return load


def _take_weights(network: nn.Module, component: Component, dtype: torch.dtype) -> None:
    """Load the component's tensors into a network without storage.

    A vqgan needs only the tensors that its `decode` uses. Raises LayoutError for weights that are missing."""
    known = network.state_dict().keys() & component.tensors.keys()
    weights = {name: read_tensor(component.tensors[name]) for name in sorted(known)}
    cast = {name: value.to(dtype) if value.is_floating_point() else value for name, value in weights.items()}
    missing = network.load_state_dict(cast, strict=False, assign=True).missing_keys
    needed = [name for name in missing if not name.startswith(UNUSED_OF_VQGAN)]
    if needed:
        lacking = ", ".join(needed[:5])
        raise LayoutError(f"{component.path}: the {component.stage} lacks {lacking}; get the file again")


UNUSED_OF_VQGAN = ("in_block.", "down_blocks.", "vquantizer.")


class _Theirs(nn.Module):
    """A network of another library with our ports: `run` calls it with our inputs and returns our outputs."""

    def __init__(self, inner: nn.Module, run: Callable[..., dict[str, torch.Tensor]]) -> None:
        super().__init__()
        self.inner = inner
        self._run = run

    def forward(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        return self._run(self.inner, **inputs)


def _diffusers_unet(config: UNetConfig) -> _Theirs:
    """diffusers' StableCascadeUNet."""

    def run(network: Any, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"noise_pred": network(**inputs).sample}

    return _Theirs(import_module("diffusers").StableCascadeUNet.from_config(to_json(config)), run)


def _paella(config: VQGANConfig) -> _Theirs:
    """diffusers' PaellaVQModel with the scaling and clamping of the pipelines."""

    def run(network: Any, latents: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"images": network.decode(config.scale_factor * latents).sample.clamp(0, 1)}

    deprecated = import_module("diffusers.pipelines.deprecated.wuerstchen")
    return _Theirs(deprecated.PaellaVQModel.from_config(to_json(config)), run)


def _clip_text(config: TextEncoderConfig) -> _Theirs:
    """transformers' CLIPTextModelWithProjection, whose last hidden state is before the final norm."""

    def run(network: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        _set_positions(network.text_model, config.max_position_embeddings)
        found = network(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True)
        return {"prompt_embeds": found.hidden_states[-1], "pooled": found.text_embeds[:, None]}

    library = import_module("transformers")
    return _Theirs(library.CLIPTextModelWithProjection(library.CLIPTextConfig.from_dict(to_json(config))), run)


def _clip_vision(config: ImageEncoderConfig) -> _Theirs:
    """transformers' CLIPVisionModelWithProjection."""

    def run(network: Any, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        _set_positions(network.vision_model, (config.image_size // config.patch_size) ** 2 + 1)
        return {"image_embeds": network(pixel_values=pixel_values).image_embeds}

    library = import_module("transformers")
    return _Theirs(library.CLIPVisionModelWithProjection(library.CLIPVisionConfig.from_dict(to_json(config))), run)


def _set_positions(model: Any, count: int) -> None:
    """Fill the one buffer of a CLIP model that no checkpoint holds."""
    model.embeddings.position_ids = torch.arange(count)[None]


# The networks of other libraries, built by their config.
INDEPENDENT: Mapping[Stage, Callable[[Any], _Theirs]] = {
    Stage.TEXT_ENCODER: _clip_text,
    Stage.PRIOR: _diffusers_unet,
    Stage.DECODER: _diffusers_unet,
    Stage.VQGAN: _paella,
    Stage.IMAGE_ENCODER: _clip_vision,
}
